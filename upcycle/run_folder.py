"""What a training leaves on disk, and how it is found again.

OUT/                    the finished checkpoint, loadable as the one that went in
    train.json          settings, data and why a default is what it is
    metrics.jsonl       one object a step and one an evaluation
    tokens/             tokenised text, kept until the end
    checkpoints/step-000060/                   a complete checkpoint of that step
                    training_state/            and what goes on from it: weights in fp32, optimizer, position, RNG
"""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from upcycle.checkpoint import (
    CARD,
    CONFIG,
    COPIED_FILES,
    INDEX,
    MODELING_FILES,
    PROVENANCE,
    SUMS,
    read_json,
    write_json,
)
from upcycle.errors import OutputError, TrainingError

RECORD: Final = "train.json"
METRICS: Final = "metrics.jsonl"
TOKENS: Final = "tokens"
CHECKPOINTS: Final = "checkpoints"
TRACKERS: Final = "trackers"
STATE: Final = "training_state"
PROGRESS: Final = "progress.json"
KEPT: Final = 2  # checkpoints
_LOCK: Final = ".lock"
# What a checkpoint takes over from the model that went in, byte for byte.
COMPANIONS: Final = (CONFIG, PROVENANCE, *COPIED_FILES, *MODELING_FILES)


class RunFolder:
    """One training's folder, locked from `open` to `close`, or the end of the process."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self._handle: int | None = None

    @property
    def tokens(self) -> Path:
        """Where tokenised text lies."""
        return self.out / TOKENS

    def open(self, resume: bool, overwrite: bool, inputs: Sequence[Path]) -> None:
        """Make the folder, or take up a former run's; call in one process.

        Args:
            inputs: files and folders that are read, none of which may lie in it.

        Raises:
            OutputError: it holds something that is not to be overwritten, cannot be written, or another run is at it.
            TrainingError: there is nothing to resume.
        """
        try:
            self._check_inputs(inputs)
            if resume:
                self._check_resumable()
            else:
                self._check_free(overwrite)
            self.out.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(self.out / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not resume:
                self._check_free(overwrite)  # another training may have ended meanwhile
                shutil.rmtree(self.tokens, ignore_errors=True)  # made from files that are still there
        except BlockingIOError:
            raise OutputError(f"another training is writing {self.out}; wait for it, or choose another --out") from None
        except (OSError, RuntimeError) as error:  # RuntimeError: links that lead to themselves
            raise OutputError(f"output {self.out} cannot be written: {error}; choose another --out") from error

    def begin(self, record: Mapping[str, Any]) -> None:
        """Put a new training in the place of a former one, all checks being done; its record goes last."""
        for path in sorted(self.out.iterdir(), key=lambda path: path.name == RECORD):
            if path.name not in (_LOCK, TOKENS, CARD):  # a card may hold what people wrote
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        temporary = self.out / f".{RECORD}.partial"
        write_json(temporary, record)
        temporary.replace(self.out / RECORD)

    def close(self) -> None:
        """Let another training have the folder."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def _check_inputs(self, inputs: Sequence[Path]) -> None:
        out = self.out.resolve()
        for path in (path.resolve() for path in inputs):
            if out == path or out in path.parents or path in out.parents:
                raise OutputError(f"output {self.out} and input {path} lie within one another; choose another --out")

    def _check_resumable(self) -> None:
        if not (self.out / RECORD).is_file():
            raise TrainingError(f"--resume: {self.out} holds no training ({RECORD} is missing); start without --resume")
        if (self.out / CONFIG).is_file():
            raise TrainingError(f"--resume: the training in {self.out} is finished")

    def _check_free(self, overwrite: bool) -> None:
        if not self.out.exists():
            return
        if not self.out.is_dir():
            raise OutputError(f"output {self.out} exists and is no folder; choose another --out")
        foreign = next(self._foreign(), None)
        if foreign:
            raise OutputError(
                f"output {self.out} exists and holds '{foreign}', so it is never overwritten; choose another --out"
            )
        if all(path.name in (_LOCK, TOKENS) for path in self.out.iterdir()):
            return  # nothing, or what a start that failed left
        record = read_json(self.out / RECORD) if (self.out / RECORD).is_file() else {}
        if "upcycle_version" not in record:
            raise OutputError(
                f"output {self.out} exists and is no training's folder, so it is never overwritten; choose another "
                "--out"
            )
        if not overwrite:
            raise OutputError(
                f"output {self.out} holds a training; --resume goes on with it, --yes overwrites it, --out chooses "
                "another folder"
            )

    def _foreign(self) -> Iterator[str]:
        """What lies in the folder and was not made by a training."""
        inside = {
            CHECKPOINTS: r"\.?step-\d+(\.upcycle-(partial|old))?",
            TOKENS: r"heldout|.*\.(tokens|counted|json)",
        }
        names = {RECORD, METRICS, TRACKERS, CARD, _LOCK, INDEX, SUMS, *COMPANIONS, *inside}
        for path in sorted(self.out.iterdir()):
            name = path.name.removeprefix(".").removesuffix(".partial") if path.suffix == ".partial" else path.name
            weights = re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors", name)
            if path.is_symlink() or not (name in names or weights):
                yield path.name
            elif name in inside and path.is_dir():
                yield from (f"{name}/{p.name}" for p in path.iterdir() if not re.fullmatch(inside[name], p.name))

    def record(self) -> dict[str, Any]:
        """What `train.json` says."""
        return read_json(self.out / RECORD)

    def checkpoints(self) -> list[Path]:
        """Finished checkpoints, oldest first."""
        folder = self.out / CHECKPOINTS
        found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
        return sorted(found, key=lambda path: int(path.name[5:]))

    def checkpoint(self, step: int) -> Path:
        """The folder of a step's checkpoint."""
        return self.out / CHECKPOINTS / f"step-{step:06d}"

    def prune(self) -> None:
        """Remove all but the last checkpoints."""
        for folder in self.checkpoints()[:-KEPT]:
            shutil.rmtree(folder)

    def append(self, value: Mapping[str, Any]) -> None:
        """Add a line to the metrics."""
        try:
            with (self.out / METRICS).open("a", encoding="ascii") as file:
                file.write(json.dumps(value, allow_nan=False) + "\n")
        except OSError as error:
            raise OutputError(f"{self.out / METRICS} cannot be written: {error.strerror}") from error

    def rewind(self, step: int) -> None:
        """Drop the metrics of steps after `step`, which a killed run wrote and a resumed one writes again."""
        file = self.out / METRICS
        kept = []
        for line in file.read_text(encoding="ascii", errors="replace").splitlines() if file.is_file() else ():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):  # the kill cut the last line
                continue
        temporary = self.out / f"{METRICS}.partial"
        temporary.write_text("".join(kept), encoding="ascii")
        temporary.replace(file)

    def finish(self, checkpoint: Path) -> None:
        """Put a checkpoint's files into the folder itself, the config last, and drop the tokens."""
        names = sorted((path.name for path in checkpoint.iterdir() if path.is_file()), key=lambda name: name == CONFIG)
        for name in names:
            temporary = self.out / f".{name}.partial"
            temporary.unlink(missing_ok=True)
            try:
                os.link(checkpoint / name, temporary)  # the same bytes under a second name: no space, no time
            except OSError:
                shutil.copyfile(checkpoint / name, temporary)
            temporary.replace(self.out / name)
        shutil.rmtree(self.tokens, ignore_errors=True)


def copy_companions(source: Path, out: Path) -> None:
    """Copy a checkpoint's config, code, tokenizer and provenance."""
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
