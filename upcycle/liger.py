"""Liger's Triton kernels in a model to be trained: experts, RMSNorm, rotary positions, and a loss without logits.

Everything here is optional (ask `available` first), acts on a loaded model and is not saved with it. Whether Liger
computes what the family does is found by trial on the model's device, not by name; where it does not, and for tensors
that are not on CUDA, the family's own code stays. TRITON_INTERPRET=1, Triton's own switch, stands in for CUDA.

Axes: B batch, S sequence, T tokens (B * S), N experts, K experts per token, D hidden, I inner, V vocabulary, H heads,
d head_dim.
"""

import copy
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from importlib.util import find_spec
from types import MethodType
from typing import Any, Final

import torch
from torch import nn
from torch.nn import functional

from upcycle.kernels.dispatch import activation_of, peculiarity

NAME: Final = "upcycle_liger"
IGNORED: Final = -100

_MARK = "upcycle_liger"  # on a function that calls Liger's
_TYPES = (torch.float32, torch.bfloat16, torch.float16)
# What is added to a norm's weight, and Liger's name for where it rounds: of the normalised states ("llama") or of their
# product with the weight ("gemma").
_NORMS = ((0.0, "llama"), (1.0, "gemma"), (0.0, "gemma"))


def available() -> bool:
    """Whether Liger and Triton are installed."""
    return find_spec("liger_kernel") is not None and find_spec("triton") is not None


def _served(tensor: torch.Tensor) -> bool:
    return tensor.dtype in _TYPES and (tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")


def register_experts() -> None:
    """Make "upcycle_liger" known to transformers; `model.set_experts_implementation` chooses it."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def experts_unserved(module: Any) -> str | None:
    """Why Liger does not serve an experts module, or None if it does."""
    peculiar = swiglu_unserved(module)
    return None if peculiar is None else f"Liger does not serve {peculiar}"


def swiglu_unserved(module: Any) -> str | None:
    """What experts compute that is not W_down (SiLU(W_gate x) * W_up x), or None if that."""
    if not module.has_gate:
        return "experts without a gate"
    peculiar = peculiarity(module)
    if peculiar is None and activation_of(module.act_fn) != "silu":
        return f"the activation {type(module.act_fn).__name__}, only SiLU"
    return peculiar


def experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Tokens `[T, D]`, indices and gates `[T, K]`, to `[T, D]`, in autocast's dtype where it is on.

    Tokens that are not on CUDA go through the module's own loop over its experts.

    Raises:
        ValueError: `experts_unserved`.
    """
    reason = experts_unserved(self)
    if reason is not None:
        raise ValueError(f"{type(self).__name__}: {reason}; choose another experts implementation")
    if not _served(hidden_states):
        # `use_experts_implementation` keeps the class's own forward there.
        eager: torch.Tensor = type(self).forward.__wrapped__(self, hidden_states, top_k_index, top_k_weights)
        return eager
    from liger_kernel.ops import LigerFusedMoEFunction

    device = hidden_states.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_states.dtype
    tokens, wide_in, down, gates = (
        tensor.to(dtype) for tensor in (hidden_states, self.gate_up_proj, self.down_proj, top_k_weights)
    )
    with torch.cuda.device_of(tokens):  # type: ignore[no-untyped-call]  # Liger launches on the current device
        result: torch.Tensor = LigerFusedMoEFunction.apply(tokens, wide_in, down, top_k_index.to(torch.int32), gates)
    return result


def use_norms(model: nn.Module) -> int:
    """Let Liger compute the model's RMSNorms: those of which it gives the same outputs, tried once a class.

    Only norms with one weight `[D]` are tried: not an `ExpertNorm`'s, which has one for each expert. Returns the number
    of norms that Liger computes.
    """
    variants: dict[type, tuple[float, str] | None] = {}
    norms = [module for module in model.modules() if _may_be_rms_norm(module)]
    for norm in norms:
        if type(norm) not in variants:
            variants[type(norm)] = next((variant for variant in _NORMS if _same_norm(norm, *variant)), None)
    served: list[Any] = [norm for norm in norms if variants[type(norm)]]
    for norm in served:
        norm.liger_variant = variants[type(norm)]
        norm.forward = MethodType(_norm_forward, norm)  # a method, so that a copied model's is the copy's
    return len(served)


def _may_be_rms_norm(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 1 or len(list(module.parameters())) != 1 or not _served(weight):
        return False
    takes_states_alone = len(inspect.signature(type(module).forward).parameters) == 2
    somebody_elses = "forward" in vars(module) and not hasattr(module, "liger_variant")  # an offloading hook's
    return takes_states_alone and not somebody_elses and isinstance(_eps(module), float)


def _eps(norm: Any) -> Any:
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


def _norm_forward(self: Any, states: torch.Tensor) -> torch.Tensor:
    if not _served(states):
        own: torch.Tensor = type(self).forward(self, states)
        return own
    return _rms_norm(states, self.weight, _eps(self), *self.liger_variant)


def _rms_norm(states: torch.Tensor, weight: torch.Tensor, eps: Any, offset: float, casting: str) -> torch.Tensor:
    from liger_kernel.ops import LigerRMSNormFunction

    # There the family multiplies after the cast, and so returns the finer of both types; Liger that of the states.
    if casting == "llama":
        states = states.to(torch.promote_types(states.dtype, weight.dtype))
    normed: torch.Tensor = LigerRMSNormFunction.apply(states, weight, eps, offset, casting, False)  # not in place
    return normed


@torch.no_grad()
def _same_norm(norm: Any, offset: float, casting: str) -> bool:
    """Whether Liger's variant gives a norm's outputs, in fp32, in bf16, and with states coarser than the weight."""
    twin, size, device = copy.deepcopy(norm), len(norm.weight), norm.weight.device
    vars(twin).pop("forward", None)
    generator = torch.Generator().manual_seed(0)
    # Rows as small as the root of eps, where it shows, and larger ones.
    states = torch.randn(64, size, generator=generator) * torch.logspace(-4, 1, 64)[:, None]
    weight = torch.randn(size, generator=generator)
    for coarse, fine in (("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")):
        inputs = states.to(device, getattr(torch, coarse))
        twin.weight = nn.Parameter(weight.to(device, getattr(torch, fine)))
        found, wanted = _rms_norm(inputs, twin.weight, _eps(norm), offset, casting), twin(inputs)
        # Where a variant rounds shows in bf16 alone, there in every second number; by chance in one of thousands.
        tolerance = 1e-5 if coarse == "float32" else 1e-2
        same = torch.allclose(found.float(), wanted.float(), rtol=tolerance, atol=tolerance * 1e-3)
        if fine == "bfloat16":
            same = same and float((found != wanted).float().mean()) < 1e-2
        if not same or found.dtype != wanted.dtype:
            return False
    return True


def use_rope(model: nn.Module) -> bool:
    """Let Liger rotate queries and keys; whether it does.

    The family's function is replaced in its Python module, for the whole process, if Liger's gives the same. Calls that
    differ from the one tried (partial rotations, other arguments, not on CUDA) go to the family's own. Liger may write
    its result into the memory of its inputs: no family reads queries and keys once more.
    """
    if not _served(next(model.parameters())):
        return False
    device, replaced = next(model.parameters()).device, False
    for name in {type(module).__module__ for module in model.modules()}:
        file = sys.modules.get(name)
        original = getattr(file, "apply_rotary_pos_emb", None)
        if original is None:
            continue
        if not hasattr(original, _MARK) and _same_rope(original, device):
            setattr(file, "apply_rotary_pos_emb", _rope_or(original))  # noqa: B010
        replaced = replaced or hasattr(getattr(file, "apply_rotary_pos_emb"), _MARK)  # noqa: B009
    return replaced


def _rope_or(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def rotate(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *more: Any, **named: Any) -> Any:
        # A finer cos makes the family's result finer; autocast has the attention round it.
        alike = cos.dtype == q.dtype == k.dtype or torch.is_autocast_enabled(q.device.type)
        shaped = q.dim() == 4 and cos.dim() == 3 and cos.shape[-1] == q.shape[-1]
        if more or named or not (alike and shaped and _served(q)):
            return original(q, k, cos, sin, *more, **named)
        from liger_kernel.ops import LigerRopeFunction

        return LigerRopeFunction.apply(q, k, cos, sin)

    setattr(rotate, _MARK, True)
    return rotate


@torch.no_grad()
def _same_rope(original: Callable[..., Any], device: torch.device) -> bool:
    """Whether Liger rotates as the family does, by angles that are alike in both halves of a head."""
    if list(inspect.signature(original).parameters)[:4] != ["q", "k", "cos", "sin"]:
        return False
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, heads, 5, 16, generator=generator).to(device) for heads in (4, 2))
    angles = (3 * torch.randn(2, 5, 8, generator=generator)).to(device).repeat(1, 1, 2)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 5e-2)):
        inputs = [tensor.to(dtype) for tensor in (q, k, angles.cos(), angles.sin())]
        pairs = zip(_rope_or(original)(*(x.clone() for x in inputs)), original(*inputs), strict=True)
        if not all(a.dtype == b.dtype and torch.allclose(a, b, tolerance, tolerance) for a, b in pairs):
            return False
    return True


@dataclass(frozen=True)
class LossHead:
    """A model's output head, moved from its forward into the loss, so that logits `[T, V]` are never there as a whole.

    While it is in force the model's "logits" are hidden states `[B, S, D]`, scaled as the family scales its logits.

    Attributes:
        head: the model's output embedding `[V, D]`, still the model's own.
        dtype: in which products are computed; the head's own if None.
    """

    head: nn.Linear
    dtype: torch.dtype | None = None

    def nll(self, hidden: torch.Tensor, targets: torch.Tensor, counted: torch.Tensor | None = None) -> torch.Tensor:
        """Sum of -log p(target) in nats over the counted targets, an fp32 scalar; call it outside of autocast.

        Args:
            hidden: `[B, S, D]`, the model's "logits".
            targets: int64 `[B, S]`, the token that follows each position, in 0..V-1 where it is counted.
            counted: bool `[B, S]`, or None for all.
        """
        from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction

        weight = self.head.weight
        if weight.requires_grad and torch.is_grad_enabled() and not hidden.requires_grad:
            hidden = hidden.detach().requires_grad_()  # else Liger would leave the weight without its gradient
        if counted is not None:
            targets = targets.masked_fill(~counted, IGNORED)
        dtype = self.dtype or weight.dtype
        states, classes = hidden.flatten(0, 1).to(dtype), weight.to(dtype)
        options = (None, None, IGNORED, 0.0, 0.0, "sum", None, False, torch.float32)
        loss: torch.Tensor = LigerFusedLinearCrossEntropyFunction.apply(states, classes, targets.flatten(), *options)[0]
        return loss

    @contextmanager
    def off(self) -> Iterator[None]:
        """Ordinary logits within the block."""
        del self.head.forward
        try:
            yield
        finally:
            self.head.forward = _identity  # type: ignore[method-assign, assignment]


def _identity(hidden: torch.Tensor) -> torch.Tensor:
    return hidden


@torch.no_grad()
def use_loss_head(model: Any, window: torch.Tensor, dtype: torch.dtype | None = None) -> LossHead | None:
    """Take the output head out of a model's forward; None, and an unchanged model, where that is not exact.

    It is exact where the head is a plain Linear without bias, not sharded, and the family's code is linear after it:
    two forwards, with random states in place of the last layer's, so large that soft-capping shows.

    Args:
        model: any causal language model of transformers; one that has its loss head already gets the same again.
        window: int64 `[1, S]`, tokens to try it on, on the model's device.
        dtype: in which the loss computes its products; None for the head's own.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None or vars(head).get("forward", _identity) is not _identity:
        return None
    weight = head.weight
    if type(weight.data) is not torch.Tensor:
        return None
    states = torch.randn(*window.shape, head.in_features, generator=torch.Generator().manual_seed(0)).to(weight)
    states *= 1e3 / functional.linear(states, weight).abs().max()
    outputs = []
    try:
        for value in (functional.linear(states, weight), states):
            head.forward = lambda _, value=value: value
            outputs.append(model(input_ids=window, use_cache=False).logits.to(weight.dtype))
    finally:
        del head.forward
    logits, scaled = outputs
    if scaled.shape != states.shape or not functional.linear(scaled, weight).dist(logits) <= 1e-2 * logits.norm():
        return None
    head.forward = _identity
    return LossHead(head, dtype)
