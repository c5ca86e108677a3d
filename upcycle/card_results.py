"""What a model card says of a checkpoint's training and evaluation."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from upcycle.errors import DataError
from upcycle.markdown import code, grid, listed, plain, table
from upcycle.report_tables import (
    loss_tables,
    number,
    quantity,
    recorded_table,
    settings_of,
    task_table,
)
from upcycle.run_records import Source, as_number, name_apart


def training(source: Source) -> str:
    """The training that left its record in the folder; empty where there is none."""
    if source.training is None:
        return ""
    settings, metrics = settings_of(source), source.metrics
    facts = [(name, value) for name, value in settings.facts if name not in ("trained from", "steps")]
    known = dict(settings.facts)
    version = source.training.get("upcycle_version")
    origin = f" from {code(known['trained from'])}" if source.training.get("model") else ""
    steps = f" for {plain(known['steps'])} steps" if "steps" in known else ""
    sentences = [f"Trained by upcycle{f' {plain(version)}' if version else ''}{origin}{steps}."]
    sentences += [*_amount(source), *_losses(source)]
    sentences += [plain(note.replace(f"{source.folder}{os.sep}", "")) for note in source.notes]
    parts = [" ".join(sentences), *map(table, settings.tables)]
    if metrics.evaluations:
        parts.append(table(recorded_table(source, "Held-out loss while training")))
    rows = [[plain(name), plain(value)] for name, value in facts]
    rows += [[f"{plain(name)}: why", plain(reason)] for name, reason in settings.reasons]
    if rows:
        parts.append(f"<details><summary>Settings</summary>\n\n{grid(['setting', 'value'], rows, 2)}\n\n</details>")
    return "\n\n".join(parts)


def _amount(source: Source) -> list[str]:
    """Steps and tokens as they were recorded, and what they cost."""
    metrics = source.metrics
    tokens = max((value for value in metrics.columns["tokens"] if math.isfinite(value)), default=math.nan)
    if not math.isfinite(tokens):
        return []
    flops = source.training_flops * tokens
    cost = f"; forward and backward cost {quantity(flops, 'FLOPs')} in all" if flops else ""
    taken = len(metrics.steps) - len(metrics.skipped)
    return [f"{taken:,} steps were taken and {len(metrics.skipped):,} skipped, on {int(tokens):,} tokens{cost}."]


def _losses(source: Source) -> list[str]:
    """The first and the last step's loss, where it was finite."""
    pairs = zip(source.metrics.steps, source.metrics.columns["nll"], strict=True)
    known = [(step, loss) for step, loss in pairs if math.isfinite(loss)]
    if len(known) < 2:
        return []
    (first, before), (last, after) = known[0], known[-1]
    return [
        f"The loss on its own text was {number(before)} nats per token at step {first:,}, and {number(after)} at step "
        f"{last:,}."
    ]


def find_evaluated(evaluation: Mapping[str, Any], source: Source, name: str) -> str:
    """Which of an evaluation's models is this checkpoint: the one of its fingerprint, at its place or of its name.

    Raises:
        DataError: none or several, one of other weights, or no evaluation at all.
    """
    models = evaluation.get("models")
    rows = models if isinstance(models, dict) else {}
    if not rows or not all(_is_row(row) for row in rows.values()):
        raise DataError("what is given as an evaluation is none; expected what `upcycle eval --json` prints")
    paths: list[str] = [path for path in rows if "\0" not in path]
    from upcycle.weights import checkpoint_fingerprint  # which imports torch

    own = checkpoint_fingerprint(source.folder)
    alike = [path for path in paths if rows[path].get("fingerprint") == own]
    if alike:
        return alike[0]
    here = os.path.realpath(source.folder)
    names = {name, name.rsplit("/", 1)[-1], os.path.basename(here)}
    same = [path for path in paths if os.path.realpath(path) == here]
    same = same or [path for path in paths if path in names or Path(path).name in names]
    if len(same) != 1:
        found = ", ".join(f"'{path[:80]}'" for path in list(rows)[:8])
        raise DataError(
            f"the evaluation is of {found}, and {len(same) or 'none'} of them may be {source.folder}; "
            f"measure it: upcycle eval {source.folder} … --json"
        )
    if rows[same[0]].get("fingerprint"):
        raise DataError(
            f"the evaluation's '{same[0][:80]}' had other weights than {source.folder} has now; measure them: upcycle "
            f"eval {source.folder} … --json"
        )
    routing = rows[same[0]].get("routing")
    experts = routing.get("experts") if isinstance(routing, dict) else []
    if source.inspection and experts != source.inspection.experts:
        raise DataError(
            f"the evaluation's '{same[0][:80]}' has the experts {experts or 'of none'}, and {source.folder} has "
            f"{source.inspection.experts or 'none'}, so it is another model; measure this one: upcycle eval "
            f"{source.folder} … --json"
        )
    return same[0]


def _is_row(row: Any) -> bool:
    domains = row.get("domains") if isinstance(row, dict) else None
    return isinstance(domains, dict) and all(isinstance(part, dict) for part in domains.values())


def evaluation_section(evaluation: Mapping[str, Any], path: str) -> str:
    """The losses of all models that were measured together, and what follows."""
    models = evaluation["models"]
    labels = dict(zip(models, name_apart(list(models)), strict=True))
    labels[path] += " (this model)"
    measured = any(row["domains"] for row in models.values())
    tables = [*(loss_tables(evaluation, labels) if measured else []), task_table(evaluation, labels)]
    verdict = evaluation.get("verdict")
    sentences = [f"- {plain(text)}" for text in verdict if isinstance(text, str)] if isinstance(verdict, list) else []
    parts = ["\n".join(sentences)] if sentences else []
    parts += [table(one) for one in tables if one.rows]
    sizes = [
        f"{plain(domain)}: {int(tokens):,} tokens in {int(documents):,} documents"
        for domain, part in models[path]["domains"].items()
        if math.isfinite(tokens := as_number(part.get("tokens")))
        and math.isfinite(documents := as_number(part.get("documents")))
    ]
    if sizes:
        parts.append(f"Measured on held-out text: {listed(sizes)}.")
    return "\n\n".join(parts)
