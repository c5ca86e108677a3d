"""Whose token it is, what it may do, and what a repository to be pushed to holds."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

from upcycle.errors import HubError
from upcycle.hub import Repository, ask, find_repository, is_offline, is_repository_name

if TYPE_CHECKING:
    from huggingface_hub import HfApi

MAIN: Final = "main"
T = TypeVar("T")
TOKENS: Final = "https://huggingface.co/settings/tokens"


@dataclass(frozen=True)
class Target:
    """Where a push goes, and what the Hub says is there.

    Attributes:
        name: what the Hub calls the repository now, which may have been renamed.
        user: whose token it is; None without one.
        private: whether the repository is; None if there is none, or none to be seen.
        head: the newest commit of the branch, or of main if there is no such branch; None without a repository.
        new_branch: there is no such branch.
        is_fresh: the branch has no commit of its own yet.
    """

    name: str
    branch: str
    user: str | None
    private: bool | None
    head: Repository | None
    new_branch: bool
    is_fresh: bool


def check_name(name: str, branch: str = MAIN) -> None:
    """Refuse what cannot be the name of a repository or of a branch.

    Raises:
        HubError: and what was expected.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    if "@" in name:
        raise HubError(f"'{name}' names a revision; expected org/name, and --branch for the branch")
    if not is_repository_name(name) or "/" not in name:
        raise HubError(f"'{name}' is no name of a Hub repository; expected org/name, or your user name before the /")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise HubError(f"'{name}' is no name of a Hub repository: {error}") from None
    if branch.startswith("refs/") or not is_repository_name(f"{name}@{branch}") or not branch:
        raise HubError(f"'{branch}' is no name of a branch")


def client() -> "HfApi":
    """The client, with the user's own token and endpoint."""
    from huggingface_hub import HfApi

    return HfApi()


def find_target(name: str, branch: str = MAIN, *, writes: bool = True, pull_request: bool = False) -> Target:
    """Look at a repository, and at what the token may do there; writes nothing.

    Args:
        writes: refuse if the token may not write; else only look, without a token if there is none.
        pull_request: a right to propose changes is enough.

    Raises:
        HubError: the token, the rights, the name or the network.
    """
    check_name(name, branch)
    check_token(writes)
    account = _account(writes)
    what = f"Hub repository {name}"
    info = ask(what, lambda: _or_none(lambda: client().model_info(name)))
    if info is None:
        if writes and account:
            _check_namespace(account, name)
        return Target(name, branch, _user(account), None, None, branch != MAIN, True)
    name = info.id
    if writes and not pull_request and not ask(what, lambda: _may_write(name)):
        raise HubError(
            f"{_user(account)} may not write to Hub repository {name}; take a token that may ({TOKENS}), or propose "
            "the model with --create-pr"
        )
    exists = branch == MAIN or ask(what, lambda: client().revision_exists(name, branch))
    main = find_repository(f"{name}@{MAIN}")
    head = find_repository(f"{name}@{branch}") if exists and branch != MAIN else main
    fresh = branch != MAIN and head.commit == main.commit
    return Target(name, branch, _user(account), info.private, head, not exists, fresh)


def check_token(writes: bool = True) -> None:
    """Refuse what needs no answer of the Hub to fail: nobody may be asked, or there is no token.

    Raises:
        HubError: and what to do.
    """
    from huggingface_hub import get_token

    if is_offline():
        raise HubError("HF_HUB_OFFLINE is set, but a push needs the Hub; unset it")
    if writes and get_token() is None:
        raise HubError(f"there is no token for the Hub; make one that may write ({TOKENS}), and log in: hf auth login")


def _account(writes: bool) -> dict[str, Any] | None:
    """What the Hub says of the token; None without one."""
    from huggingface_hub import get_token

    if get_token() is None:
        return None
    account: dict[str, Any] = ask("the Hub, asked whose token this is", client().whoami)
    if writes and _role(account) == "read":
        raise HubError(
            f"{_user(account)}'s token may only read; make one that may write ({TOKENS}), and log in with it: "
            "hf auth login"
        )
    return account


def _user(account: dict[str, Any] | None) -> str | None:
    return str(account.get("name")) if account else None


def _role(account: dict[str, Any]) -> str | None:
    """`read`, `write` or `fineGrained`; what the last may do, only the attempt tells."""
    access = account.get("auth", {}).get("accessToken") or {}
    role = access.get("role")
    return str(role) if role else None


def _check_namespace(account: dict[str, Any], name: str) -> None:
    """Refuse early to make a repository where the user has no place."""
    place = name.split("/")[0]
    orgs = [org["name"] for org in account.get("orgs", []) if org.get("roleInOrg") != "read"]
    if _role(account) == "write" and place not in (account.get("name"), *orgs):
        own = ", ".join([f"{account.get('name')}/…", *(f"{org}/…" for org in orgs[:5])])
        raise HubError(
            f"there is no Hub repository {name}, and {account.get('name')} may not make one of '{place}', nor see "
            f"private ones there; expected {own}"
        )


def _may_write(name: str) -> bool:
    from huggingface_hub.errors import HfHubHTTPError

    try:
        client().auth_check(name, write=True)
    except TypeError:  # an older client cannot ask; the upload will tell
        return True
    except HfHubHTTPError as error:
        if error.response.status_code == 403:
            return False
        raise
    return True


def _or_none(call: Callable[[], T]) -> T | None:
    """What `call` returns; None where the Hub says there is no such repository, or none to be seen."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return call()
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        return None
