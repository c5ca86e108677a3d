"""Routers from text: each learns to tell, from its own input, which expert's text a token comes from.

A router's logits are `W x`, plus a bias where it has one, which stays as it is. "fit" takes the W of the multinomial
logistic regression of the expert on the router's true input, every expert's text counting alike, with a small ridge;
"prototypes" takes the differences of the experts' mean inputs from their mean, over the variance within an expert (the
linear discriminant of classes with one isotropic covariance): closed form, as good where classes lie like that. Either
W is then multiplied by `softness`: below 1 gates are softer than the regression believes, so that experts also learn
from each other's text.

Where each FFN was split into G experts (`granularity`), a text belongs to a whole FFN: its row stands G times, so that
a token takes all G or none, and each of the G gates is 1/G of the FFN's.

Axes: T tokens, N experts (before they are split), D hidden.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from upcycle.errors import CheckpointError
from upcycle.expert_modules import ffn_scales
from upcycle.layerwise import Router, set_layer_by_layer
from upcycle.recipe import AttentionRouter, FfnRouter
from upcycle.router_text import RouterText
from upcycle.weights import decoder_layers

RIDGE: Final = 1e-3  # times |W|^2, for inputs of mean square 1: keeps W finite where experts' texts are separable
ITERATIONS: Final = 50  # of L-BFGS, at most
HELD_BACK: Final = 8  # one eighth of each text is not fitted to, but tells how good the fit is
BATCH_TOKENS: Final = 8192  # a forward
BARELY: Final = 1.1  # times chance, below which a router is said to have learned nothing
COINCIDE: Final = 4.0  # two means closer than so many times what chance puts between them are taken for one


@dataclass(frozen=True)
class RouterFit:
    """One router that was set, and how well it tells the experts' texts apart.

    Attributes:
        accuracy: share of the held-back tokens whose largest gate is their own expert's, every expert's text counting
            alike.
        alike: pairs of experts whose mean inputs lie no further apart than chance would have it.
    """

    router: Router
    accuracy: float
    alike: Sequence[tuple[int, int]]


def fit_warnings(fits: Sequence[RouterFit], experts: Sequence[str]) -> list[str]:
    """What is wrong with routers: a sentence for each pair of texts, and for each router that learned nothing."""
    found = []
    for a, b in sorted({pair for fit in fits for pair in fit.alike}):
        count = sum((a, b) in fit.alike for fit in fits)
        found.append(
            f"the texts of '{experts[a]}' and '{experts[b]}' look the same to {count} of {len(fits)} routers, which "
            "cannot tell these experts apart; give each a text of its own kind"
        )
    chance = 1 / len(experts)
    for fit in fits:
        if fit.accuracy < BARELY * chance:
            found.append(
                f"{fit.router.where}: {fit.accuracy:.0%} of the tokens find their own expert, hardly more than by "
                f"chance ({chance:.0%})"
            )
    return found


def set_routers(
    model: Any,
    text: RouterText,
    settings: Mapping[str, FfnRouter | AttentionRouter],
    *,
    dtype: torch.dtype,
    progress: Callable[[int], None] = lambda _: None,
) -> list[RouterFit]:
    """Set those routers of a model that `settings` names, one pass over the text in all.

    Where the model's FFN layers have a scale (`ffn_scale` of a BAM mixture), it is set with their router. A router has
    as many rows as there are texts, or a multiple of that.

    Args:
        model: a BAM mixture or one of transformers' own, on its device.
        settings: for "ffn", "attention" or both, how: `init` "fit" or "prototypes", and `softness`.
        dtype: of the checkpoint, to which weights are rounded before later layers see them.
        progress: called with the number of tokens that have passed one layer.

    Raises:
        CheckpointError: an architecture whose routers upcycle cannot set, or weights that are not finite.
    """
    device = next(model.parameters()).device
    windows = torch.cat([torch.from_numpy(one) for one in text.windows]).to(device)
    experts, length = len(text.experts), windows.shape[1]
    labels = torch.cat([torch.full(one.shape, number) for number, one in enumerate(text.windows)]).flatten().to(device)
    held_back = torch.cat([_held_back(text, one.shape) for one in text.windows]).flatten().to(device)
    kept = int((~held_back).view(-1, length).sum(1).max())  # tokens of a window that are fitted to
    scales = ffn_scales(model)
    fits: list[RouterFit] = []

    def set_router(router: Router, inputs: torch.Tensor) -> None:
        if not inputs.isfinite().all():
            raise CheckpointError(f"{router.where}: its input is not finite, so the model's weights are damaged")
        setting = settings[router.kind]
        known, answers = inputs[~held_back].float(), labels[~held_back]
        weight = {"fit": logistic, "prototypes": prototypes}[setting.init](known, answers, experts)
        shards = shards_of(router, experts)
        router.module.weight.copy_((setting.softness * weight).to(dtype).repeat_interleave(shards, 0))
        bias = getattr(router.module, "bias", None)
        logits = torch.nn.functional.linear(inputs[held_back], router.module.weight, bias)
        gates = logits.softmax(-1, dtype=torch.float32).view(len(logits), experts, shards).sum(-1)
        right = gates.argmax(-1) == labels[held_back]
        shares = [right[labels[held_back] == number].float().mean() for number in range(experts)]
        if isinstance(setting, FfnRouter) and router.layer in scales:
            scale = scales[router.layer]
            scale.fill_(1 / gates.topk(setting.top_k, dim=-1).values.sum(-1).mean())
        by_window = known.view(-1, kept, known.shape[-1]).mean(1)
        alike = coinciding(by_window, answers.view(-1, kept)[:, 0], experts)
        fits.append(RouterFit(router, float(torch.stack(shares).mean()), alike))

    model.eval()
    batch = max(1, BATCH_TOKENS // length)
    set_layer_by_layer(model, windows, set_router, kinds=settings, batch=batch, progress=progress)
    if scales:
        model.config.ffn_scale = scale_by_layer(model)  # what save_pretrained writes
    return fits


def scale_by_layer(model: Any) -> list[float]:
    """A BAM mixture's `ffn_scale`: a number for each of its layers, 1 for those without experts."""
    scales = ffn_scales(model)
    return [float(scales[layer]) if layer in scales else 1.0 for layer in range(len(decoder_layers(model)))]


def shards_of(router: Router, experts: int) -> int:
    """How many rows of a router belong to each text.

    Raises:
        CheckpointError: no whole number: it has experts that no text belongs to.
    """
    rows = len(router.module.weight)
    if rows % experts:
        raise CheckpointError(f"{router.where}: it chooses among {rows} experts, and text is given for {experts}")
    return rows // experts


def _held_back(text: RouterText, shape: tuple[int, ...]) -> torch.Tensor:
    """Which tokens of one text are not fitted to: every eighth window, or of few windows the last eighth of each."""
    windows, length = shape
    if all(len(one) >= HELD_BACK for one in text.windows):
        return (torch.arange(windows) % HELD_BACK == HELD_BACK - 1)[:, None].expand(windows, length)
    return (torch.arange(length) >= length - max(1, length // HELD_BACK)).expand(windows, length)


def logistic(inputs: torch.Tensor, labels: torch.Tensor, experts: int) -> torch.Tensor:
    """The W of a multinomial logistic regression of `labels [T]` on `inputs [T, D]`: `[N, D]`, all experts alike.

    The minimum of the mean over experts of their tokens' cross-entropy + `RIDGE` |W|^2, for inputs of mean square 1. It
    is convex and found in coordinates in which the inputs are uncorrelated, where L-BFGS needs a few steps.
    """
    counts = torch.bincount(labels, minlength=experts).clamp(min=1)
    shares = (1 / (experts * counts.float()))[labels]
    size = inputs.square().mean().sqrt().clamp(min=1e-12)
    known = inputs / size
    products = ((known * shares[:, None]).T @ known).double()
    products.diagonal().add_(RIDGE)
    factor = torch.linalg.cholesky(products).float()  # products = factor factor^T

    def weight(free: torch.Tensor) -> torch.Tensor:
        solved: torch.Tensor = torch.linalg.solve_triangular(factor.T, free.T, upper=True)
        return solved.T

    free = torch.zeros(experts, inputs.shape[-1], device=inputs.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([free], max_iter=ITERATIONS, tolerance_change=1e-7, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        current = weight(free)
        entropies = torch.nn.functional.cross_entropy(known @ current.T, labels, reduction="none")
        value = (shares * entropies).sum() + RIDGE * current.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value.detach()

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[no-untyped-call]
    return weight(free.detach()) / size


def prototypes(inputs: torch.Tensor, labels: torch.Tensor, experts: int) -> torch.Tensor:
    """`[N, D]`: (m_i - mean of all m) / s^2, m_i an expert's mean input, s^2 the variance of a dimension around it."""
    means, variance = _means(inputs, labels, experts)
    return (means - means.mean(0)) / variance.mean().clamp(min=1e-12)


def coinciding(windows: torch.Tensor, labels: torch.Tensor, experts: int) -> list[tuple[int, int]]:
    """Pairs of experts whose texts look the same: their means lie no further apart than windows of one text do.

    Args:
        windows: `[W, D]`, the mean input of each window: tokens of one window are no independent sample.
        labels: `[W]`.
    """
    means, variance = _means(windows, labels, experts)
    counts = torch.bincount(labels, minlength=experts).clamp(min=1)
    by_chance = variance.sum() * (1 / counts[:, None] + 1 / counts)
    near = torch.cdist(means, means).square() < COINCIDE * by_chance
    return [(a, b) for a in range(experts) for b in range(a + 1, experts) if near[a, b]]


def _means(inputs: torch.Tensor, labels: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Each expert's mean input `[N, D]`, and every dimension's variance around it `[D]`, all experts alike."""
    means, variances = [], []
    for expert in range(experts):
        group = inputs[labels == expert]
        means.append(group.mean(0))
        variances.append(group.var(0, correction=0))
    return torch.stack(means), torch.stack(variances).mean(0)
