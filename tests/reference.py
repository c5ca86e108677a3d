"""BAM.md's equations in plain torch: a loop over N separate attention modules and N separate MLPs of the family's own.

Written for clarity and in no way sharing code with upcycle: the routers are given, every module is the seed's own.
"""

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import nn


class AttentionLoop(nn.Module):
    """y = sum_i g_i(x) MHA_i(x), g = softmax(W_a x)."""

    def __init__(self, experts: Sequence[nn.Module], router: torch.Tensor):
        super().__init__()
        self.experts, self.router = nn.ModuleList(experts), nn.Parameter(router)

    def forward(self, hidden_states, *args, **kwargs):
        gates = (hidden_states @ self.router.T).softmax(-1)
        outputs = [expert(hidden_states, *args, **kwargs)[0] for expert in self.experts]
        return sum(gates[..., i : i + 1] * output for i, output in enumerate(outputs)), None


class FfnLoop(nn.Module):
    """y = sum over the top k of p_i(x) FFN_i(x), p = softmax(W_r x); with `normalize` the p_i of the top k sum to 1."""

    def __init__(self, experts: Sequence[nn.Module], router: torch.Tensor, top_k: int, normalize: bool):
        super().__init__()
        self.experts, self.router = nn.ModuleList(experts), nn.Parameter(router)
        self.top_k, self.normalize = top_k, normalize

    def forward(self, x):
        p = (x @ self.router.T).softmax(-1)
        threshold = p.sort(-1, descending=True).values[..., self.top_k - 1 : self.top_k]
        p = p * (p >= threshold)
        if self.normalize:
            p = p / p.sum(-1, keepdim=True)
        return sum(p[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts))


def attention_name(model: nn.Module) -> str:
    """Where a layer holds its attention."""
    return "attention" if hasattr(model.base_model.layers[0], "attention") else "self_attn"


def mean(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """fp32 mean with one cast."""
    total = tensors[0].detach().float()
    for tensor in tensors[1:]:
        total = total + tensor.detach().float()
    return (total / len(tensors)).to(tensors[0].dtype)


def is_key_value(name: str) -> bool:
    """Whether a tensor of an attention belongs to its keys or values alone."""
    return not {"k_proj", "v_proj", "k_norm"}.isdisjoint(name.split("."))


def build(
    seeds: Sequence[nn.Module],
    routers: Mapping[str, torch.Tensor],
    *,
    attention_experts: bool,
    shared_key_value: bool,
    top_k: int,
    normalize: bool,
) -> nn.Module:
    """The mixture of `seeds` (fp32 models) as a float64 model; routers named `{layer}.ffn`, `{layer}.attention`."""
    model = averaged(seeds)
    place = attention_name(model)
    for index, layer in enumerate(model.base_model.layers):
        of_seeds = [seed.base_model.layers[index] for seed in seeds]
        layer.mlp = FfnLoop([copy.deepcopy(x.mlp) for x in of_seeds], routers[f"{index}.ffn"], top_k, normalize)
        if attention_experts:
            experts = [copy.deepcopy(getattr(x, place)) for x in of_seeds]
            if shared_key_value:
                share_key_value(experts, model.config)
            setattr(layer, place, AttentionLoop(experts, routers[f"{index}.attention"]))
    return model.double()


def averaged(seeds: Sequence[nn.Module]) -> nn.Module:
    """The mean of all parameters."""
    model = copy.deepcopy(seeds[0])
    states = [dict(seed.named_parameters()) for seed in seeds]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(mean([state[name] for state in states]))
    return model


def share_key_value(experts: Sequence[nn.Module], config) -> None:
    """Give every expert the mean of the keys' and values' parameters."""
    with torch.no_grad():
        for name, _ in experts[0].named_parameters():
            others = [dict(expert.named_parameters())[name] for expert in experts]
            if is_key_value(name):
                shared = mean(others)
                for other in others:
                    other.copy_(shared)
            elif "qkv_proj" in name:  # Phi3: queries first, then keys and values
                rows = config.num_attention_heads * experts[0].head_dim
                shared = mean([other[rows:] for other in others])
                for other in others:
                    other[rows:] = shared


def interleave(tensors: Sequence[torch.Tensor], groups: int, axis: int = 0) -> torch.Tensor:
    """Lay experts side by side within each of `groups` equal shares of an axis: (group, expert, rest)."""
    return torch.stack([t.unflatten(axis, (groups, -1)) for t in tensors], axis + 1).flatten(axis, axis + 2)


def widened(
    leaves: Sequence[Mapping[str, torch.Tensor]],
    routers: Mapping[str, torch.Tensor],
    config,
    *,
    attention_experts: bool,
    shared_key_value: bool,
) -> dict[str, torch.Tensor]:
    """The state a BAM model should hold, from the seeds' tensors: written down once more, in torch."""
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    neox = config.model_type == "gpt_neox"
    average = lambda tensors: sum(tensors[1:], tensors[0]) / len(tensors)  # noqa: E731
    state: dict[str, torch.Tensor] = {}
    gates: dict[str, torch.Tensor] = {}
    for name in leaves[0]:
        every = [leaf[name] for leaf in leaves]
        head, _, kind = name.rpartition(".")
        module = head.rpartition(".")[2]
        if ".mlp." in name:
            block = head.rpartition(".")[0]
            stacked = torch.stack(every)
            suffix = "_bias" if kind == "bias" else ""
            if module == "gate_proj":
                gates[block + suffix] = stacked
            elif module == "up_proj":
                state[f"dense.{block}.experts.gate_up_proj{suffix}"] = torch.cat([gates[block + suffix], stacked], 1)
            elif module == "gate_up_proj":
                state[f"dense.{block}.experts.gate_up_proj{suffix}"] = stacked
            elif module in ("c_fc", "dense_h_to_4h"):
                state[f"dense.{block}.experts.up_proj{suffix}"] = stacked
            else:
                state[f"dense.{block}.experts.down_proj{suffix}"] = stacked
        elif not attention_experts or not (".self_attn." in name or ".attention." in name):
            state[f"dense.{name}"] = average(every)
        elif module in ("o_proj", "dense"):
            wide = torch.stack(every) if kind == "bias" else interleave(every, groups, 1)
            state[f"dense.{head}.{'bias' if kind == 'bias' else 'linear.weight'}"] = wide
        elif module == "qkv_proj":
            q, k, v = zip(*(t.split([heads * head_dim] + 2 * [groups * head_dim]) for t in every), strict=True)
            mix = average if shared_key_value else (lambda t: interleave(t, groups))
            state[f"dense.{name}"] = torch.cat([interleave(q, groups), mix(k), mix(v)])
        elif shared_key_value and is_key_value(name):
            state[f"dense.{name}"] = average(every)
        elif module in ("q_norm", "k_norm") and every[0].dim() == 1:
            between = {"gemma3_text": (1, 1), "olmo2": ()}.get(config.model_type, (1,))
            state[f"dense.{head}.norm.weight"] = torch.stack(every).view(len(every), *between, -1)
        else:
            state[f"dense.{name}"] = interleave(every, heads if neox else groups)
    place, output = ("attention", "dense") if neox else ("self_attn", "o_proj")
    base = "gpt_neox" if neox else "model"
    for key, router in routers.items():
        layer, kind = key.split(".")
        at = f"dense.{base}.layers.{layer}."
        if kind == "ffn":
            state[f"{at}mlp.router.weight"] = router
        elif attention_experts:
            state[f"{at}{place}.{output}.router.weight"] = router
    return state
