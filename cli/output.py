"""The only printer: results on stdout, everything else on stderr, progress on a terminal alone."""

import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress

    from upcycle.plan import MergePlan
    from upcycle.scaling import Cost, ParallelTraining


class Stopped(SystemExit):
    """The user ended the work, and was told what is left of it."""

    def __init__(self) -> None:
        super().__init__(130)


CARD = 80 * 10**9  # bytes of a common GPU
MAX_MESSAGE = 2000  # characters: a name in a message may come from a damaged file


def error(message: str) -> None:
    """What failed, on stderr; names from damaged files must not steer the terminal."""
    _message("error:", "1;31", message)


def warning(message: str) -> None:
    """What the user should know of, on stderr; the work goes on."""
    _message("warning:", "1;33", message)


def note(message: str) -> None:
    """What the user may like to know, on stderr."""
    _message("note:", "1;36", message)


def _message(label: str, style: str, message: str) -> None:
    if sys.stderr is None:
        return
    message = printable(message)
    if len(message) > MAX_MESSAGE:
        message = f"{message[:MAX_MESSAGE]}…"
    color = sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    sys.stderr.write((f"\x1b[{style}m{label}\x1b[0m " if color else f"{label} ") + message + "\n")


def is_first_process() -> bool:
    """Whether this process is the one that shows things, of those that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


def printable(text: str) -> str:
    """Text that cannot steer the terminal, newlines left in."""
    return "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in text)


def data_line(line: str) -> None:
    """A line of a result, on stdout."""
    sys.stdout.write(line + "\n")


def sentences(texts: Sequence[str]) -> None:
    """Sentences of a result as a list, on stdout; on a terminal lines break between words."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    grid = Table.grid(padding=(0, 1, 0, 0))
    for text in texts:
        if console.is_terminal:
            grid.add_row("-", Text(printable(text)))
        else:
            data_line(f"- {printable(text)}")
    if grid.rows:
        console.print(grid)


def data_object(value: Mapping[str, Any]) -> None:
    """The one object that `--json` prints, on stdout."""
    data_line(json.dumps(value, indent=2))


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table of numbers on stdout; every column but the first is aligned to the right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=box.SIMPLE_HEAD, header_style="bold", show_header=any(columns))
    for index, column in enumerate(columns):
        # Text is never taken for markup; figures that have no room are broken rather than cut off.
        grid.add_column(Text(printable(column)), justify="right" if index else "left", overflow="fold")
    for row in rows:
        grid.add_row(*(Text(printable(cell)) for cell in row))
    console = Console(width=width())
    console.print(Text(printable(title), style="bold"), soft_wrap=True)
    console.print(grid)


def width() -> int:
    """Columns that a table may take: the terminal's, or as many as it needs in a file."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else 10_000


def entries(rows: Sequence[tuple[str, str]]) -> None:
    """Names and what they are, one beside the other, each with an empty line below, on stdout."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 3, 0, 0))
    for name, text in rows:
        grid.add_row(Text(printable(name), style="bold"), Text(f"{printable(text)}\n"))
    Console().print(grid)


class Bar:
    """A progress bar: called with what was done since the last call."""

    def __init__(self, progress: "Progress", label: str, total: int, after: "Bar | None" = None) -> None:
        self._progress, self._task, self._after = progress, progress.add_task(label, total=total), after

    def __call__(self, count: int) -> None:
        if self._after:  # two bars would draw over one another
            self._after._progress.stop()
            self._after = None
        self._progress.start()
        self._progress.advance(self._task, count)


@contextmanager
def byte_progress(label: str, total: int) -> Iterator[Bar]:
    """A progress bar in bytes on stderr; silent where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal or not is_first_process()
    ) as progress:
        yield Bar(progress, label, total)


@contextmanager
def share_progress(label: str, total: int, after: Bar) -> Iterator[Bar]:
    """A progress bar in percent that takes the place of another when it is first called."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    hidden = not console.is_terminal or not is_first_process()
    progress = Progress(*columns, console=console, transient=True, disable=hidden)
    try:
        yield Bar(progress, label, total, after)
    finally:
        progress.stop()


def size(count: float) -> str:
    """Bytes as people read them, in powers of 1000 like a disk's."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def count(number: int) -> str:
    """A number of parameters as people say it."""
    for limit, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= limit:
            return f"{number / limit:.3g} {unit}"
    return str(number)


def cost_table(title: str, cost: "Cost", dense: "Cost | None", context: int) -> None:
    """A model's cost; for a mixture beside that of one seed."""
    names = {
        "total_parameters": "Parameters",
        "active_parameters": "Active per token",
        "flops_per_token": f"FLOPs per token (context {context})",
        "training_flops_per_token": "Training FLOPs per token",
        "checkpoint_bytes": "Weight files, bytes",
        "cache_bytes_per_token": "Cache per token, bytes (bf16)",
    }
    rows = []
    for key, name in names.items():
        mixed = asdict(cost)[key]
        row = [name, f"{mixed:,}"]
        if dense:
            one = asdict(dense)[key]
            row += [f"{one:,}", f"{mixed / one:.2f}"]
        rows.append(row)
    table(title, ["", "Mixture", "One seed", "Ratio"] if dense else ["", ""], rows)


def training_table(training: "ParallelTraining", sequences: int, sequence_length: int, precision: str) -> None:
    """What training takes of each of several GPUs, and which way of training fits a common one."""
    names = {
        "weights_bytes": "Weights",
        "gradients_bytes": "Gradients",
        "optimizer_bytes": "Optimizer",
        "activations_bytes": "Activations",
        "total_bytes": "Total, at the peak",
        "communication_bytes": "Sent per step",
    }
    ways = {"DDP": training.ddp, "FSDP2": training.fsdp2, "Expert parallel": training.expert_parallel}
    rows = [[name, *(size(way[key]) if key in way else "–" for way in ways.values())] for key, name in names.items()]
    gpus = f"{training.gpus} GPUs" if training.gpus > 1 else "1 GPU"
    shape = f"{sequences} × {sequence_length} tokens, {precision}, AdamW"
    table(f"Training on {gpus}, each: {shape} (estimated)", ["", *ways], rows)
    fitting = [name for name, way in ways.items() if way.get("total_bytes", CARD) < CARD]
    data_line(f"Fits a card of {size(CARD)}: {' and '.join(fitting) or 'neither'}")


def loading_lines(out: Path, remote_code: bool, eager: bool = False) -> list[str]:
    """The exact lines of Python that load a result; `eager` where the default does not compute its experts."""
    experts = ', experts_implementation="eager"' if eager else ""
    trust = ", trust_remote_code=True" if remote_code else ""
    path = json.dumps(str(out))  # quoted as Python reads it, too
    return [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        f"model = AutoModelForCausalLM.from_pretrained({path}{experts}{trust})",
        f"tokenizer = AutoTokenizer.from_pretrained({path}{trust})",
    ]


def result_object(plan: "MergePlan", out: Path, bytes_written: int, seconds: float) -> dict[str, Any]:
    """What a finished merge or extraction prints with `--json`."""
    return {
        "out": str(out),
        "format": plan.format,
        "model_type": plan.config["model_type"],
        "num_experts": plan.num_experts,
        "bytes_written": bytes_written,
        "seconds": round(seconds, 3),
    }
