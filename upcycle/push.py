"""A push to the Hugging Face Hub, carried out: uploads that nobody sees, then the one commit.

What is up already is skipped. The commit adds and removes all that changes at once, on a known parent, so that a reader
finds the former model or the whole new one, and another's commit is never built over.
"""

import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from upcycle.errors import HubError
from upcycle.hub import Repository, ask, find_repository
from upcycle.hub_account import MAIN, Target, client
from upcycle.push_plan import Progress, Push, is_of_a_model, is_same

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

TOGETHER: Final = 1 << 20  # bytes of a file that is uploaded by one call with others


@dataclass(frozen=True)
class Pushed:
    """What a push did: the commit that holds the model, whether this push made it, and where to look at it."""

    repository: str
    commit: str
    made: bool
    url: str
    pull_request: bool = False


def carry_out(
    push: Push, *, private: bool = False, pull_request: bool = False, progress: Progress = lambda _: None
) -> Pushed:
    """Upload what the Hub lacks and make the one commit; makes the repository or branch if there is none.

    Args:
        private: whether a new repository is; one that exists is left as it is.
        pull_request: propose the commit instead of making it on the branch.
        progress: called with the bytes of files that are up since the last call; in all those of `push.changed`.

    Raises:
        HubError: what failed, and what of it is on the Hub.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    target, api = push.target, client()
    if target.head and not push.changed and not push.deleted:
        return Pushed(target.name, target.head.commit, False, f"{api.endpoint}/{target.name}")
    with _quiet():
        target, head = _with_repository(target, private)
        push = replace(push, target=target)
        additions = []
        for group in _groups(push.changed, push.sizes):
            contents = ((name, push.files[name]) for name in group)
            adding = [CommitOperationAdd(name, one if isinstance(one, bytes) else str(one)) for name, one in contents]
            _upload(push, adding, pull_request)
            additions += adding
            progress(sum(push.sizes[name] for name in group))
        if target.new_branch:
            made = f"branch {target.branch} of Hub repository {target.name}"
            ask(made, lambda: api.create_branch(target.name, branch=target.branch, revision=head.commit, exist_ok=True))
        deletions = [CommitOperationDelete(name) for name in push.deleted]
        return _commit(push, head, [*additions, *deletions], pull_request)


def _with_repository(target: Target, private: bool) -> tuple[Target, Repository]:
    """The target with its repository, made if there was none, and the commit to build on."""
    if target.head:
        return target, target.head
    what = f"new Hub repository {target.name}"
    # None: public, or what the organisation has set.
    ask(what, lambda: client().create_repo(target.name, private=private or None, exist_ok=True))
    head = find_repository(f"{target.name}@{MAIN}")
    if any(is_of_a_model(name) for name in head.files):
        raise HubError(
            f"somebody else made Hub repository {target.name} and put a model into it meanwhile; nothing was pushed; "
            "run the same command again to see what is there"
        )
    return replace(target, head=head), head


def _groups(names: Iterable[str], sizes: Mapping[str, int]) -> list[list[str]]:
    """Small files together, large ones each alone: so the bar moves, and the client, in no threads, hears Ctrl-C."""
    names = list(names)
    small = [name for name in names if sizes[name] <= TOGETHER and not name.endswith(".safetensors")]
    return [*([small] if small else []), *([name] for name in names if name not in small)]


def _upload(push: Push, additions: "list[CommitOperationAdd]", pull_request: bool) -> None:
    """Bring contents to the Hub's storage, where a commit may refer to them."""
    target = push.target

    def call() -> None:
        try:
            client().preupload_lfs_files(
                target.name,
                additions,
                revision=MAIN if target.new_branch else target.branch,
                create_pr=pull_request,
                free_memory=False,
                gitignore_content="",  # the repository's own would silently leave files out of the commit
            )
        except RuntimeError as error:  # in which the client wraps what happened
            if isinstance(error.__cause__, Exception):
                raise error.__cause__ from None
            raise

    names = ", ".join(addition.path_in_repo for addition in additions)
    ask(f"upload of {names[:200]} to Hub repository {target.name}", call)


def _commit(push: Push, head: Repository, operations: Sequence[Any], pull_request: bool) -> Pushed:
    """Make the commit. An answer that does not come says nothing of whether it was made, so the Hub is asked."""
    target, api, tried = push.target, client(), False

    def attempt() -> Pushed:
        nonlocal tried
        if tried and (landed := _landed(push, pull_request)):
            return landed
        tried = True
        made = api.create_commit(
            target.name,
            operations,
            commit_message=push.title,
            revision=target.branch,
            parent_commit=head.commit,
            create_pr=pull_request,
        )
        url = made.pr_url if pull_request and made.pr_url else f"{api.endpoint}/{target.name}/commit/{made.oid}"
        return Pushed(target.name, made.oid, True, url, pull_request)

    try:
        return ask(f"commit to Hub repository {target.name}", attempt)
    except HubError as error:
        again = "the same command goes on with what is uploaded"
        try:
            if landed := _landed(push, pull_request):
                return landed
            now = find_repository(f"{target.name}@{target.branch}").commit
        except HubError as second:
            raise HubError(f"{error}\nWhether it was made is not known: {second}; {again}, and finds out") from None
        if now != head.commit:
            raise HubError(
                f"somebody else has committed to Hub repository {target.name}, branch {target.branch}, meanwhile "
                f"({head.commit[:8]} was there, {now[:8]} is now), so nothing was committed; {again}, after looking at "
                "what is there now"
            ) from None
        raise HubError(f"{error}; no commit was made; {again}") from None


def _landed(push: Push, pull_request: bool) -> Pushed | None:
    """The commit that holds exactly what is pushed, if the branch's head or a pull request's does."""
    target, api = push.target, client()
    if not pull_request:
        now = find_repository(f"{target.name}@{target.branch}")
        url = f"{api.endpoint}/{target.name}/commit/{now.commit}"
        return Pushed(target.name, now.commit, True, url) if _holds(now, push) else None
    what = f"pull requests of Hub repository {target.name}"
    refs = ask(what, lambda: api.list_repo_refs(target.name, include_pull_requests=True)).pull_requests or []
    numbers = sorted((int(ref.ref.rpartition("/")[2]) for ref in refs), reverse=True)
    for number in numbers[:3]:
        now = find_repository(f"{target.name}@refs/pr/{number}")
        if _holds(now, push):
            url = f"{api.endpoint}/{target.name}/discussions/{number}"
            return Pushed(target.name, now.commit, True, url, pull_request=True)
    return None


def _holds(now: Repository, push: Push) -> bool:
    """Whether a commit holds all that is pushed, and nothing that goes."""
    same = all(is_same(content, now.files.get(name)) for name, content in push.files.items())
    return same and not {*push.deleted} & {*now.files}


@contextmanager
def _quiet() -> Iterator[None]:
    """The client without its bars, and without warnings of what is handled here."""
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )
    from huggingface_hub.utils import logging as client_logging

    disabled, level = are_progress_bars_disabled(), client_logging.get_verbosity()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        disable_progress_bars()
        if level == logging.WARNING:  # else the user has chosen
            client_logging.set_verbosity(logging.ERROR)
        try:
            yield
        finally:
            client_logging.set_verbosity(level)
            if not disabled:
                enable_progress_bars()
