"""What checkpoints and training runs say about themselves, read into plain data for a report.

A source is a folder: a checkpoint (a BAM mixture, one of transformers' own, a dense model), the folder of a training,
finished or not, or both at once.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from upcycle.checkpoint import CONFIG, PROVENANCE, read_json, read_tensors
from upcycle.errors import CheckpointError, SeedError, UpcycleError
from upcycle.inspect import Inspection, inspect_checkpoint
from upcycle.mixture import own_experts
from upcycle.numeric import Array
from upcycle.run_folder import CHECKPOINTS, METRICS, RECORD, RunFolder
from upcycle.verdict import short_names

NAN: Final = math.nan
_SCALARS: Final = ("tokens", "loss", "nll", "seconds", "tokens_per_second")


@dataclass(frozen=True)
class Routing:
    """What routers did at one time: by domain, `load` and `gates` `[L, N]`, entropies and own share `[L]`."""

    load: Mapping[str, Array]
    gates: Mapping[str, Array]
    entropy: Mapping[str, Array] = field(default_factory=dict)
    attention_entropy: Mapping[str, Array] = field(default_factory=dict)
    own_expert: Mapping[str, str] = field(default_factory=dict)
    own_share: Mapping[str, Array] = field(default_factory=dict)
    experts: Sequence[str] = ()
    groups: Sequence[str] = ()  # what the experts are, or were before each was split
    layers: Sequence[int] = ()  # numbers of those that have experts; empty where all have
    top_k: int = 1
    similarity: Mapping[str, Array] = field(default_factory=dict)  # [L, N, N]
    origin: str = ""

    @property
    def num_experts(self) -> int:
        """0 where nothing is known."""
        some = next(iter([*self.load.values(), *self.gates.values()]), None)
        return int(some.shape[1]) if some is not None else len(self.experts)


@dataclass
class Metrics:
    """A training's `metrics.jsonl`, one value a step; NaN where a value is missing or not finite.

    Attributes:
        columns: `tokens`, `loss`, `nll`, `seconds` and `tokens_per_second`, beside `steps`.
        skipped: steps that were not taken, and why.
        evaluations: the steps of evaluations, and their losses by domain.
        last: the last evaluation's domains as they were written, and its step.
        entropies: `entropy` and `attention_entropy` by layer of the first and the last step.
        damaged: numbers of lines that could not be read.
    """

    steps: list[int] = field(default_factory=list)
    columns: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in _SCALARS})
    skipped: dict[int, str] = field(default_factory=dict)
    evaluations: dict[int, dict[str, float]] = field(default_factory=dict)
    last: tuple[int, Mapping[str, Any]] = (0, {})
    entropies: dict[str, dict[str, Array]] = field(default_factory=dict)
    damaged: list[int] = field(default_factory=list)

    @property
    def domains(self) -> list[str]:
        """Those measured, in their order."""
        return list(dict.fromkeys(name for losses in self.evaluations.values() for name in losses))


@dataclass
class Source:
    """One folder's record.

    Attributes:
        label: its name on the page, unlike any other's.
        checkpoint: the folder with the weights: itself, or an unfinished training's last checkpoint; None if none.
        inspection: sizes and cost, where upcycle knows the family.
        parameters, weight_bytes: of the weight files, where it does not.
        training: what `train.json` says, or None for a checkpoint alone.
        training_flops: of the training, per token, at its sequence length; 0 where they are not known.
        notes: what could not be read, as sentences.
    """

    label: str
    folder: Path
    checkpoint: Path | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    inspection: Inspection | None = None
    parameters: int = 0
    weight_bytes: int = 0
    training_flops: int = 0
    training: Mapping[str, Any] | None = None
    metrics: Metrics = field(default_factory=Metrics)
    notes: list[str] = field(default_factory=list)

    @property
    def experts(self) -> list[str]:
        """Names of the experts, or numbers where they have none; empty for a dense model."""
        if self.inspection:
            return [clean(name) for name in self.inspection.experts]
        names = self.config.get("expert_names")
        if isinstance(names, list):
            return [clean(name) for name in names]
        count = next((self.config[key] for key in ("num_local_experts", "num_experts") if self.config.get(key)), 0)
        return [str(index) for index in range(count)] if isinstance(count, int) and 0 < count <= 4096 else []

    @property
    def groups(self) -> list[str]:
        """Names of what the experts are, or were before each was split."""
        return [clean(name) for name in self.inspection.groups] if self.inspection else self.experts

    @property
    def layers(self) -> list[int]:
        """The layers that have experts; empty where that is not known."""
        return self.inspection.layers if self.inspection else []

    @property
    def top_k(self) -> int:
        """FFN experts a token uses."""
        value = self.config.get("num_experts_per_tok")
        return value if isinstance(value, int) and value > 0 else 1


def read_sources(folders: Sequence[Path]) -> list[Source]:
    """Read every folder.

    Raises:
        CheckpointError: one is neither a checkpoint nor a training's folder, or a checkpoint that is damaged.
    """
    labels = name_apart([str(folder) for folder in folders])
    return [_read_source(label, folder) for label, folder in zip(labels, folders, strict=True)]


def name_apart(paths: Sequence[str]) -> list[str]:
    """The names that the verdict uses, too; a path given twice keeps one."""
    names = short_names(paths)
    return [clean(names[path]) for path in paths]


def clean(text: object) -> str:
    """Text without control characters, which no page and no picture shows."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in str(text))


def shorten(text: str, limit: int = 64) -> str:
    """Text of at most `limit` characters, cut in its middle, since names of one kind often differ at their ends."""
    if len(text) <= limit:
        return text
    tail = (limit - 1) // 2
    return f"{text[: limit - 1 - tail]}…{text[-tail:]}"


def _read_source(label: str, folder: Path) -> Source:
    source = Source(label, folder)
    has_record, has_config = (folder / RECORD).is_file(), (folder / CONFIG).is_file()
    if not has_record and not has_config:
        found = "is no folder" if not folder.is_dir() else f"holds neither {CONFIG} nor {RECORD}"
        raise CheckpointError(
            f"{folder} {found}; a report needs folders of checkpoints or of trainings (the --out of `upcycle merge` "
            "or `upcycle train`)"
        )
    if has_record:
        try:
            source.training = read_json(folder / RECORD)
        except CheckpointError as error:
            source.training = {}
            source.notes.append(str(error))
        source.metrics = read_metrics(folder / METRICS)
        _note_damage(source)
    source.checkpoint = folder if has_config else _last_checkpoint(folder)
    if source.training is not None and not has_config:
        where = f"shown is {CHECKPOINTS}/{source.checkpoint.name}" if source.checkpoint else "it saved nothing yet"
        source.notes.append(f"the training is not finished; {where}.")
    if source.checkpoint:
        try:
            _read_model(source, source.checkpoint)
        except UpcycleError as error:
            if source.training is None:
                raise
            source.notes.append(f"the checkpoint cannot be read: {error}")
    return source


def _last_checkpoint(folder: Path) -> Path | None:
    whole = [path for path in RunFolder(folder).checkpoints() if (path / CONFIG).is_file()]
    return whole[-1] if whole else None


def _read_model(source: Source, folder: Path) -> None:
    source.config = read_json(folder / CONFIG)
    source.provenance = read_json(folder / PROVENANCE) if (folder / PROVENANCE).is_file() else {}
    try:
        source.inspection = inspect_checkpoint(folder)
    except SeedError:  # a family that cannot be merged, such as one of transformers' own mixtures
        tensors = read_tensors(folder).values()
        source.parameters = sum(math.prod(info.shape) for info in tensors)
        source.weight_bytes = sum({info.file: info.file.stat().st_size for info in tensors}.values())
        return
    settings = (source.training or {}).get("settings")
    length = settings.get("sequence_length") if isinstance(settings, dict) else None
    if isinstance(length, int):
        from upcycle.training_settings import read_facts  # which imports torch, and a model card of a merge has no time

        source.training_flops = read_facts(folder).training_flops(length) or 0


def _note_damage(source: Source) -> None:
    damaged = source.metrics.damaged
    if damaged:
        some = ", ".join(map(str, damaged[:5])) + (" …" if len(damaged) > 5 else "")
        lines = (
            f"line {some} is damaged and was"
            if len(damaged) == 1
            else f"{len(damaged)} lines ({some}) are damaged and were"
        )
        source.notes.append(f"{METRICS}: {lines} left out.")
    if not source.metrics.steps and not source.metrics.evaluations:
        source.notes.append(f"{METRICS} holds no step yet, so there are no curves of it.")


def read_metrics(file: Path) -> Metrics:
    """Read a training's metrics line by line; what is missing or damaged is left out and counted."""
    metrics = Metrics()
    rows: dict[int, list[float]] = {}
    first: Mapping[str, Any] | None = None
    last: Mapping[str, Any] = {}
    for number, line in _lines(file):
        value = _object(line)
        step = value.get("step")
        if type(step) is not int or step < 0:
            metrics.damaged.append(number)
        elif isinstance(value.get("heldout"), dict):
            domains = {clean(name): part for name, part in value["heldout"].items() if isinstance(part, dict)}
            metrics.evaluations[step] = {name: as_number(part.get("loss")) for name, part in domains.items()}
            metrics.last = (step, domains)
        else:
            rows[step] = [as_number(value.get(name)) for name in _SCALARS]
            if value.get("skipped"):
                metrics.skipped[step] = clean(value["skipped"])
            first, last = first or value, value
    metrics.steps = sorted(rows)  # a resumed training may have written a step twice; the later one counts
    metrics.columns = {name: [rows[step][i] for step in metrics.steps] for i, name in enumerate(_SCALARS)}
    metrics.evaluations = dict(sorted(metrics.evaluations.items()))
    for key in ("entropy", "attention_entropy"):
        shown = {f"step {value['step']}": as_array(value.get(key), 1) for value in (first or {}, last) if value}
        metrics.entropies[key] = {name: layers for name, layers in shown.items() if layers is not None}
    return metrics


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with file.open("rb") as handle:
            yield from ((number, line) for number, line in enumerate(handle, 1) if line.strip())
    except OSError:  # not written yet: the page says that there are no curves
        return


def _object(line: bytes) -> Mapping[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def as_number(value: object) -> float:
    """A finite number, or NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return NAN
    try:
        return float(value) if math.isfinite(value) else NAN
    except OverflowError:
        return NAN


def as_array(value: object, dimensions: int) -> Array | None:
    """Nested lists of numbers as an array, null as NaN; None where they are anything else."""
    try:
        array = np.asarray(value, np.float64)
    except (TypeError, ValueError, OverflowError):
        return None
    return np.where(np.isfinite(array), array, np.nan) if array.ndim == dimensions and array.size else None


def recorded_routing(source: Source) -> Routing | None:
    """The routing of a training's last evaluation, or None."""
    step, domains = source.metrics.last
    load = _by_domain(domains, "load", 2)
    gates = _by_domain(domains, "gates", 2)
    entropies = source.metrics.entropies
    if not load and not gates and not any(entropies.values()):
        return None
    experts, groups = source.experts, source.groups
    own = {name: name for name, shares in load.items() if name in groups and len(experts) == shares.shape[1]}
    numbers = {name: own_experts(experts, groups, name) for name in own}
    return Routing(
        load=load,
        gates=gates,
        entropy=entropies.get("entropy", {}),
        attention_entropy=entropies.get("attention_entropy", {}),
        own_expert=own,
        own_share={
            name: load[name][:, list(chosen)].sum(1) * source.top_k / len(chosen) for name, chosen in numbers.items()
        },
        experts=experts,
        groups=groups,
        layers=source.layers,
        top_k=source.top_k,
        origin=f"Recorded by the training on its held-out text at step {step}; entropies are those of the steps named.",
    )


def measured_routing(value: Mapping[str, Any]) -> Routing:
    """The routing that an evaluation of one model measured."""
    domains = {clean(name): part for name, part in value["domains"].items()}
    own = {name: clean(part["own_expert"]) for name, part in domains.items() if part.get("own_expert") is not None}
    similarity = {key: as_array(layers, 3) for key, layers in (value.get("similarity") or {}).items()}
    return Routing(
        load=_by_domain(domains, "load", 2),
        gates=_by_domain(domains, "gates", 2),
        entropy=_by_domain(domains, "entropy", 1),
        attention_entropy=_by_domain(domains, "attention_entropy", 1),
        own_expert=own,
        own_share={name: shares for name, shares in _by_domain(domains, "own_share", 1).items() if name in own},
        experts=[clean(name) for name in value.get("experts", ())],
        groups=[clean(name) for name in value.get("groups", ())],
        layers=[layer for layer in value.get("layers", ()) if type(layer) is int],
        top_k=int(value.get("top_k") or 1),
        similarity={key: layers for key, layers in similarity.items() if layers is not None},
        origin="Measured on the evaluation's held-out text.",
    )


def _by_domain(domains: Mapping[str, Any], key: str, dimensions: int) -> dict[str, Array]:
    """One array a domain, of those that have one of the shape of the first."""
    found = {name: as_array(part.get(key), dimensions) for name, part in domains.items()}
    arrays = {name: array for name, array in found.items() if array is not None}
    shape = next((array.shape for array in arrays.values()), None)
    return {name: array for name, array in arrays.items() if array.shape == shape}
