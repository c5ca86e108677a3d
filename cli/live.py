"""What a training shows while it runs: a live view on a terminal, nothing elsewhere but warnings."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from . import output

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

BARS = " ▁▂▃▄▅▆▇█"


@contextmanager
def training_view() -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A function to give every event of a training to; on a terminal it redraws a small table on stderr."""
    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=True)
    if not console.is_terminal or not output.is_first_process():
        yield lambda event: output.warning(event["message"]) if event["event"] == "warning" else None
        return
    view = _View()
    with Live(console=console, transient=True, refresh_per_second=4, get_renderable=view.render) as live:

        def watch(event: Mapping[str, Any]) -> None:
            if event["event"] == "warning":
                output.warning(event["message"])
            if event["event"] == "start":
                for name, reason in event["reasons"].items():
                    value = event["settings"][name]
                    live.console.print(f"{name.replace('_', ' ')} {value:.4g}: {reason}", highlight=False, markup=False)
                for sentence in event["acceleration"]:
                    live.console.print(sentence, highlight=False, markup=False)
            view.take(event)

        yield watch


class _View:
    """The last of each kind of event, drawn as one small table."""

    def __init__(self) -> None:
        self.start: Mapping[str, Any] = {}
        self.step: Mapping[str, Any] = {}
        self.heldout: Mapping[str, Any] = {}
        self.note = "reading"
        self.rates: list[float] = []
        self.began = time.monotonic()

    def take(self, event: Mapping[str, Any]) -> None:
        """Remember an event."""
        kind = event["event"]
        if kind == "start":
            self.start, self.note, self.began = event, "measuring held-out loss", time.monotonic()
        elif kind == "tokens":
            self.note = f"tokenising {event['domain']}: {event['tokens']:,} tokens"
        elif kind == "step":
            self.step, self.note = event, ""
            self.rates = [*self.rates[-19:], event["tokens_per_second"]]
        elif kind == "eval":
            self.heldout = event
        elif kind == "checkpoint":
            self.note = f"saved step {event['step']}"

    def render(self) -> "Group":
        """The view as it stands."""
        from rich.console import Group
        from rich.text import Text

        if not self.step:
            return Group(Text(self.note))
        return Group(self._numbers(), self._loads(), Text(self.note))

    def _numbers(self) -> "Table":
        from rich.table import Table

        step, steps = self.step["step"], self.start["settings"]["steps"]
        rate = sorted(self.rates)[len(self.rates) // 2]
        left = (steps - step) * self.start["settings"]["batch_size"] * self.start["settings"]["sequence_length"] / rate
        grid = Table.grid(padding=(0, 2))
        grid.add_row("step", f"{step} / {steps}", "loss", f"{self.step['loss']:.4f}", "nll", f"{self.step['nll']:.4f}")
        flops = self.start.get("training_flops_per_token")
        peak = self.start.get("peak_flops")
        share = f" ({flops * rate / peak:.0%} of peak)" if flops and peak else ""
        grid.add_row(
            "tokens/s", f"{rate:,.0f}{share}", "left", _duration(left), "rate", f"{self.step['learning_rate']:.2e}"
        )
        losses = {name: values["loss"] for name, values in self.heldout.get("heldout", {}).items()}
        if losses:
            shown = "  ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
            grid.add_row("held out", f"{shown}  (step {self.heldout['step']})")
        return grid

    def _loads(self) -> "Table":
        """One column a layer, one row an expert: its share of the layer's tokens, and its gate in the attention."""
        from rich.table import Table
        from rich.text import Text

        grid = Table.grid(padding=(0, 2))
        for title, key in (("load", "load"), ("attention", "gates")):
            names = self.start["experts" if key == "load" else "groups"]
            columns = zip(*self.step.get(key, ()), strict=True)
            for expert, (name, shares) in enumerate(zip(names, columns, strict=False)):
                bars = "".join(BARS[min(len(BARS) - 1, round(share * (len(BARS) - 1)))] for share in shares)
                mean = sum(shares) / len(shares)
                grid.add_row(title if not expert else "", Text(output.printable(name)), bars, f"{mean:.0%}")
        return grid


def _duration(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
