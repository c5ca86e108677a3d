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
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from upcycle.checkpoint import (
    CONFIG,
    COPIED_FILES,
    INDEX,
    MODELING_FILES,
    PROVENANCE,
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
        if resume and not (self.out / RECORD).is_file():
            raise TrainingError(f"--resume: {self.out} holds no training ({RECORD} is missing); start without --resume")
        out = self.out.resolve()
        for path in (path.resolve() for path in inputs):
            if out == path or out in path.parents or path in out.parents:
                raise OutputError(f"output {self.out} and input {path} lie within one another; choose another --out")
        if resume and (self.out / CONFIG).is_file():
            raise TrainingError(f"--resume: the training in {self.out} is finished")
        try:
            if not resume:
                self._check_free(overwrite)
            self.out.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(self.out / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(f"another training is writing {self.out}; wait for it, or choose another --out") from None
        except OSError as error:
            raise OutputError(f"output {self.out} cannot be written: {error.strerror}; choose another --out") from error
        if not resume:
            self._clear()

    def close(self) -> None:
        """Let another training have the folder."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def _check_free(self, overwrite: bool) -> None:
        if not self.out.exists():
            return
        if not self.out.is_dir():
            raise OutputError(f"output {self.out} exists and is no folder; choose another --out")
        entries = [path for path in self.out.iterdir() if path.name != _LOCK]
        if not entries:
            return
        foreign = sorted(path.name for path in entries if not self._ours(path.name))
        if foreign or not (self.out / RECORD).is_file():
            holds = f"holds '{foreign[0]}'" if foreign else "is no training's folder"
            raise OutputError(f"output {self.out} exists and {holds}, so it is never overwritten; choose another --out")
        if not overwrite:
            raise OutputError(
                f"output {self.out} holds a training; --resume goes on with it, --yes overwrites it, --out chooses "
                "another folder"
            )

    @staticmethod
    def _ours(name: str) -> bool:
        ours = {RECORD, METRICS, TOKENS, CHECKPOINTS, TRACKERS, _LOCK, INDEX, *COMPANIONS}
        name = name.removeprefix(".").removesuffix(".partial") if name.endswith(".partial") else name
        return name in ours or (name.startswith("model") and name.endswith(".safetensors"))

    def _clear(self) -> None:
        for path in self.out.iterdir():
            if path.name != _LOCK:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def record(self) -> dict[str, Any]:
        """What `train.json` says."""
        return read_json(self.out / RECORD)

    def write_record(self, record: Mapping[str, Any]) -> None:
        """Write `train.json`."""
        temporary = self.out / f"{RECORD}.partial"
        write_json(temporary, record)
        temporary.replace(self.out / RECORD)

    def checkpoints(self) -> list[Path]:
        """Finished checkpoints, oldest first."""
        folder = self.out / CHECKPOINTS
        return sorted(folder.glob("step-*"), key=lambda path: int(path.name[5:])) if folder.is_dir() else []

    def checkpoint(self, step: int) -> Path:
        """The folder of a step's checkpoint."""
        return self.out / CHECKPOINTS / f"step-{step:06d}"

    def prune(self) -> None:
        """Remove all but the last checkpoints."""
        for folder in self.checkpoints()[:-KEPT]:
            shutil.rmtree(folder)

    def append(self, value: Mapping[str, Any]) -> None:
        """Add a line to the metrics."""
        with (self.out / METRICS).open("a", encoding="ascii") as file:
            file.write(json.dumps(value) + "\n")

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
