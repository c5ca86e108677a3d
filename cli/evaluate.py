"""`upcycle eval`: models measured on held-out text, and what that says."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import Annotated, Any, Literal

import typer

from . import output
from .fetch import fetched_by_name
from .merge import Json
from .train import ExpertsBackend

Data = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        metavar="NAME=FILE ...",
        help="Held-out data by domain: .jsonl, .parquet, .txt (as in train), .npy tokens (a row is a window, a flat "
        "run is cut), or a Hub dataset. A domain named like an expert is that expert's own.",
    ),
]
Base = Annotated[
    str | None, typer.Option(help="The ancestor of the specialists, where it is none of the mixture's experts.")
]
Windows = Annotated[
    int | None, typer.Option(min=1, help="Windows of each domain, evenly spaced; all of them by default.")
]


def evaluate(
    models: Annotated[
        list[str], typer.Argument(help="Folders or Hub names of mixtures and dense models.", metavar="MODEL ...")
    ],
    data: Data = None,
    base: Base = None,
    sequence_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens a window; what the models have positions for, at most 2048.")
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            min=1, help="Begin a window every so many tokens and count what is new in it; else windows do not overlap."
        ),
    ] = None,
    windows: Windows = None,
    batch_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens a forward; by device and vocabulary if not given.")
    ] = None,
    precision: Annotated[
        Literal["bf16", "fp32"] | None, typer.Option(help="Of weights and products; bf16 on a GPU, else fp32.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; a GPU where there is one.")] = None,
    experts_backend: ExpertsBackend = "auto",
    tasks: Annotated[
        list[str] | None,
        typer.Option("--tasks", metavar="TASK ...", help="Downstream tasks of lm-eval (the extra `tasks`), or .yaml."),
    ] = None,
    task_limit: Annotated[int | None, typer.Option(min=1, help="Documents of each task; all of them.")] = None,
    few_shot: Annotated[
        int | None, typer.Option(min=0, help="Examples before each task's question; the task's own number.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure models on held-out text, compare them, and say whether a mixture was worth it.

    Every further MODEL is compared: a mixture's seeds and their plain average are recognised as such.

    Example: upcycle eval bam-3x code law math --data code=held/code.jsonl law=held/law.jsonl
    """
    from upcycle.data import split_names
    from upcycle.errors import DataError

    if not (data or tasks):
        raise DataError("nothing to measure: give --data NAME=FILE ..., --tasks TASK ..., or both")
    if not tasks and (task_limit or few_shot is not None):
        raise typer.BadParameter("--task-limit and --few-shot say how --tasks are run, and none is given")
    if not data and (sequence_length or stride or windows):
        raise typer.BadParameter("--sequence-length, --stride and --windows say how --data is read, and none is given")
    sources = split_names("--data", data or [])

    from upcycle.comparison import evaluate_models
    from upcycle.evaluation_inputs import EvaluationOptions

    with fetched_by_name([*models, *([base] if base else [])]) as folders, window_progress() as progress:
        options = EvaluationOptions(
            models=[folders[model] for model in models],
            data=sources,
            base=folders[base] if base else None,
            sequence_length=sequence_length,
            stride=stride,
            windows=windows,
            batch_tokens=batch_tokens,
            precision=precision,
            experts_backend=experts_backend,
            device=device,
            tasks=tasks or [],
            task_limit=task_limit,
            few_shot=few_shot,
        )
        result = evaluate_models(options, progress)
    called = {folder: source for source, folder in folders.items()}
    result["models"] = {called[folder]: entry for folder, entry in result["models"].items()}
    if as_json:
        output.data_object(result)
    else:
        show_evaluation(result)


@contextmanager
def window_progress() -> Iterator[Callable[[str, str, int, int], None]]:
    """A bar of the windows measured, on stderr; silent where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading", total=None)

        def show(model: str, domain: str, done: int, total: int) -> None:
            name = output.printable(f"{Path(model).name} {domain}")
            bar.update(task, description=name, completed=done, total=total)

        yield show


def show_evaluation(result: Mapping[str, Any]) -> None:
    """Tables of models by domains, the routing of mixtures, and the verdict."""
    from upcycle.verdict import short_names

    models = result["models"]
    names = short_names(list(models))
    domains = list(next(iter(models.values()))["domains"])
    if domains:
        if result["measure"] == "loss":
            show_losses(result)
            _plain_table("Perplexity", models, names, domains, "perplexity", 2)
        bits = [entry["domains"][domain]["bits_per_byte"] for entry in models.values() for domain in domains]
        if None not in bits:
            _plain_table("Bits per byte", models, names, domains, "bits_per_byte", 4)
    for model, entry in models.items():
        if "routing" in entry:
            _routing_table(names[model], entry["routing"])
    _task_table(models, names)
    show_verdict(result)


def show_verdict(result: Mapping[str, Any]) -> None:
    """What follows from the figures, sentence by sentence."""
    output.sentences(result["verdict"])


def show_losses(result: Mapping[str, Any]) -> None:
    """Loss with half the width of its interval; the best of each column has a star."""
    from upcycle.verdict import short_names

    models, rows = result["models"], []
    names = short_names(list(models))
    domains = list(next(iter(models.values()))["domains"])
    columns = {domain: [entry["domains"][domain]["loss"] for entry in models.values()] for domain in domains}
    means = [entry["mean_loss"] for entry in models.values()]
    room = output.width() - max(map(len, names.values())) - 30
    beside = " " if room >= 16 * len(domains) else "\n"  # else some cells would be broken and others not
    for row, (model, entry) in enumerate(models.items()):
        cells = []
        for domain in domains:
            found = entry["domains"][domain]
            spread = f"{beside}±{(found['ci95'][1] - found['ci95'][0]) / 2:.3f}" if found["ci95"] else ""
            cells.append(f"{_starred(columns[domain], row, 3)}{spread}")
        rows.append([names[model], *cells, _starred(means, row, 3), _short_role(entry["role"], names[model])])
    output.table("Held-out loss, nats per token (± 95%; * best)", ["model", *domains, "mean", ""], rows)


def _short_role(role: str, name: str) -> str:
    """What a model is to the mixture, without what its name says already."""
    return {"dense": "", f"seed {name}": "seed"}.get(role, role)


def _plain_table(
    title: str, models: Mapping[str, Any], names: Mapping[str, str], domains: Sequence[str], key: str, digits: int
) -> None:
    rows = {model: [_finite(entry["domains"][domain][key]) for domain in domains] for model, entry in models.items()}
    mean = geometric_mean if key == "perplexity" else fmean  # the exponential of the mean loss, whose order it keeps
    columns = list(zip(*([*row, mean(row)] for row in rows.values()), strict=True))
    table = [
        [names[model], *(_starred(column, index, digits) for column in columns)] for index, model in enumerate(rows)
    ]
    output.table(title, ["model", *domains, "mean"], table)


def _starred(column: Sequence[float], row: int, digits: int) -> str:
    shown = [f"{value:.{digits}f}" for value in column]
    return f"{'*' if len(column) > 1 and shown[row] == min(shown, key=float) else ''}{shown[row]}"


def _finite(value: float | None) -> float:
    """What JSON leaves out is beyond all numbers."""
    return math.inf if value is None else value


def _routing_table(name: str, routing: Mapping[str, Any]) -> None:
    """How tokens of each domain fall to the experts, as means over layers."""
    experts = routing["experts"]
    groups = routing.get("groups") or experts
    shards = len(experts) // len(groups)
    rows = []
    for domain, found in routing["domains"].items():
        for title, key in (("FFN load", "load"), ("attention gate", "gates")):
            if key in found:
                layers = found[key]
                shares = [sum(column) / len(layers) for column in zip(*layers, strict=True)]
                if key == "load":  # of experts that were split, their parts together
                    shares = [sum(shares[first : first + shards]) for first in range(0, len(shares), shards)]
                # Experts that were added have no attention.
                cells = [f"{share:.1%}" for share in shares] + ["–"] * (len(groups) - len(shares))
                rows.append([f"{domain}, {title}", *cells])
    output.table(f"What {name} routes where (mean over layers)", ["", *groups], rows)


def _task_table(models: Mapping[str, Any], names: Mapping[str, str]) -> None:
    found = {model: entry["tasks"] for model, entry in models.items() if "tasks" in entry}
    metrics = {
        (task, metric): None
        for tasks in found.values()
        for task, values in tasks.items()
        for metric in values
        if metric != "samples" and not metric.endswith("_stderr")
    }
    rows = []
    for task, metric in metrics:
        cells = []
        for tasks in found.values():
            value, error = tasks[task].get(metric), tasks[task].get(f"{metric}_stderr")
            cells.append("–" if value is None else f"{value:.4f}" + (f" ±{error:.4f}" if error is not None else ""))
        rows.append([f"{task} {metric}", *cells])
    if rows:
        output.table("Downstream tasks (± standard error)", ["", *(names[model] for model in found)], rows)
