"""What makes a training's steps faster and computes the same: the experts' backend, Liger, overlap, compilation."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import torch

from upcycle import liger
from upcycle.backends import AUTO, BACKENDS, Backend, choose_backend, use_backend
from upcycle.errors import TrainingError, UpcycleError
from upcycle.processes import from_main, one_by_one
from upcycle.side_by_side import run_side_by_side
from upcycle.training_settings import ModelFacts, Settings
from upcycle.weights import decoder_layers

TRIED: Final = 4  # tokens on which Liger's pieces are compared with the family's own


@dataclass(frozen=True)
class Acceleration:
    """What was put in place. `loss_head`: where the loss is computed without logits; `told`: sentences for people."""

    backend: Backend | None
    loss_head: liger.LossHead | None
    told: Sequence[str]

    def record(self) -> dict[str, Any]:
        """What a training's record holds of it."""
        return {"experts_backend": self.backend and self.backend.name, "acceleration": list(self.told)}


def speed_up(
    model: Any, settings: Settings, facts: ModelFacts, accelerator: Any, wanted: str, former: str | None = None
) -> Acceleration:
    """Prepare a loaded model, on its device, for fast steps.

    Args:
        wanted: the experts' backend, as in `backends.BACKENDS`; of several processes the main one chooses for all.
        former: that of the training which is resumed; "auto" means it again, where it is served.

    Raises:
        UpcycleError: what was asked for and cannot be had here.
    """
    backend: Backend | None = None
    told = []
    if facts.top_k is not None or wanted != AUTO:
        with one_by_one(accelerator):
            if accelerator.is_main_process:
                backend = _choose(model, settings, facts.top_k or 1, wanted, former)
        backend = from_main(backend, accelerator)
    if backend:
        told.append(f"experts by {backend.name}: {backend.reason}")
    head = None
    if settings.liger:
        head, done = _use_liger(model, settings, accelerator.device)
        told.append(f"Liger computes {done}")
    if settings.side_by_side:
        told.append(f"attention and FFN side by side in {_overlapped(model)} layers")
    if backend:  # after the trials, which are in fp32
        use_backend(model, backend)
    if settings.compile:
        _check_compiles(settings, backend)
        layers = decoder_layers(model)
        for layer in layers:
            layer.compile(dynamic=False)
        told.append(f"{len(layers)} layers compiled; the first step takes longer")
    return Acceleration(backend, head, told)


def _choose(model: Any, settings: Settings, top_k: int, wanted: str, former: str | None) -> Backend | None:
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    choose = partial(choose_backend, tokens=settings.micro_batch_size * settings.sequence_length, top_k=top_k)
    if former in BACKENDS and wanted == AUTO:
        try:
            backend = choose(model, former, dtype=dtype, backward=True)
            return backend and replace(backend, reason="as before")
        except UpcycleError:  # resumed on another machine
            pass
    return choose(model, wanted, dtype=dtype, backward=True)


def _check_compiles(settings: Settings, backend: Backend | None) -> None:
    from transformers.integrations import moe

    # Of the fp32 product that stands in for torch's grouped one; bf16 has that itself.
    lacking = not hasattr(moe, "_grouped_mm_fallback_bwd")
    if backend and backend.name == "grouped_mm" and settings.precision == "fp32" and lacking:
        raise TrainingError(
            "--compile in fp32 needs a newer transformers (5.24 will do), whose grouped product has a backward that "
            "compiles; take --precision bf16, or leave --compile out"
        )


def _use_liger(model: Any, settings: Settings, device: torch.device) -> tuple[liger.LossHead | None, str]:
    if not liger.available():
        raise TrainingError("--liger: liger-kernel is not installed (pip install 'upcycle[cuda]')")
    done = []
    if not settings.compile:  # the compiler fuses these itself
        norms, rope = liger.use_norms(model), liger.use_rope(model)
        done += [f"{norms} norms"] * bool(norms) + ["rotary positions"] * rope
    window = torch.arange(TRIED, device=device)[None]
    head = liger.use_loss_head(model, window, torch.bfloat16 if settings.precision == "bf16" else None)
    done += ["the loss without logits"] * (head is not None)
    return head, ", ".join(done) or "nothing of this model"


def _overlapped(model: Any) -> int:
    layers = run_side_by_side(model)
    if not layers:
        raise TrainingError(
            "--side-by-side: this model's attention and FFN do not read the same input, so the one must wait for the "
            "other; leave it out"
        )
    return layers
