"""Routers of a finished checkpoint, set from text: in a merge's last step, or in a copy of a mixture."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from statistics import mean
from typing import Any, Final

import torch

from upcycle.card import read_card, write_card
from upcycle.checkpoint import CARD, CONFIG, PROVENANCE, SUMS, TensorInfo, read_json, read_tensors, write_json
from upcycle.checksums import read_sums, write_sums
from upcycle.errors import CheckpointError, RecipeError
from upcycle.expert_modules import ffn_scales, selections_are_told
from upcycle.numeric import TORCH_NAMES
from upcycle.recipe import SOFTNESS, AttentionRouter, FfnRouter
from upcycle.router_text import RouterText
from upcycle.routers import RouterFit, set_routers
from upcycle.staging import check_target, staging
from upcycle.training_settings import ModelFacts
from upcycle.weights import as_stored, load_model, write_tensor

COPIED_AT_ONCE: Final = 16 << 20  # bytes
ROOM: Final = 1.2  # a model is put on a GPU that has so many times its bytes free, as text needs some

Progress = Callable[[int], None]


@dataclass(frozen=True)
class RoutersResult:
    """What was set.

    Attributes:
        accuracy: by kind of router, for each layer the share of held-back tokens that find their own expert.
        warnings: what is wrong with some of them, in sentences.
    """

    accuracy: Mapping[str, Sequence[float]]
    warnings: Sequence[str]

    def summary(self) -> str:
        """One line."""
        parts = [f"{kind} {mean(values):.0%}" for kind, values in self.accuracy.items()]
        return f"tokens of held-back text that find their own expert: {', '.join(parts)}"


def set_checkpoint_routers(
    folder: Path,
    text: RouterText,
    settings: Mapping[str, FfnRouter | AttentionRouter],
    *,
    progress: Progress = lambda _: None,
) -> tuple[RoutersResult, dict[str, list[str]]]:
    """Set a checkpoint's routers in place, and what its config and upcycle.json say of them.

    For a folder that is not finished yet: killed on the way, some routers are set and others not.

    Args:
        settings: by kind ("ffn", "attention") of router how it is set; other kinds stay.
        progress: called with the number of tokens that have passed one layer.

    Returns:
        What was set, and the checksums of the tensors that were written.

    Raises:
        CheckpointError: an architecture whose routers cannot be set.
    """
    config = read_json(folder / CONFIG)
    ffn = settings.get("ffn")
    if config["model_type"] == "bam" and isinstance(ffn, FfnRouter):
        scaled = ffn.keep_scale and not config["norm_topk_prob"]
        config.pop("ffn_scale", None)
        if scaled:
            config["ffn_scale"] = [1.0] * config["num_hidden_layers"]
        write_json(folder / CONFIG, config)
    stored = read_tensors(folder)
    model = load_model(folder).eval()
    if config["model_type"] != "bam":
        top_k = config["num_experts_per_tok"]
        if not selections_are_told(model, torch.from_numpy(text.windows[0][:1]), top_k):
            raise CheckpointError(
                f"{folder}: {config['model_type']} does not select its experts by the largest router logits alone, so "
                "upcycle cannot set its routers"
            )
    model.to(_device(stored))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    kinds = {info.dtype for name, info in stored.items() if len(info.shape) == 2}
    dtype = getattr(torch, TORCH_NAMES[kinds.pop() if len(kinds) == 1 else "F32"])
    fits = set_routers(model, text, settings, dtype=dtype, progress=progress)
    sums = {}
    for fit in fits:
        name = names[id(fit.router.module.weight)]
        for key, tensor in as_stored(model, {name: fit.router.module.weight.detach().cpu()}).items():
            sums[key] = _write(stored, key, tensor)
    scales = ffn_scales(model)
    if scales:
        config["ffn_scale"] = [round(float(scale), 6) for scale in scales.values()]
        write_json(folder / CONFIG, config)
    return _recorded(folder, text, settings, fits), sums


def init_routers(
    source: Path,
    out: Path,
    text: RouterText,
    settings: Mapping[str, FfnRouter | AttentionRouter],
    *,
    overwrite: bool = False,
    copying: Progress = lambda _: None,
    progress: Progress = lambda _: None,
) -> RoutersResult:
    """Copy a mixture to `out`, its routers set from text.

    Args:
        copying: called with the number of bytes copied since the last call.
        progress: as for `set_checkpoint_routers`, which also says what `settings` are.

    Raises:
        OutputError: `out` exists, or cannot be written.
        CheckpointError: the mixture is damaged, or of an architecture whose routers cannot be set.
    """

    def check() -> None:
        check_target(out, overwrite, [source])

    check()
    sums = read_sums(source)
    with staging(out, check) as folder:
        for file in sorted(source.iterdir()):
            if file.is_file() and not file.name.startswith("."):
                _copy(file, folder / file.name, copying)
        (folder / SUMS).unlink(missing_ok=True)
        former = read_card(folder)
        (folder / CARD).unlink(missing_ok=True)
        result, changed = set_checkpoint_routers(folder, text, settings, progress=progress)
        write_card(folder, former)
        if sums is not None:
            write_sums(folder, {**sums["tensors"], **changed})
    return result


def router_settings(
    facts: ModelFacts, init: str, softness: float | None = None, only: str | None = None
) -> dict[str, FfnRouter | AttentionRouter]:
    """How the routers of a finished mixture are set, by kind.

    Args:
        init: "fit" or "prototypes".
        softness: None for the recipes' default.
        only: "ffn" or "attention", to leave the other kind as it is.

    Raises:
        RecipeError: the model is dense, or has no attention routers where those are wanted.
    """
    if facts.kind == "dense":
        raise RecipeError("the model is dense, so it has no routers; expected a mixture")
    soft = SOFTNESS if softness is None else softness
    normalize = bool(facts.config.get("norm_topk_prob"))
    settings: dict[str, FfnRouter | AttentionRouter] = {}
    if only != "attention":
        settings["ffn"] = FfnRouter(top_k=facts.top_k or 1, normalize=normalize, init=init, softness=soft)
    if only != "ffn" and facts.attention_experts:
        settings["attention"] = AttentionRouter(init=init, softness=soft)
    if not settings:
        raise RecipeError("--only attention: this mixture has one attention a layer, and no attention routers")
    return settings


def _device(stored: Mapping[str, TensorInfo]) -> torch.device:
    """A GPU, where there is one with room for the model in fp32."""
    if torch.cuda.is_available():
        needed = sum(4 * prod(info.shape) for info in stored.values())
        if ROOM * needed < torch.cuda.mem_get_info()[0]:
            return torch.device("cuda")
    return torch.device("cpu")


def _write(stored: Mapping[str, TensorInfo], name: str, tensor: torch.Tensor) -> list[str]:
    info = stored.get(name)
    if info is None or info.shape != tuple(tensor.shape):
        raise CheckpointError(f"router '{name}' {list(tensor.shape)} is not among the checkpoint's tensors")
    handle = os.open(info.file, os.O_WRONLY)
    try:
        return write_tensor(handle, info.offset, tensor, info.dtype)
    finally:
        os.close(handle)


def _recorded(
    folder: Path, text: RouterText, settings: Mapping[str, FfnRouter | AttentionRouter], fits: Sequence[RouterFit]
) -> RoutersResult:
    """Note in upcycle.json what was set, and from which text."""
    accuracy: dict[str, list[float]] = {}
    for fit in fits:
        accuracy.setdefault(fit.router.kind, []).append(round(fit.accuracy, 4))
    record: dict[str, Any] = read_json(folder / PROVENANCE) if (folder / PROVENANCE).is_file() else {}
    about = {
        kind: {"init": settings[kind].init, "softness": settings[kind].softness, "accuracy": values}
        for kind, values in accuracy.items()
    }
    write_json(folder / PROVENANCE, {**record, "routers": {**about, "text": text.record()}})
    return RoutersResult(accuracy, [warning for fit in fits for warning in fit.warnings(text.experts)])


def _copy(source: Path, target: Path, copying: Progress) -> None:
    with source.open("rb") as file, target.open("wb") as copy:
        while data := file.read(COPIED_AT_ONCE):
            copy.write(data)
            copying(len(data))
