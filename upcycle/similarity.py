"""Whether a mixture's experts still differ: the cosines of their weights and of what they answer.

Experts that collapse into one another tend to 1. Specialists of one ancestor share most of their weights, so their
weights begin near 1; what they answer to the same input says more.

Axes: T tokens, L layers, N experts, D hidden.
"""

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import nn

from upcycle.expert_modules import attention_experts, ffn_experts, inputs_of
from upcycle.modeling.modeling_bam import GatedOutput

MAX_TOKENS: Final = 256  # of a window, at which all experts are asked


@torch.no_grad()
def expert_similarity(model: Any, windows: Sequence[torch.Tensor]) -> dict[str, list[Any]]:
    """Cosines between every two experts of a layer, each `[L][N][N]`, over the layers that have experts.

    Args:
        model: a BAM mixture or one of transformers' own.
        windows: int64 `[1, length]` each, on which the experts are asked.

    Returns:
        `ffn_weights`: of all weights of the FFNs. `ffn_outputs`: of their answers to the same token, before any gate,
        as a mean over tokens. With attention experts `attention_weights`, of their output projections, and
        `attention_outputs`.
    """
    places = {"ffn": ffn_experts(model), "attention": attention_experts(model)}
    modules = [(kind, list(layers.values())) for kind, layers in places.items() if layers]
    found = {f"{kind}_weights": [_weight_cosines(expert).tolist() for expert in experts] for kind, experts in modules}
    sums: dict[str, list[torch.Tensor]] = {}
    for window in windows:
        with inputs_of([expert for _, experts in modules for expert in experts]) as seen:
            model(input_ids=window, use_cache=False)
        for kind, experts in modules:
            cosines = [_output_cosines(expert, seen[expert][0]) for expert in experts]
            former = sums.get(f"{kind}_outputs")
            sums[f"{kind}_outputs"] = [a + b for a, b in zip(former, cosines, strict=True)] if former else cosines
    return found | {name: [(one / len(windows)).tolist() for one in layers] for name, layers in sums.items()}


def _weight_cosines(experts: Any) -> torch.Tensor:
    """`[N, N]`."""
    if isinstance(experts, GatedOutput):
        parts = [_projections(experts).flatten(1)]
    else:
        parts = [weight.flatten(1) for weight in experts.parameters(recurse=False)]
    products = torch.zeros(len(parts[0]), len(parts[0]), dtype=torch.float64)
    for part in parts:
        part = part.float()
        products += (part @ part.T).cpu()
    norms = products.diagonal().sqrt().clamp(min=1e-30)
    return products / norms / norms[:, None]


def _projections(attention: Any) -> torch.Tensor:
    """Each expert's part of the wide output projection, `[N, D, heads * head_dim]`."""
    split = attention.linear.weight.unflatten(-1, (attention.key_value_heads, attention.experts, -1))
    parts: torch.Tensor = split.permute(2, 0, 1, 3).flatten(2)
    return parts


def _output_cosines(experts: Any, given: torch.Tensor) -> torch.Tensor:
    """`[N, N]` in float64: the mean over tokens of the cosine between two experts' answers."""
    given = given.reshape(-1, given.shape[-1])[:MAX_TOKENS]
    if isinstance(experts, GatedOutput):
        heads = given.view(len(given), experts.key_value_heads, experts.experts, -1).transpose(1, 2).flatten(2)
        answers = torch.einsum("tnh,ndh->ntd", heads, _projections(experts))
        if experts.bias is not None:
            answers = answers + experts.bias[:, None]
    else:
        one = given.new_ones(len(given), 1)
        index = torch.zeros(len(given), 1, dtype=torch.int64, device=given.device)
        answers = torch.stack([experts(given, index + expert, one) for expert in range(len(experts.down_proj))])
    answers = nn.functional.normalize(answers.float(), dim=-1)
    some = answers.any(-1).float()  # padding may have no answer at all, which has no direction
    both = (some @ some.T).clamp(min=1)
    return (torch.einsum("itd,jtd->ij", answers, answers) / both).cpu().double()
