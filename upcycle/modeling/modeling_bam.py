"""The BAM model (Branch-Attend-Mix, arXiv:2408.08274): the seed's own model, widened.

A soft mixture of N attention experts is the seed's attention with N times as many heads, whose heads are scaled by
their expert's gate before one wide output projection: sum_i g_i (o_i W_i) = concat_i(g_i o_i) concat_i(W_i). So the
model is built from the seed family's own class, and each layer changes in two places: the attention's projections are
widened and its output projection gated, and the MLP becomes routed experts. Everything else (block order, norms,
positions, masks, caches, attention kernels) is the family's.

This file travels inside each checkpoint and needs nothing but torch and transformers.

Axes: B batch, S sequence, T tokens (B * S), N experts, K experts per token, D hidden, I inner, H heads, d head_dim.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils.generic import can_return_tuple

from .configuration_bam import BamConfig

_ABILITIES = (
    *("_supports_sdpa", "_supports_flash_attn", "_supports_flex_attn", "_supports_attention_backend"),
    "_can_compile_fullgraph",
)


def _softmax(logits: Any) -> torch.Tensor:
    """Gates from router logits, in fp32 or better."""
    return logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


@use_experts_implementation
class BamExperts(nn.Module):
    """N FFNs stacked in transformers' own layout, so that its experts switch (eager, grouped_mm, ...) serves them.

    Parameters: gated `gate_up_proj [N, 2I, D]` or plain `up_proj [N, I, D]`, and `down_proj [N, D, I]`; with biases
    `gate_up_proj_bias [N, 2I]` or `up_proj_bias [N, I]`, and `down_proj_bias [N, D]`.
    """

    def __init__(self, config: BamConfig, gated: bool, bias: bool):
        super().__init__()
        dense = config.dense_config
        experts, hidden = config.num_experts, dense.hidden_size
        inner = dense.intermediate_size // config.granularity
        self.num_experts = experts
        self.act_fn = ACT2FN[getattr(dense, "hidden_activation", None) or dense.hidden_act]
        self.input_name = "gate_up_proj" if gated else "up_proj"
        rows = 2 * inner if gated else inner
        self.register_parameter(self.input_name, nn.Parameter(torch.empty(experts, rows, hidden)))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, inner))
        if bias:
            self.register_parameter(f"{self.input_name}_bias", nn.Parameter(torch.empty(experts, rows)))
            self.down_proj_bias = nn.Parameter(torch.empty(experts, hidden))

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Sum over the K selected experts of gate * FFN; `[T, D]`, indices and gates `[T, K]`; loops over experts."""
        wide_in, bias_in = getattr(self, self.input_name), getattr(self, f"{self.input_name}_bias", None)
        bias_out = getattr(self, "down_proj_bias", None)
        result = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            token, slot = (top_k_index == expert).nonzero(as_tuple=True)
            inner = nn.functional.linear(
                hidden_states[token], wide_in[expert], None if bias_in is None else bias_in[expert]
            )
            if self.has_gate:
                gate, up = inner.chunk(2, dim=-1)
                inner = self.act_fn(gate) * up
            else:
                inner = self.act_fn(inner)
            out = nn.functional.linear(inner, self.down_proj[expert], None if bias_out is None else bias_out[expert])
            result = result.index_add(0, token, out * top_k_weights[token, slot, None])
        return result


class BamFeedForward(nn.Module):
    """Routed FFN experts: y = sum over the top k of p_i(x) FFN_i(x), p = softmax(W_r x) (arXiv:2408.08274, 3).

    Where the config has an `ffn_scale`, y is multiplied by the layer's. Shared experts, the seed's own MLPs, are added.
    """

    def __init__(self, config: BamConfig, mlp: nn.Module, layer: int):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.normalize = config.norm_topk_prob
        self.dropout = getattr(mlp, "residual_dropout", 0.0)  # StarCoder2's MLP ends with one
        gated = config.dense_layout["gated"]
        bias = any(name.endswith("bias") for name, _ in mlp.named_parameters())
        self.router = nn.Linear(config.hidden_size, config.num_experts, bias=config.router_bias)
        experts: Any = BamExperts(config, gated, bias)
        experts.has_gate, experts.has_bias = gated, bias
        self.experts = experts
        self.shared = nn.ModuleList(copy.deepcopy(mlp) for _ in range(config.num_shared_experts))
        self.collected: list[torch.Tensor] | None = None
        self.start = None if config.ffn_scale is None else float(config.ffn_scale[layer])
        self.scale: torch.Tensor | None
        # A buffer and not a number, so that all layers look alike to a compiler.
        self.register_buffer(
            "scale", None if self.start is None else torch.tensor(self.start, dtype=torch.float32), persistent=False
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Mix `[..., D]`; the router's logits `[T, N]` go to `collected` while somebody collects."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits = self.router(tokens)
        if self.collected is not None:
            self.collected.append(logits)
        gates, experts = _softmax(logits).topk(self.top_k, dim=-1)
        if self.normalize:
            gates = gates / gates.sum(-1, keepdim=True)
        if self.scale is not None:
            gates = gates * self.scale
        mixed = self.experts(tokens, experts, gates.to(tokens.dtype)).reshape(hidden_states.shape)
        if self.dropout:
            mixed = nn.functional.dropout(mixed, self.dropout, self.training)
        for expert in self.shared:
            mixed = mixed + expert(hidden_states)
        return mixed


class GatedOutput(nn.Module):
    """The wide output projection: heads scaled by their expert's gate, y = sum_i g_i(x) o_i W_i, g = softmax(W_a x).

    The projection is an inner plain `linear`, so that adapters and quantisers may replace it. `bias` is `[N, D]`,
    one an expert, gated like the weights.
    """

    def __init__(self, output: nn.Linear, config: BamConfig):
        super().__init__()
        self.experts, self.key_value_heads = config.attention_width, config.dense_key_value_heads
        self.top_k, self.normalize = config.num_attention_experts_per_tok, config.norm_topk_attention
        self.linear = nn.Linear(self.experts * output.in_features, output.out_features, bias=False)
        self.bias = nn.Parameter(torch.empty(self.experts, output.out_features)) if output.bias is not None else None
        self.router = nn.Linear(config.hidden_size, self.experts, bias=False)
        self.gates: torch.Tensor | None = None
        self.collected: list[torch.Tensor] | None = None

    def route(self, hidden_states: torch.Tensor) -> None:
        """Take the gates `[B, S, N]` for the coming forward from the attention's input `[B, S, D]`."""
        logits = self.router(hidden_states)
        if self.collected is not None:
            self.collected.append(logits.flatten(0, -2))
        gates = _softmax(logits)
        if self.top_k is not None:
            largest, experts = gates.topk(self.top_k, dim=-1)
            if self.normalize:
                largest = largest / largest.sum(-1, keepdim=True)
            gates = torch.zeros_like(gates).scatter(-1, experts, largest)
        self.gates = gates

    def forward(self, heads: torch.Tensor) -> torch.Tensor:
        """Heads `[B, S, H * N * d]`, ordered (key/value head, expert, head in its group), to `[B, S, D]`."""
        assert self.gates is not None, "the attention's pre-hook routes first"
        gates, self.gates = self.gates.to(heads.dtype), None
        output = self.linear(self.scale(heads, gates))
        return output if self.bias is None else output + gates @ self.bias

    def scale(self, heads: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """Heads times their expert's gate `[B, S, N]`; a training may put a fused kernel in this method's place."""
        by_expert = heads.unflatten(-1, (self.key_value_heads, self.experts, -1))
        return (by_expert * gates[..., None, :, None]).flatten(-3)


class ExpertNorm(nn.Module):
    """The family's own norm of queries or keys, with one weight per expert instead of one in all.

    The heads are viewed as (key/value head, expert, head in its group), so that a weight `[N, 1, d]` ("head"),
    `[N, 1, 1, d]` ("head_swapped": heads before positions) or `[N, W]` ("width": one norm over an expert's whole width)
    broadcasts in the norm's own code.
    """

    def __init__(self, norm: Any, kind: str, config: BamConfig):
        super().__init__()
        between = {"head": (1,), "head_swapped": (1, 1), "width": ()}[kind]
        weight = norm.weight.detach().expand(config.attention_width, *between, -1)
        norm.weight = nn.Parameter(weight.clone())  # the family's own start, which its initialisation has set already
        self.norm = norm
        self.kind, self.experts, self.key_value_heads = kind, config.attention_width, config.dense_key_value_heads

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Normalise `[B, S, H, d]`, `[B, H, S, d]` or `[B, S, H * d]`, by kind."""
        sizes = (self.key_value_heads, self.experts, -1)
        if self.kind == "head":
            return self.norm(states.unflatten(-2, sizes)).flatten(-4, -2)
        if self.kind == "head_swapped":
            return self.norm(states.unflatten(-3, sizes)).flatten(-5, -3)
        by_expert = states.unflatten(-1, sizes).transpose(-3, -2)
        normed = self.norm(by_expert.flatten(-2)).unflatten(-1, (self.key_value_heads, -1))
        return normed.transpose(-3, -2).flatten(-3)


class WideConfig:
    """The seed's config as seen by an attention that splits one fused projection by the config's head counts (Phi3)."""

    def __init__(self, config: Any, **widened: int):
        self._config = config
        self.__dict__.update(widened)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_config":
            raise AttributeError(name)
        return getattr(self._config, name)


def widen(dense: Any, config: BamConfig) -> None:
    """Turn a family's own model into the mixture, in place."""
    for number, layer in enumerate(dense.base_model.layers):
        if config.mixed_layers is not None and number not in config.mixed_layers:
            continue
        if config.attention_experts:
            _widen_attention(getattr(layer, config.dense_layout["attention"]), dense.config, config)
        layer.mlp = BamFeedForward(config, layer.mlp, number)


def _widen_attention(attention: Any, dense_config: Any, config: BamConfig) -> None:
    layout, experts = config.dense_layout, config.attention_width
    copies = {"query": experts, "key": experts, "value": experts}
    if config.shared_key_value:
        copies["key"] = copies["value"] = 1
        attention.num_key_value_groups *= experts
    shares = {"query": dense_config.num_attention_heads // config.dense_key_value_heads, "key": 1, "value": 1}
    for name, parts in layout["projections"].items():
        dense = getattr(attention, name)
        unit = dense.out_features // sum(shares[part] for part in parts)
        rows = sum(unit * shares[part] * copies[part] for part in parts)
        setattr(attention, name, nn.Linear(dense.in_features, rows, bias=dense.bias is not None))
    if layout["qk_norm"] is not None:
        for name, part in (("q_norm", "query"), ("k_norm", "key")):
            norm = getattr(attention, name)
            if layout["qk_norm"] == "heads":
                norm.weight = nn.Parameter(norm.weight.detach().repeat(copies[part], 1))
            elif copies[part] > 1:
                setattr(attention, name, ExpertNorm(norm, layout["qk_norm"], config))
    if len(layout["projections"]) == 1 and not layout["fused_by_head"]:
        counts = {"num_attention_heads": config.num_attention_heads, "num_key_value_heads": config.num_key_value_heads}
        attention.config = WideConfig(dense_config, **counts)
        attention.num_key_value_heads = config.num_key_value_heads
    setattr(attention, layout["output"], GatedOutput(getattr(attention, layout["output"]), config))
    # The router reads what the attention reads. Named, not bound, so that copies of the model route by their own.
    attention.register_forward_pre_hook(partial(_route, layout["output"]), with_kwargs=True)


def _route(output: str, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    getattr(attention, output).route(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])


@dataclass
class BamCausalLMOutput(CausalLMOutputWithPast):
    """The usual output and, per layer, the routers' logits: `router_logits` of the FFN, `attention_router_logits`.

    `loss` = NLL + sum over layers (alpha * L_LB + beta * L_z); `load_balance_loss` and `z_loss` are the two sums over
    layers, before their weights. Logits are `[T, N]`.
    """

    load_balance_loss: torch.Tensor | None = None
    z_loss: torch.Tensor | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None
    attention_router_logits: tuple[torch.Tensor, ...] | None = None


def _token_mean(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Mean over tokens `[T, ...]`, those that `mask [T]` leaves out not counted."""
    if mask is None:
        return values.mean(0)
    return torch.einsum("t...,t->...", values, mask.to(values.dtype)) / mask.sum().clamp(min=1)


def load_balance_loss(logits: torch.Tensor, top_k: int, mask: torch.Tensor | None = None) -> torch.Tensor:
    """L_LB = N sum_i f_i P_i: f_i the fraction of tokens routed to expert i, P_i the mean of p_i (arXiv:2408.08274)."""
    probabilities = _softmax(logits)
    chosen = torch.zeros_like(probabilities).scatter(-1, probabilities.topk(top_k, dim=-1).indices, 1.0)
    return logits.shape[-1] * (_token_mean(chosen, mask) * _token_mean(probabilities, mask)).sum()


def z_loss(logits: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """L_z = mean over tokens of (logsumexp of the router's logits)^2 (arXiv:2202.08906, equation 5)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return _token_mean(logits.logsumexp(-1).square(), mask)


class BamPreTrainedModel(PreTrainedModel):
    """What both BAM classes share: the widened model, and access to it."""

    config_class = BamConfig
    base_model_prefix = "dense"
    supports_gradient_checkpointing = True

    def __init__(self, config: BamConfig):
        # What the family's attention can do, the mixture can: it is the same attention.
        dense_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config.dense_config)]
        for ability in _ABILITIES:
            setattr(self, ability, getattr(dense_class, ability))
        super().__init__(config)

    def _build(self, auto_class: Any) -> PreTrainedModel:
        config = self.config
        # The choice of an experts implementation is the mixture's own: the seed's class knows none and refuses it.
        config.dense_config._experts_implementation = None
        dense = auto_class.from_config(
            config.dense_config, dtype=torch.get_default_dtype(), attn_implementation=config._attn_implementation
        )
        config.dense_config = dense.config  # from_config copies it; one object keeps switches in step
        widen(dense, config)
        return dense

    def initialize_weights(self) -> None:
        """Initialise what no file gave; the family's own code does not know the experts."""
        super().initialize_weights()
        std = getattr(self.config, "initializer_range", None) or 0.02
        for module in self.modules():
            if isinstance(module, BamFeedForward) and module.scale is not None:
                init.constant_(module.scale, module.start)  # a model loaded through the meta device has lost it
            if isinstance(module, (BamExperts, GatedOutput)):
                for name, parameter in module.named_parameters(recurse=False):
                    if name.endswith("bias"):
                        init.zeros_(parameter)
                    else:
                        init.normal_(parameter, mean=0.0, std=std)

    def _inner(self) -> Any:
        raise NotImplementedError

    def get_input_embeddings(self) -> nn.Module:
        """The seed's token embedding."""
        return self._inner().get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self._inner().set_input_embeddings(value)


class BamModel(BamPreTrainedModel):
    """The mixture without its output head."""

    _keys_to_ignore_on_load_unexpected: ClassVar = [r"lm_head\.weight", r"embed_out\.weight"]

    def __init__(self, config: BamConfig):
        super().__init__(config)
        inner = self._build(AutoModel)
        # The name under which the family's causal class holds it, so that both classes read the same checkpoint.
        setattr(self, inner.base_model_prefix, inner)
        self.post_init()

    def _inner(self) -> Any:
        return next(child for child in self.children() if isinstance(child, PreTrainedModel))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The family's own forward: hidden states `[B, S, D]`."""
        return self._inner()(*args, **kwargs)


class BamForCausalLM(BamPreTrainedModel, GenerationMixin):
    """The mixture as a causal language model."""

    def __init__(self, config: BamConfig):
        super().__init__(config)
        self.dense = self._build(AutoModelForCausalLM)
        self.post_init()

    def _inner(self) -> Any:
        return self.dense

    def get_output_embeddings(self) -> nn.Module:
        """The seed's output head."""
        return self.dense.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the output head."""
        self.dense.set_output_embeddings(value)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Resize both embeddings, and keep the seed's config in step."""
        embedding = super().resize_token_embeddings(*args, **kwargs)
        self.config.dense_config.vocab_size = self.dense.vocab_size = self.config.vocab_size
        return embedding

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_router_logits: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """The family's own forward; with `output_router_logits` a `BamCausalLMOutput` with the routers' losses."""
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        for switch in ("output_hidden_states", "output_attentions"):
            if getattr(self.config, switch, False):
                kwargs.setdefault(switch, True)
        with self._collecting(output_router_logits) as (ffn_logits, attention_logits):
            outputs = self.dense(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                labels=labels,
                use_cache=getattr(self.config, "use_cache", None) if use_cache is None else use_cache,
                logits_to_keep=logits_to_keep,
                **kwargs,
            )
        if not output_router_logits:
            return outputs
        mask = None
        if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
            inputs: Any = inputs_embeds if input_ids is None else input_ids
            length = inputs.shape[1]
            mask = attention_mask[:, -length:].reshape(-1)  # earlier columns are the cache's
        ffn, attention = ([logits for own in lists for logits in own] for lists in (ffn_logits, attention_logits))
        return self._with_router_losses(outputs, ffn, attention, mask)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """The family's own: Phi3's begins anew where its positions switch from short to long."""
        return self.dense.prepare_inputs_for_generation(*args, **kwargs)

    @contextmanager
    def _collecting(self, wanted: bool) -> Iterator[tuple[list[list[torch.Tensor]], list[list[torch.Tensor]]]]:
        """Lists that the FFNs' and the attentions' routers fill with logits `[T, N]` within the block, never outside.

        Each router has a list of its own: all layers then look alike to a compiler, which compiles one for all.
        """
        layers = self.dense.base_model.layers if wanted else []
        ffn: Any = [layer.mlp for layer in layers if isinstance(layer.mlp, BamFeedForward)]
        attention: Any = [module for layer in layers for module in layer.modules() if isinstance(module, GatedOutput)]
        for module in (*ffn, *attention):
            module.collected = []
        try:
            yield [module.collected for module in ffn], [module.collected for module in attention]
        finally:
            for module in (*ffn, *attention):
                module.collected = None

    def _with_router_losses(
        self, outputs: Any, ffn: list[torch.Tensor], attention: list[torch.Tensor], mask: torch.Tensor | None
    ) -> BamCausalLMOutput:
        if torch.is_grad_enabled() and outputs.logits.requires_grad and not ffn[0].requires_grad:
            for name, parameter in self.named_parameters():
                if name.endswith("mlp.router.weight") and parameter.requires_grad:
                    raise ValueError(
                        "router losses have no gradient under reentrant gradient checkpointing; enable it with "
                        'gradient_checkpointing_kwargs={"use_reentrant": False}'
                    )
        device = outputs.logits.device  # layers may lie on several
        top_k = self.config.num_experts_per_tok
        balance = torch.stack([load_balance_loss(x.to(device), top_k, mask) for x in ffn]).sum()
        z = torch.stack([z_loss(x.to(device), mask) for x in (*ffn, *attention)]).sum()
        loss = outputs.loss
        if loss is not None:
            loss = loss + self.config.router_aux_loss_coef * balance + self.config.router_z_loss_coef * z
        return BamCausalLMOutput(
            **{**outputs, "loss": loss},
            load_balance_loss=balance,
            z_loss=z,
            router_logits=tuple(ffn),
            attention_router_logits=tuple(attention) or None,
        )
