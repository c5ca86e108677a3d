"""The place of an output: what may be replaced there, and the locked folder beside it, renamed when all is written."""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from upcycle.checkpoint import CARD, CONFIG, COPIED_FILES, INDEX, MODELING_FILES, PROVENANCE, SUMS
from upcycle.errors import OutputError


def check_target(out: Path, overwrite: bool, sources: Sequence[Path]) -> None:
    """Refuse an output folder that must not be written.

    Raises:
        OutputError: it exists (and is no result of upcycle, or `overwrite` is not given), or lies within a source.
    """
    try:
        _check_target(out, overwrite, sources)
    except (OSError, RuntimeError) as error:
        raise OutputError(f"output {str(out)[:200]} cannot be reached: {error}; choose another --out") from error


def _check_target(out: Path, overwrite: bool, sources: Sequence[Path]) -> None:
    target = out.resolve()
    if target == Path.cwd() or os.path.ismount(target):
        raise OutputError(
            f"output {out} is the working folder or a mount point, which cannot be replaced; name a folder in it"
        )
    for source in sources:
        if target == source.resolve() or source.resolve() in target.parents or target in source.resolve().parents:
            raise OutputError(f"output {out} and input {source} lie within one another; choose another --out")
    if _old(target).exists():
        _repair(target)
    if not out.exists():
        return
    if not out.is_dir():
        raise OutputError(f"output {out} exists and is no folder; choose another --out")
    if not any(out.iterdir()):
        return
    foreign = sorted(path.name for path in out.iterdir() if not is_part(path))
    if foreign or not (out / PROVENANCE).is_file():
        holds = f"holds '{foreign[0]}'" if foreign else "is no result of upcycle"
        raise OutputError(f"output {out} exists and {holds}, so it is never overwritten; choose another --out")
    if not overwrite:
        raise OutputError(f"output {out} exists; --yes overwrites it, --out chooses another folder")


def is_part(file: Path) -> bool:
    """Whether a file is, by its name, one of those that a result of upcycle consists of."""
    ours = {INDEX, CONFIG, PROVENANCE, SUMS, CARD, *COPIED_FILES, *MODELING_FILES}
    return file.name in ours or file.match("model*.safetensors")


@contextmanager
def staging(out: Path, check: Callable[[], None] = lambda: None, resumable: bool = False) -> Iterator[Path]:
    """A folder beside `out` to write into, renamed to `out` when the block ends well and removed when it does not.

    `check` runs once more just before the renaming: somebody may have put something at `out` meanwhile. If `resumable`,
    the block finds what a killed or interrupted one before it left, else an empty folder.

    Raises:
        OutputError: the folder cannot be made, or another process is writing it.
    """
    out = out.resolve()
    partial = partial_folder(out)
    if partial.is_symlink():
        raise OutputError(f"{partial} is a link, and what it leads to is not emptied; remove it")
    made = [folder for folder in out.parents if not folder.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = _locked(partial)
    except OSError as error:
        raise OutputError(f"{partial} cannot be made: {error.strerror}") from error
    try:
        _restore(out)
        if not resumable:
            empty(partial)  # of a killed run's remains
        yield partial
        for file in partial.iterdir():
            if file.is_file():
                _sync(file)
        os.fsync(lock)
        check()
        _replace(partial, out)
    except BaseException as error:
        if _is_at(lock, partial) and not (resumable and isinstance(error, KeyboardInterrupt)):
            shutil.rmtree(partial, ignore_errors=True)
            with suppress(OSError):  # somebody else may have put something there
                for folder in made:
                    folder.rmdir()
        raise
    finally:
        os.close(lock)


def _locked(partial: Path) -> int:
    """A descriptor of the folder, made and locked; the lock ends with it, or with the process.

    Raises:
        OutputError: another process holds it.
    """
    while True:
        partial.mkdir(exist_ok=True)
        lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            raise OutputError(f"another process is writing {partial}; wait for it, or choose another --out") from None
        if _is_at(lock, partial):
            return lock
        os.close(lock)  # whoever held it has just put it in its place; another one may be there already


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether a path still leads to what is open."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except OSError:
        return False


def _sync(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def empty(folder: Path) -> None:
    """Remove what a folder holds."""
    for stale in folder.iterdir():
        remove(stale)


def remove(path: Path) -> None:
    """Remove a file or a folder with all that it holds; of a link the link."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def partial_folder(out: Path) -> Path:
    """Where the output of `out` is written until it is whole."""
    return out.resolve().parent / f".{out.name}.upcycle-partial"


def _replace(partial: Path, out: Path) -> None:
    """Put the new result in the place of a former one, which comes back should that fail."""
    old = _old(out)
    if out.exists():
        out.rename(old)
    try:
        partial.rename(out)
    except BaseException:
        _restore(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _old(out: Path) -> Path:
    return out.parent / f".{out.name}.upcycle-old"


def _restore(out: Path) -> None:
    """Finish what a kill between the two renames left: the former result back, or gone if the new one stands."""
    old = _old(out)
    if not old.exists():
        return
    if out.is_dir() and not any(out.iterdir()):
        out.rmdir()  # somebody made it since
    if out.exists():
        shutil.rmtree(old, ignore_errors=True)  # its last holder may still be at it
    else:
        old.rename(out)


def _repair(out: Path) -> None:
    """Put a former result back that a killed overwrite left aside; not while another process is at it."""
    with suppress(OutputError, OSError):
        lock = _locked(partial_folder(out))
        try:
            _restore(out)
            with suppress(OSError):  # what a killed merge wrote stays
                partial_folder(out).rmdir()
        finally:
            os.close(lock)


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk that holds `folder`, or would hold it once made."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def allocated_bytes(folder: Path) -> int:
    """Bytes of the disk that a folder's files take, which may be sparse; 0 where there is no folder."""
    total = 0
    with suppress(OSError):  # another process may be putting it in its place
        for file in folder.iterdir():
            total += 512 * file.lstat().st_blocks
    return total
