"""`upcycle push`: a result onto the Hugging Face Hub, and the same after a merge or a training."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import output

if TYPE_CHECKING:
    from upcycle.hub_account import Target
    from upcycle.push import Pushed
    from upcycle.push_plan import Push

SHOWN = 20

License = Annotated[
    str | None,
    typer.Option("--license", metavar="ID", help="The result's licence (apache-2.0, ...), where its seeds' differ."),
]
PushTo = Annotated[
    str | None,
    typer.Option("--push-to", metavar="ORG/NAME", help="Then push it to the Hub, as `upcycle push` does."),
]


def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a merged or trained result.")],
    repository: Annotated[str, typer.Argument(metavar="ORG/NAME", help="Hub repository; made if there is none.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be done, and the card.")] = False,
    branch: Annotated[
        str | None, typer.Option(help="Branch; begun from main's newest commit if there is none.")
    ] = None,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Propose the commit as a pull request instead of making it.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Replace another model.")] = False,
    license: License = None,
    evaluation: Annotated[
        Path | None, typer.Option("--eval", help="What `upcycle eval --json` printed, for the card.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Push a result to the Hugging Face Hub: verified, with a card, in one commit; prints where it is.

    Killed or interrupted, the same command goes on. The token is the one of `hf auth login`, or HF_TOKEN.

    Example: upcycle push bam-3x my-org/bam-3x --private
    """
    from upcycle.hub_account import MAIN

    if create_pr and branch not in (None, MAIN):
        raise typer.BadParameter("--create-pr and --branch exclude one another: pull requests are made for main")
    license = _check_locally(folder, repository, branch or MAIN, license, not dry_run)
    measured = None
    if evaluation:
        from upcycle.report import read_evaluation

        measured = read_evaluation(evaluation)
    try:
        _verify(folder)
        planned = _plan(folder, repository, branch or MAIN, private, license, measured, not dry_run, create_pr)
        if dry_run:
            _show_plan(planned, private, create_pr, yes, as_json)
            return
        done = _carry_out(planned, private, create_pr, yes)
    except KeyboardInterrupt:
        output.error("interrupted; the same command goes on with what is uploaded")
        raise output.Stopped from None
    if as_json:
        output.data_object(push_object(planned, done))
    else:
        output.data_line(done.url)


def prepare_push(
    repository: str, provenance: Mapping[str, Any], license: str | None = None, trained: bool = False
) -> None:
    """Refuse, before the work, what would keep its result from being pushed: licences, token, rights, another model.

    Args:
        provenance: what the result's upcycle.json will be; without its `plan`, what is there is not looked at.
        trained: whether the result comes of a training.

    Raises:
        UpcycleError: why it could not be pushed, and what to do.
    """
    from upcycle.hub_account import check_name, find_target
    from upcycle.licenses import check_licenses
    from upcycle.push_plan import check_replacing, describe, replaced_model

    check_name(repository)
    check_licenses(provenance, license)
    target = find_target(repository)
    if "plan" in provenance:
        check_replacing(target, replaced_model(target, provenance, trained), describe(provenance, trained))


def push_result(folder: Path, repository: str, license: str | None = None) -> "Pushed":
    """Push what was just made; a failure says that it is safe, and how to push it later.

    Raises:
        UpcycleError: why it is not on the Hub.
    """
    from upcycle.errors import UpcycleError
    from upcycle.hub_account import MAIN

    command = ["upcycle", "push", str(folder), repository, *(("--license", license) if license else ())]
    safe = f"the checkpoint is safe at {folder}; push it with: {shlex.join(command)}"
    try:
        license = _check_locally(folder, repository, MAIN, license, writes=True)
        _verify(folder)
        planned = _plan(folder, repository, MAIN, False, license, None, True, False)
        return _carry_out(planned, False, False, False)
    except UpcycleError as error:
        raise type(error)(f"{error}\nIt was not pushed, but {safe}") from error
    except KeyboardInterrupt:
        output.error(f"interrupted; {safe}")
        raise output.Stopped from None


def _check_locally(folder: Path, repository: str, branch: str, license: str | None, writes: bool) -> str | None:
    """Refuse what can be refused at once; the licence that is stated: the one given, or the folder's own card's."""
    from upcycle.hub_account import check_name, check_token
    from upcycle.licenses import check_licenses
    from upcycle.push_plan import read_provenance, stated_license

    check_name(repository, branch)
    provenance = read_provenance(folder)
    license = license or stated_license(folder)
    check_licenses(provenance, license)
    check_token(writes)
    return license


def _verify(folder: Path) -> None:
    from upcycle.checkpoint import read_tensors
    from upcycle.errors import CheckpointError
    from upcycle.verify import verify

    size = sum(info.nbytes for info in read_tensors(folder).values())
    with output.byte_progress(f"verifying {folder}", size) as progress:
        found = verify(folder, progress=progress)
    if found.problems:
        more = [f"and {len(found.problems) - SHOWN} more; upcycle verify lists all"]
        shown = [*found.problems[:SHOWN], *(more if len(found.problems) > SHOWN else [])]
        raise CheckpointError("\n".join([f"{folder} is damaged, so nothing was pushed:", *shown]))
    if found.unsummed:
        output.note(f"{folder} has no checksums, so damage that leaves it loadable cannot be seen")


def _plan(
    folder: Path,
    repository: str,
    branch: str,
    private: bool,
    license: str | None,
    evaluation: Mapping[str, Any] | None,
    writes: bool,
    create_pr: bool,
) -> "Push":
    """Look at the Hub and compare, and say what the user should know."""
    from upcycle.errors import HubError
    from upcycle.hub_account import find_target
    from upcycle.push_plan import plan_push, result_files

    target = find_target(repository, branch, writes=writes, pull_request=create_pr)
    if target.name != repository:
        output.note(f"{repository} is now {target.name} on the Hub")
    if target.private is False and private:
        raise HubError(
            f"Hub repository {target.name} is public, and --private is for a new one; choose another, make it private "
            "on its page, or leave --private out"
        )
    if target.private and not private:
        output.note(f"Hub repository {target.name} is private and stays so")
    size = sum(file.stat().st_size for file in result_files(folder).values())
    with output.byte_progress(f"comparing with {target.name}", size) as progress:
        planned = plan_push(folder, target, license, evaluation, progress)
    if planned.left_out:
        names, more = planned.left_out[:SHOWN], len(planned.left_out) - SHOWN
        output.note(f"left out: {', '.join(names)}{f' and {more} more' if more > 0 else ''}")
    return planned


def _carry_out(planned: "Push", private: bool, create_pr: bool, yes: bool) -> "Pushed":
    from upcycle.push import carry_out

    if planned.replaces:
        _check_replacing(planned, create_pr, yes)
        output.note(f"{'if it is merged, ' if create_pr else ''}it replaces {planned.replaces}")
    sizes = planned.sizes
    with output.byte_progress(
        f"{planned.folder} → {planned.target.name}", sum(sizes[name] for name in planned.changed)
    ) as bar:
        done = carry_out(planned, private=private, pull_request=create_pr, progress=bar)
    if not done.made:
        output.note(f"Hub repository {done.repository} holds all of it already; no commit was made")
    return done


def _check_replacing(planned: "Push", create_pr: bool, yes: bool) -> None:
    from upcycle.push_plan import check_replacing, describe, read_provenance
    from upcycle.run_folder import RECORD

    if not yes:
        ours = describe(read_provenance(planned.folder), RECORD in planned.files)
        check_replacing(planned.target, planned.replaces, ours, create_pr)


def push_object(planned: "Push", done: "Pushed | None") -> dict[str, Any]:
    """What a push prints with `--json`; one that only looked gives the card as well."""
    sizes = planned.sizes
    return {
        "repository": planned.target.name,
        "branch": planned.target.branch,
        "url": done and done.url,
        "commit": done and done.commit,
        "committed": bool(done and done.made),
        "pull_request": bool(done and done.pull_request),
        "files": {name: sizes[name] for name in sorted(planned.files)},
        "changed": sorted(planned.changed),
        "changed_bytes": sum(sizes[name] for name in planned.changed),
        "deleted": list(planned.deleted),
        "left_out": list(planned.left_out),
        "replaces": planned.replaces,
        **({} if done else {"card": planned.card}),
    }


def _show_plan(planned: "Push", private: bool, create_pr: bool, yes: bool, as_json: bool) -> None:
    """What a push would do."""
    from upcycle.errors import HubError

    try:
        if planned.replaces:
            _check_replacing(planned, create_pr, yes)
    except HubError as error:
        output.warning(f"this push would be refused: {error}")
    if planned.target.user is None:
        output.note("there is no token, so private repositories are not seen; a push needs one: hf auth login")
    if as_json:
        output.data_object(push_object(planned, None))
        return
    sizes, changed = planned.sizes, {*planned.changed}
    there = planned.target.head.files if planned.target.head else {}
    states = {name: "changed" if name in there else "new" for name in changed}
    rows = [[name, f"{sizes[name]:,}", states.get(name, "already there")] for name in sorted(planned.files)]
    output.table(_place(planned.target, private, create_pr), ["file", "bytes", "state"], rows)
    sent = sum(sizes[name] for name in changed)
    output.data_line(
        f"To be uploaded: {len(changed)} of {len(sizes)} files, {output.size(sent)} of "
        f"{output.size(sum(sizes.values()))}; the rest is there already"
    )
    output.data_line(f"To be deleted: {', '.join(planned.deleted) or 'nothing'}")
    output.data_line(f"\nThe card, README.md:\n\n{output.printable(planned.card)}")


def _place(target: "Target", private: bool, create_pr: bool) -> str:
    if target.head is None:
        return f"{target.name}, a new {'private ' if private else ''}repository"
    if create_pr:
        return f"{target.name}, a new pull request"
    return f"{target.name}, {'new ' if target.new_branch else ''}branch {target.branch}"
