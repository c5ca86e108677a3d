"""Whether a checkpoint is what was written: files against their checksums, tensors against the plan, copies to the bit.

Every tensor is read once; sums, finite numbers and, with the seeds, the bytes that the plan makes of them are compared
as it passes.
"""

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from upcycle.assemble import Assembler
from upcycle.checkpoint import (
    CONFIG,
    COPIED_FILES,
    INDEX,
    ITEM_SIZE,
    MODELING_FILES,
    PROVENANCE,
    SUMS,
    TensorInfo,
    read_json,
    read_tensors,
)
from upcycle.checksums import STRETCH, TensorSum, file_sum, read_sums
from upcycle.dense_config import read_dense
from upcycle.errors import CheckpointError, UpcycleError
from upcycle.layout import make_layout
from upcycle.mixture import is_mixture, read_mixture, router_records
from upcycle.numeric import FLOATS, Array, first_not_finite
from upcycle.plan import MergePlan, plan_merge
from upcycle.planned import PlannedTensor
from upcycle.reader import Buffers, Reader
from upcycle.recipe_file import parse_recipe
from upcycle.scaling import DENSE
from upcycle.seeds import download, read_seeds
from upcycle.vocabulary import align, was_aligned

CHUNK: Final = 4 << 20  # bytes read at once
# What a loader might read, by name or by ending.
LOADED: Final = (CONFIG, INDEX, "adapter_config.json", *COPIED_FILES, *MODELING_FILES)
LOADED_ENDINGS: Final = (".safetensors", ".py", ".bin", ".pt", ".pth")


@dataclass
class Verification:
    """What was compared, and what is wrong.

    Attributes:
        files, tensors: how many were compared with a checksum; `unsummed` if there are no checksums.
        finite: tensors all of whose numbers are finite.
        remade: tensors that the seeds give to the bit; None without seeds.
        from_text: tensors that the seeds alone do not give: routers set from text, embeddings mixed by its tokens.
        loaded: whether one forward of the loaded model was finite; None if it was not tried.
        problems: in words, nothing if all is well.
    """

    folder: Path
    files: int = 0
    tensors: int = 0
    unsummed: bool = False
    finite: int = 0
    remade: int | None = None
    from_text: int = 0
    loaded: bool | None = None
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0


def verify(
    folder: Path, seeds: Sequence[str] = (), load: bool = False, progress: Callable[[int], None] = lambda _: None
) -> Verification:
    """Verify a checkpoint; what is wrong with it is in the result's `problems`.

    Args:
        folder: of a mixture or a dense model, merged or trained.
        seeds: what it was merged from, as in a merge: every tensor is made again and compared.
        load: whether transformers loads the model, and a forward gives finite numbers.
        progress: called with the number of bytes read since the last call.

    Raises:
        UpcycleError: there is no checkpoint, or a seed cannot be read.
    """
    began = time.monotonic()
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder} holds no {CONFIG}; expected the folder of a checkpoint")
    found = Verification(folder)
    sums, tensors, plan = None, None, None
    with _noting(found):
        sums = read_sums(folder)
        found.unsummed = sums is None
    if sums:
        _check_files(found, sums)
    with _noting(found):
        tensors = read_tensors(folder)
        _check_structure(folder, tensors)
    if tensors is not None:
        if seeds:
            plan = _remake(found, tensors, seeds)
        _check_tensors(found, tensors, sums, plan, progress)
    if load and not found.problems:
        found.loaded = _forward(found)
    found.seconds = time.monotonic() - began
    return found


@contextmanager
def _noting(found: Verification) -> Iterator[None]:
    """What a step refuses is a problem of the checkpoint, and the other steps go on."""
    try:
        yield
    except (UpcycleError, OSError) as error:
        found.problems.append(str(error))


def _check_files(found: Verification, sums: Mapping[str, Any]) -> None:
    """Every file that the checksums cover, and that there is none beside them which a loader would read."""
    covered = sums["files"]
    for name, expected in covered.items():
        file = found.folder / name
        if Path(name).name != name or not _is_plain(file):
            found.problems.append(f"{file} is missing, or no plain file")
            continue
        with _noting(found):
            actual = file_sum(file)
            found.files += actual == expected
            for what in ("size", *(set(expected) - {"size"})):
                if actual.get(what) != expected[what]:
                    part = {"size": "size", "header": "header's checksum", "sum": "checksum"}.get(what, what)
                    found.problems.append(f"{file}: its {part} is {actual.get(what)}, expected {expected[what]}")
                    break
    for file in sorted(found.folder.iterdir()):
        loaded = file.name in LOADED or file.suffix in LOADED_ENDINGS
        if loaded and file.name not in covered:
            found.problems.append(f"{file} is not among the files that {SUMS} covers; it came later")


def _is_plain(file: Path) -> bool:
    """Whether it is a file, or a link as the Hub's cache holds: from snapshots/COMMIT to blobs."""
    blobs = file.parent.parent.parent / "blobs"
    return file.is_file() and (not file.is_symlink() or file.resolve().parent == blobs.resolve())


def _check_structure(folder: Path, tensors: Mapping[str, TensorInfo]) -> None:
    """That names, shapes and types are those of the model that the config describes, where its family is known."""
    config = read_json(folder / CONFIG)
    if is_mixture(folder, config):
        expected = {tensor.name: tensor.shape for tensor in read_mixture(folder).layout.mixture}
    else:
        expected = dict(make_layout(read_dense(config, str(folder)), DENSE, 1).dense)
    for name, shape in expected.items():
        if name not in tensors:
            raise CheckpointError(f"{folder}: tensor '{name}' is missing")
        if tensors[name].shape != shape:
            raise CheckpointError(
                f"{folder}: tensor '{name}' has shape {list(tensors[name].shape)}, expected {list(shape)}"
            )
    for name in tensors:
        if name not in expected:
            raise CheckpointError(f"{folder}: tensor '{name}' is not part of the model that its config describes")


def _remake(found: Verification, tensors: Mapping[str, TensorInfo], seeds: Sequence[str]) -> MergePlan | None:
    """The plan by which the checkpoint was merged, from its provenance and its seeds."""
    record = read_json(found.folder / PROVENANCE)
    aligned = was_aligned(record)
    read = read_seeds(seeds, aligned)
    download(read, lambda _: None)
    alignment = align(read) if aligned else None
    try:
        table = dict(record["recipe"])
        recipe = parse_recipe(str(table.pop("name")), table)
        names, random_seed = [seed["name"] for seed in record["seeds"]], record["random_seed"]
        if [seed.name for seed in read] != names:
            found.problems.append(
                f"seeds {[seed.name for seed in read]} are given, but it was merged from {names}, in that order"
            )
            return None
        kinds = sorted({info.dtype for info in tensors.values()})
        groups = len(record["experts"]) // recipe.experts.granularity
        count = groups - recipe.experts.extra if recipe.copies else None
        text, template = record.get("router_text"), record.get("chat_template")
        for wanted in (None, *kinds):
            with suppress(UpcycleError):
                plan = plan_merge(
                    recipe,
                    read,
                    dtype=wanted,
                    num_experts=count,
                    random_seed=random_seed,
                    allow_unrelated=True,
                    text=text,
                    format="auto" if record["format"] == "dense" else record["format"],
                    alignment=alignment,
                    chat_template=template,
                )
                if plan.digest() == record["plan"]:
                    return plan
    except (KeyError, TypeError, ValueError) as error:
        found.problems.append(f"{found.folder / PROVENANCE} does not say how it was merged: {error!r}")
        return None
    found.problems.append(
        f"{found.folder}: these seeds do not give the plan that {PROVENANCE} records, {str(record.get('plan'))[:12]}…; "
        "a seed was changed since, or another version of upcycle merged it"
    )
    return None


def _check_tensors(
    found: Verification,
    tensors: Mapping[str, TensorInfo],
    sums: Mapping[str, Any] | None,
    plan: MergePlan | None,
    progress: Callable[[int], None],
) -> None:
    """Sums, finite numbers, and the bytes that the seeds give, tensor by tensor."""
    known = sums["tensors"] if sums else {}
    for name in sorted({*known} - {*tensors}):
        found.problems.append(f"{found.folder}: tensor '{name}' is missing")
    found.remade = None if plan is None else 0
    with ExitStack() as stack:
        made = _made_by(plan, stack, router_records(read_json(found.folder / PROVENANCE))) if plan else {}
        for name, info in tensors.items():
            with _noting(found):
                total, finite, same = _read(info, made.get(name), progress)
                if name in known:
                    _compare_sums(found, info, name, total.finish(), known[name])
                elif sums:
                    found.problems.append(f"{info.file}: tensor '{name}' is not among those that {SUMS} covers")
                found.finite += finite
                if not finite:
                    found.problems.append(f"{info.file}: tensor '{name}' holds numbers that are not finite")
                if plan and name not in made:
                    found.from_text += 1
                elif plan:
                    found.remade = (found.remade or 0) + same
                    if not same:
                        found.problems.append(f"{info.file}: tensor '{name}' is not what the seeds give")


def _made_by(plan: MergePlan, stack: ExitStack, from_text: Collection[str]) -> "dict[str, _Stream]":
    """The bytes of each tensor that the seeds alone give, as a merge would write them, made when they are asked for.

    Args:
        from_text: kinds of routers that were set from text.
    """
    routers = {tensor.name for tensor in plan.layout.mixture if tensor.router in from_text}
    assembler, buffers = Assembler(plan, Reader(plan, stack)), Buffers()

    def made(tensor: PlannedTensor) -> _Stream:
        return _Stream(job(buffers) for job in assembler.jobs(tensor))

    def needs_text(tensor: PlannedTensor) -> bool:
        by_usage = any(part.by_usage for group in tensor.groups for part in group.parts)
        return by_usage or tensor.name in routers

    return {tensor.name: made(tensor) for tensor in plan.tensors if not needs_text(tensor)}


def _read(info: TensorInfo, made: "_Stream | None", progress: Callable[[int], None]) -> tuple[TensorSum, bool, bool]:
    """A tensor's sums, whether all its numbers are finite, and whether its bytes are those that were made."""
    total, finite, same = TensorSum(), True, made is not None
    scratch = np.empty(min(CHUNK, info.nbytes), np.uint8)
    for data in _pieces(info):
        total.update(data.data)
        finite = finite and (info.dtype not in FLOATS or first_not_finite(data, info.dtype, scratch) is None)
        same = same and made is not None and made.matches(data)
        progress(len(data))
    return total, finite, same


def _compare_sums(
    found: Verification, info: TensorInfo, name: str, actual: Sequence[str], expected: Sequence[str]
) -> None:
    found.tensors += list(actual) == list(expected)
    for number, (one, other) in enumerate(zip(actual, expected, strict=False)):
        if one != other:
            first = number * STRETCH
            last = min(first + STRETCH, info.nbytes)
            found.problems.append(
                f"{info.file}: tensor '{name}', bytes {first:,} to {last:,}: checksum {one}, expected {other}"
            )
    if len(actual) != len(expected):
        found.problems.append(f"{info.file}: tensor '{name}' has {len(actual)} checksums, expected {len(expected)}")


def _pieces(info: TensorInfo) -> Iterator[Array]:
    """A tensor's bytes, in pieces of whole numbers."""
    with info.file.open("rb", buffering=0) as handle:
        handle.seek(info.offset)
        left = info.nbytes
        while left:
            data = handle.read(min(CHUNK, left))
            if not data or len(data) % ITEM_SIZE[info.dtype]:
                raise CheckpointError(f"{info.file} became shorter while it was read")
            left -= len(data)
            yield np.frombuffer(data, np.uint8)


class _Stream:
    """Bytes that come in pieces of their own lengths, compared with others that come in others."""

    def __init__(self, pieces: Iterator[Array]) -> None:
        self._pieces, self._left = pieces, np.empty(0, np.uint8)

    def matches(self, data: Array) -> bool:
        """Whether the next bytes are these."""
        while len(data):
            if not len(self._left):
                self._left = next(self._pieces, self._left)
                if not len(self._left):
                    return False
            count = min(len(data), len(self._left))
            if not np.array_equal(data[:count], self._left[:count]):
                return False
            data, self._left = data[count:], self._left[count:]
        return True


def _forward(found: Verification) -> bool:
    """Whether transformers loads the model and a forward of a few tokens is finite."""
    import torch

    from upcycle.weights import load_model

    with _noting(found):
        model = load_model(found.folder, torch.float32).eval()
        with torch.no_grad():
            logits = model(input_ids=torch.arange(8)[None]).logits
        if bool(logits.isfinite().all()):
            return True
        found.problems.append(f"{found.folder}: a forward gives numbers that are not finite")
    return False
