"""The tables of a report, from plain data: what was merged, what it costs, losses, speed, settings."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

import numpy as np

from upcycle.recipe_facts import expert_facts, mix_facts, router_facts
from upcycle.run_records import NAN, Routing, Source, as_number, clean
from upcycle.scaling import DEFAULT_CONTEXT

MISSING: Final = "–"


@dataclass(frozen=True)
class Cell:
    """One cell: its text, a smaller line under it, whether it is the best of its column."""

    text: str
    detail: str = ""
    best: bool = False


@dataclass(frozen=True)
class Table:
    """A table with a note on how to read it."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""
    text_columns: int = 1  # from the left; the rest are numbers, aligned to the right


@dataclass(frozen=True)
class Model:
    """What the page says of one source: its kind, facts by name, tables, and the paper's address."""

    title: str
    kind: str
    summary: str = ""
    paper: str = ""
    paper_url: str = ""
    facts: Sequence[tuple[str, str]] = ()
    tables: Sequence[Table] = field(default_factory=list)


@dataclass(frozen=True)
class Settings:
    """What a training was set to, the reasons of what was chosen for it, and its data."""

    title: str
    facts: Sequence[tuple[str, str]]
    reasons: Sequence[tuple[str, str]]
    tables: Sequence[Table]


def quantity(value: float, unit: str = "") -> str:
    """A number as people say it: `12.7 M`, `25.3 MFLOPs`, `4.1 kB`."""
    if not math.isfinite(value):
        return MISSING
    for limit, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "B" if not unit else "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return (
                f"{value / limit:.3g} {prefix}{unit}"
                if value / limit < 1000
                else f"{value / limit:,.0f} {prefix}{unit}"
            )
    return f"{value:.3g} {unit}".rstrip() if value != int(value) else f"{value:,.0f} {unit}".rstrip()


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if not math.isfinite(seconds):
        return MISSING
    if seconds < 120:
        return f"{seconds:.3g} s"
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60:02d} min" if hours else f"{rest // 60} min {rest % 60:02d} s"


def number(value: float, digits: int = 3, sign: bool = False) -> str:
    """A loss and its like; a dash for what is missing."""
    if not math.isfinite(value):
        return MISSING
    return f"{value:{'+' if sign else ''}.{digits}f}".replace("-", "\N{MINUS SIGN}")


def describe_all(sources: Sequence[Source]) -> list[Model]:
    """What the sources are; those of which the same is to be said, such as trainings of one mixture, together."""
    models: dict[str, Model] = {}
    for model in map(describe, sources):
        same = repr(replace(model, title=""))
        models[same] = replace(model, title=f"{models[same].title}, {model.title}") if same in models else model
    return list(models.values())


def describe(source: Source) -> Model:
    """What one source is, was made of and costs."""
    inspection, recipe = source.inspection, _table(source.provenance.get("recipe"))
    experts = source.experts
    mixed = bool(experts) or source.provenance.get("format") in ("bam", "native")
    kind = (
        f"mixture of {len(experts)} experts"
        if experts
        else "dense model"
        if source.checkpoint
        else "training without a checkpoint yet"
    )
    facts = []
    if inspection:
        facts.append(("Family", f"{inspection.family}, weights in {inspection.dtype}"))
    elif source.config.get("model_type"):
        facts.append(("Family", clean(source.config["model_type"])))
    if recipe.get("name"):
        facts.append(("Recipe", clean(recipe["name"])))
    if inspection and inspection.format == "native":
        facts.append(("Class", f"{clean(class_of(source))}, of transformers' own"))
    facts += mix_facts(_table(recipe.get("mix"))) + expert_facts(recipe) + router_facts(recipe)
    if mixed and not recipe:
        facts.append(("Routers", f"top {source.top_k} of {len(experts)} FFN experts"))
    extracted = source.provenance.get("extracted")
    if isinstance(extracted, dict):
        facts.append(("Extracted", f"expert {clean(extracted.get('expert'))}, {clean(extracted.get('name'))}"))
    paper = clean(recipe.get("paper") or "")
    known = paper.startswith("arXiv:") and paper[6:].replace(".", "").isalnum()
    tables = [table for table in (_seed_table(source), cost_table(source)) if table.rows]
    return Model(
        title=source.label,
        kind=kind,
        summary=clean(recipe.get("summary") or ""),
        paper=paper,
        paper_url=f"https://arxiv.org/abs/{paper[6:]}" if known else "",
        facts=facts,
        tables=tables,
    )


def class_of(source: Source) -> str:
    """The class that its config.json names."""
    named = source.config.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else str(source.config.get("model_type"))


def _table(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def percent(share: float) -> str:
    """A share in whole percent."""
    return f"{share:.0%}"


def _seed_table(source: Source) -> Table:
    seeds = source.provenance.get("seeds")
    records = [_table(seed) for seed in seeds] if isinstance(seeds, list) else []
    rows = [
        [
            Cell(clean(seed.get("name", MISSING))),
            Cell(clean(seed.get("revision") or MISSING)),
            Cell(clean(seed.get("license") or "not stated")),
            Cell(clean(seed.get("fingerprint") or MISSING)[:12]),
        ]
        for seed in records
    ]
    copied = len(source.groups) > 1 == len(records)
    split = "FFNs that were split" if len(source.groups) < len(source.experts) else "experts"
    note = f"Copied into each of the {len(source.groups)} {split}." if copied else ""
    return Table("Seeds", ["seed", "revision", "licence", "fingerprint"], rows, note, text_columns=4)


def cost_table(source: Source) -> Table:
    """Sizes and cost, of a mixture beside those of one seed; no rows where nothing is known."""
    inspection = source.inspection
    if inspection is None:
        if not source.parameters:
            return Table("", [], [])
        rows = [
            [Cell("Parameters"), Cell(quantity(source.parameters))],
            [Cell("Weight files"), Cell(quantity(source.weight_bytes, "B"))],
        ]
        note = "FLOPs are counted for the families that upcycle merges alone."
        return Table("Size and cost", ["", "this model"], rows, note)
    names = {
        "total_parameters": ("Parameters", ""),
        "active_parameters": ("Active per token", ""),
        "flops_per_token": ("Forward, per token", "FLOPs"),
        "training_flops_per_token": ("Training, per token", "FLOPs"),
        "checkpoint_bytes": ("Weight files", "B"),
        "cache_bytes_per_token": ("Cache, per token", "B"),
    }
    cost, dense = asdict(inspection.cost), asdict(inspection.dense)
    mixed = inspection.format != "dense"
    rows = []
    for key, (name, unit) in names.items():
        row = [Cell(name), Cell(quantity(cost[key], unit))]
        if mixed:
            row += [
                Cell(quantity(dense[key], unit)),
                Cell(f"{cost[key] / dense[key]:.2f}×" if dense[key] else MISSING),
            ]
        rows.append(row)
    columns = ["", "mixture", "one seed", "ratio"] if mixed else ["", "this model"]
    note = f"Counted from the headers; FLOPs at a context of {DEFAULT_CONTEXT:,} tokens, cache in bf16."
    return Table("Size and cost", columns, rows, note)


def loss_tables(evaluation: Mapping[str, Any], labels: Mapping[str, str]) -> list[Table]:
    """Losses, perplexities and bits per byte of the models evaluated; the measure that may be compared comes first."""
    models = {labels[path]: model for path, model in evaluation["models"].items()}
    domains = list(dict.fromkeys(name for model in models.values() for name in model["domains"]))
    in_bytes = evaluation.get("measure") == "bits_per_byte"

    def values(key: str) -> dict[str, list[float]]:
        return {
            label: [as_number(_table(model["domains"].get(name)).get(key)) for name in domains]
            for label, model in models.items()
        }

    halves = {
        label: [_half_interval(_table(model["domains"].get(name)).get("ci95")) for name in domains]
        for label, model in models.items()
    }
    roles = {label: clean(model.get("role") or "") for label, model in models.items()}
    means = {label: as_number(model.get("mean_loss")) for label, model in models.items()}
    losses, bits, perplexities = values("loss"), values("bits_per_byte"), values("perplexity")
    shown = [clean(name) for name in domains]
    marked = "★ marks the best of each column. " if len(models) > 1 else ""
    interval = "± is half of the 95 % interval." if any(half for row in halves.values() for half in row) else ""
    tables = [
        _measure_table(
            "Held-out loss, nats per token",
            shown,
            losses,
            lambda label, row: means[label],
            3,
            not in_bytes,
            "The models have different tokenizers, so these may not be compared with one another. " + interval
            if in_bytes
            else f"Lower is better. {marked}{interval}",
            halves,
            roles,
        )
    ]
    if any(math.isfinite(value) for row in bits.values() for value in row):
        note = f"Lower is better; comparable whatever the tokenizer. {marked if in_bytes else ''}"
        mean = _mean_of_row
        table = _measure_table("Held-out bits per byte", shown, bits, mean, 4, in_bytes, note)
        tables.insert(0 if in_bytes else 1, table)
    note = "The exponential of the loss, per token" + (": not to be compared here, either." if in_bytes else ".")
    return [*tables, _measure_table("Perplexity", shown, perplexities, None, 2, False, note)]


def _mean_of_row(label: str, row: Sequence[float]) -> float:
    return float(np.mean(row)) if row else NAN


def _half_interval(interval: object) -> str:
    if isinstance(interval, list | tuple) and len(interval) == 2:
        half = (as_number(interval[1]) - as_number(interval[0])) / 2
        return f"± {half:.3f}" if math.isfinite(half) else ""
    return ""


def _measure_table(
    title: str,
    domains: Sequence[str],
    values: Mapping[str, Sequence[float]],
    mean: Callable[[str, Sequence[float]], float] | None,
    digits: int,
    mark: bool,
    note: str,
    details: Mapping[str, Sequence[str]] | None = None,
    roles: Mapping[str, str] | None = None,
) -> Table:
    grid = {label: [*row, mean(label, row)] if mean else list(row) for label, row in values.items()}
    columns = ["model", *domains, *(["mean"] if mean else [])]
    best = [
        min((row[i] for row in grid.values() if math.isfinite(row[i])), default=NAN) for i in range(len(columns) - 1)
    ]
    rows = []
    for label, row in grid.items():
        small = [*(details[label] if details else []), *[""] * len(columns)]
        cells = [
            Cell(number(value, digits), small[i], mark and len(grid) > 1 and value == best[i])
            for i, value in enumerate(row)
        ]
        rows.append([Cell(label, (roles or {}).get(label, "")), *cells])
    return Table(title, columns, rows, note)


def task_table(evaluation: Mapping[str, Any], labels: Mapping[str, str]) -> Table:
    """What downstream tasks gave, one row a task and metric, one column a model."""
    models = {labels[path]: _table(model.get("tasks")) for path, model in evaluation["models"].items()}
    keys = list(
        dict.fromkeys(
            (task, metric) for tasks in models.values() for task, values in tasks.items() for metric in _table(values)
        )
    )
    rows = [
        [
            Cell(clean(task)),
            Cell(clean(metric)),
            *(Cell(number(as_number(_table(tasks.get(task)).get(metric)), 4)) for tasks in models.values()),
        ]
        for task, metric in keys
    ]
    return Table("Downstream tasks", ["task", "metric", *models], rows, text_columns=2)


def recorded_table(source: Source, title: str) -> Table:
    """The held-out loss that a training recorded, before, after and the change."""
    metrics = source.metrics
    steps = list(metrics.evaluations)
    rows: list[tuple[str, float, float]] = []
    for name in metrics.domains:
        rows.append((name, metrics.evaluations[steps[0]].get(name, NAN), metrics.evaluations[steps[-1]].get(name, NAN)))
    if len(rows) > 1:
        rows.append(("mean", float(np.mean([row[1] for row in rows])), float(np.mean([row[2] for row in rows]))))
    cells = [
        [Cell(name), Cell(number(old)), Cell(number(new)), Cell(number(new - old, sign=True))]
        for name, old, new in rows
    ]
    note = "Held-out loss, nats per token, as the training measured it; lower is better."
    if len(steps) < 2:
        only = [[row[0], row[1]] for row in cells]
        return Table(title, ["domain", f"step {steps[0]}" if steps else ""], only, note)
    columns = ["domain", f"step {steps[0]:,}", f"step {steps[-1]:,}", "change"]
    return Table(title, columns, cells, note)


def own_expert_table(routing: Routing) -> Table:
    """How often each domain's text meets the expert that came from it."""
    uniform = routing.top_k / max(1, routing.num_experts)
    rows = [
        [Cell(name), Cell(routing.own_expert[name]), Cell(f"{float(np.nanmean(shares)):.1%}"), Cell(f"{uniform:.1%}")]
        for name, shares in routing.own_share.items()
        if np.isfinite(shares).any()
    ]
    note = "Share of the tokens for which the FFN router picks the expert that came from the text's own domain"
    note += ", of one that was split the part that it picks." if len(routing.groups) < len(routing.experts) else "."
    columns = ["domain", "its expert", "mean over layers", "if uniform"]
    return Table("Own expert", columns, rows, note, text_columns=2)


def speed_table(sources: Sequence[Source]) -> Table:
    """Speed and totals of the trainings, one column each."""
    columns: list[list[str]] = []
    names = [
        "Steps taken",
        "Steps skipped",
        "Tokens",
        "Time in steps",
        "Step, median",
        "Speed, median",
        "Training FLOPs, per token",
        "Training FLOPs, total",
        "FLOPs per second, median",
    ]
    for source in sources:
        metrics = source.metrics
        seconds, rate = np.array(metrics.columns["seconds"]), np.array(metrics.columns["tokens_per_second"])
        tokens = max((value for value in metrics.columns["tokens"] if math.isfinite(value)), default=NAN)
        flops = float(source.training_flops) if source.training_flops else NAN
        median = float(np.nanmedian(rate)) if np.isfinite(rate).any() else NAN
        columns.append(
            [
                f"{len(metrics.steps) - len(metrics.skipped):,}",
                f"{len(metrics.skipped):,}",
                quantity(tokens),
                duration(float(np.nansum(seconds))),
                duration(float(np.nanmedian(seconds)) if np.isfinite(seconds).any() else NAN),
                f"{median:,.0f} tokens/s" if math.isfinite(median) else MISSING,
                quantity(flops, "FLOPs"),
                quantity(flops * tokens, "FLOPs"),
                quantity(flops * median, "FLOP/s"),
            ]
        )
    rows = [[Cell(name), *(Cell(column[i]) for column in columns)] for i, name in enumerate(names)]
    note = "FLOPs: forward and backward at the training's sequence length, recomputation not counted."
    return Table("", ["", *(source.label for source in sources)], rows, note)


def settings_of(source: Source) -> Settings:
    """What a training was set to, why, and what it read."""
    record = source.training or {}
    settings, data = _table(record.get("settings")), _table(record.get("data"))
    shares, epochs = _table(settings.get("shares")), _table(record.get("epochs"))
    reasons = _table(record.get("reasons"))
    rows = []
    for name, part in data.items():
        counts = _table(part)
        epoch, documents = as_number(epochs.get(name)), as_number(counts.get("documents"))
        share = as_number(shares.get(name))
        rows.append(
            [
                Cell(clean(name)),
                Cell(f"{share:.1%}" if math.isfinite(share) else MISSING),
                Cell(quantity(as_number(counts.get("tokens")))),
                Cell(f"{documents:,.0f}" if math.isfinite(documents) else MISSING),
                Cell(f"{epoch:.3g}×" if math.isfinite(epoch) else MISSING),
            ]
        )
    note = "Share of the batches; how often each token is seen over the whole training."
    return Settings(
        source.label,
        [("trained from", clean(record.get("model", MISSING)))]
        + [(clean(key).replace("_", " "), _setting(value)) for key, value in settings.items() if key != "shares"],
        [(clean(key).replace("_", " "), clean(reason)) for key, reason in reasons.items()],
        [Table("Data", ["domain", "share", "tokens", "documents", "seen"], rows, note)] if rows else [],
    )


def _setting(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: MISSING}[value]
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else clean(value)
