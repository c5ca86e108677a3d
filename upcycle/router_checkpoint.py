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
from upcycle.checksums import file_sum, read_sums, write_sums
from upcycle.errors import CheckpointError, OutputError, RecipeError
from upcycle.expert_modules import ffn_scales, selections_are_told
from upcycle.layerwise import Router, find_routers
from upcycle.mixture import router_records
from upcycle.numeric import TORCH_NAMES
from upcycle.preflight import check_place
from upcycle.recipe import SOFTNESS, AttentionRouter, FfnRouter
from upcycle.router_text import RouterText
from upcycle.routers import RouterFit, fit_warnings, scale_by_layer, set_routers
from upcycle.run_folder import RECORD
from upcycle.staging import check_target, is_part, staging
from upcycle.training_settings import ModelFacts
from upcycle.weights import as_stored, load_model, write_tensor

COPIED_AT_ONCE: Final = 16 << 20  # bytes
ROOM: Final = 1.2  # a GPU is used that has so many times the bytes free that model and text need
TEXT_COPIES: Final = 8  # of the text's states there are at the peak, in fp32
FEW: Final = 64  # tokens of a window, below which a router sees little of what attention makes of a text
MAX_SOFTNESS: Final = 100

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
        parts = [f"{kind} routers {mean(values):.0%}" for kind, values in self.accuracy.items()]
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
    config = _with_scale(folder, settings.get("ffn"))
    stored = read_tensors(folder)
    model = load_model(folder).eval()
    if config["model_type"] != "bam":
        top_k = config["num_experts_per_tok"]
        if not selections_are_told(model, torch.from_numpy(text.windows[0][:1]), top_k):
            raise CheckpointError(
                f"{folder}: {config['model_type']} does not select its experts by the largest router logits alone, so "
                "upcycle cannot set its routers"
            )
    model.to(_device(stored, text, model.config.hidden_size))
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def places(router: Router) -> dict[str, torch.Tensor]:
        """The router's weight by the name that the checkpoint has for it."""
        weight = router.module.weight
        found: dict[str, torch.Tensor] = as_stored(model, {names[id(weight)]: weight.detach().cpu()})
        for name, tensor in found.items():
            if name not in stored or stored[name].shape != tuple(tensor.shape):
                raise CheckpointError(f"{folder} stores no tensor '{name}' {list(tensor.shape)}, which is a router")
        return found

    dtypes = {stored[name].dtype for router in find_routers(model) for name in places(router)}
    dtype = getattr(torch, TORCH_NAMES[dtypes.pop() if len(dtypes) == 1 else "F32"])
    fits = set_routers(model, text, settings, dtype=dtype, progress=progress)
    sums = {}
    for fit in fits:
        for name, tensor in places(fit.router).items():
            sums[name] = _write(stored[name], tensor)
    if ffn_scales(model):
        config["ffn_scale"] = [round(scale, 6) for scale in scale_by_layer(model)]
        write_json(folder / CONFIG, config)
    return _recorded(folder, text, settings, fits), sums


def _with_scale(folder: Path, ffn: FfnRouter | AttentionRouter | None) -> dict[str, Any]:
    """A checkpoint's config, in which FFN routers that are to be set have a scale to be set with them, or none."""
    config = read_json(folder / CONFIG)
    if config["model_type"] == "bam" and isinstance(ffn, FfnRouter):
        config.pop("ffn_scale", None)
        if ffn.keep_scale and not config["norm_topk_prob"]:
            config["ffn_scale"] = [1.0] * config["num_hidden_layers"]
        write_json(folder / CONFIG, config)
    return config


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
    files = sorted(file for file in source.iterdir() if file.is_file() and is_part(file))
    sums = read_sums(source)
    check_place(out, sum(file.stat().st_size for file in files))
    try:
        with staging(out, check) as folder:
            for file in files:
                _copy(file, folder / file.name, copying)
                wanted = sums["files"].get(file.name) if sums else None
                if wanted and file_sum(folder / file.name) != wanted:
                    raise CheckpointError(f"{file} is not what its checksum says; `upcycle verify {source}` tells more")
            (folder / SUMS).unlink(missing_ok=True)
            former = read_card(folder)
            (folder / CARD).unlink(missing_ok=True)
            if (source / RECORD).is_file() and (folder / PROVENANCE).is_file():
                record = read_json(folder / PROVENANCE)
                trained = {**router_records(record), "after_training": True}
                write_json(folder / PROVENANCE, {**record, "routers": trained})
            result, changed = set_checkpoint_routers(folder, text, settings, progress=progress)
            write_card(folder, former)
            if sums:
                write_sums(folder, {**sums["tensors"], **changed})
    except OSError as error:
        raise OutputError(f"output {out} cannot be written: {error.strerror or error}") from error
    return result


def router_settings(
    folder: Path, facts: ModelFacts, init: str, softness: float | None = None, only: str | None = None
) -> dict[str, FfnRouter | AttentionRouter]:
    """How the routers of a finished mixture are set, by kind.

    Args:
        folder: the mixture's, whose recipe says whether gates keep the FFN's scale.
        init: "fit" or "prototypes".
        softness: None for the recipes' default.
        only: "ffn" or "attention", to leave the other kind as it is.

    Raises:
        RecipeError: the model is dense, it has no attention routers where those are wanted, it has experts that no text
            belongs to, or a softness of no use.
    """
    if facts.kind == "dense":
        raise RecipeError("the model is dense, so it has no routers; expected a mixture")
    _check_experts(facts)
    soft = SOFTNESS if softness is None else softness
    if not 0 < soft <= MAX_SOFTNESS:
        raise RecipeError(f"--softness {soft}: expected above 0, at most {MAX_SOFTNESS}; 1 is the fit's own")
    record: Any = read_json(folder / PROVENANCE) if (folder / PROVENANCE).is_file() else {}
    for key in ("recipe", "router", "ffn"):
        record = record.get(key)
        record = record if isinstance(record, dict) else {}
    keep_scale = record.get("keep_scale") is not False
    normalize = bool(facts.config.get("norm_topk_prob"))
    top_k = (facts.top_k or 1) // facts.recipe.experts.granularity
    settings: dict[str, FfnRouter | AttentionRouter] = {}
    if only != "attention":
        settings["ffn"] = FfnRouter(top_k=top_k, normalize=normalize, init=init, softness=soft, keep_scale=keep_scale)
    if only != "ffn" and facts.attention_experts:
        settings["attention"] = AttentionRouter(init=init, softness=soft)
    if not settings:
        raise RecipeError("--only attention: this mixture has one attention a layer, and no attention routers")
    return settings


def _check_experts(facts: ModelFacts) -> None:
    """Refuse experts that are no seed's alone."""
    extra = facts.recipe.experts.extra
    if extra:
        raise RecipeError(
            f"the mixture has extra experts that no text belongs to ({', '.join(facts.groups[-extra:][:4])}), so its "
            "routers cannot be set from text; train it"
        )


def _device(stored: Mapping[str, TensorInfo], text: RouterText, hidden: int) -> torch.device:
    """A GPU, where there is one with room for the model in fp32 and for the text."""
    if torch.cuda.is_available():
        needed = sum(4 * prod(info.shape) for info in stored.values()) + TEXT_COPIES * 4 * text.tokens * hidden
        if ROOM * needed < torch.cuda.mem_get_info()[0]:
            return torch.device("cuda")
    return torch.device("cpu")


def _write(info: TensorInfo, tensor: torch.Tensor) -> list[str]:
    handle = os.open(info.file, os.O_WRONLY)
    try:
        return write_tensor(handle, info.offset, tensor, info.dtype)
    finally:
        os.close(handle)


def _recorded(
    folder: Path, text: RouterText, settings: Mapping[str, FfnRouter | AttentionRouter], fits: Sequence[RouterFit]
) -> RoutersResult:
    """Note in upcycle.json what was set, and from which text; what is known of other routers stays."""
    accuracy: dict[str, list[float]] = {}
    for fit in fits:
        accuracy.setdefault(fit.router.kind, []).append(round(fit.accuracy, 4))
    record: dict[str, Any] = read_json(folder / PROVENANCE) if (folder / PROVENANCE).is_file() else {}
    about = router_records(record)
    for kind, values in accuracy.items():
        setting = settings[kind]
        about[kind] = {"init": setting.init, "softness": setting.softness, "accuracy": values, "text": text.record()}
    write_json(folder / PROVENANCE, {**record, "routers": about})
    warnings = fit_warnings(fits, text.experts)
    length = text.windows[0].shape[1]
    if length < FEW:
        warnings.insert(
            0, f"the shortest text has {length} tokens, so all are cut into windows as short; give more of it"
        )
    return RoutersResult(accuracy, warnings)


def _copy(source: Path, target: Path, copying: Progress) -> None:
    with source.open("rb") as file, target.open("wb") as copy:
        while data := file.read(COPIED_AT_ONCE):
            copy.write(data)
            copying(len(data))
