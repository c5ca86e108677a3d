"""Configuration of a BAM mixture (Branch-Attend-Mix, arXiv:2408.08274): the seed's own config, and what is mixed.

This file travels inside each checkpoint and needs nothing but transformers.
"""

from typing import Any, ClassVar

from transformers import AutoConfig, PretrainedConfig

# What engines read off the top level, copied from the seed's config.
_SHOWN = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "initializer_range"),
    *("layer_types", "sliding_window", "dtype", "use_cache"),
)


# Of what only some mixtures have; left out of a config.json that has none of it.
_RARE = {
    "ffn_scale": None,
    "num_attention_experts": None,
    "num_attention_experts_per_tok": None,
    "norm_topk_attention": False,
    "granularity": 1,
    "num_shared_experts": 0,
    "router_bias": False,
    "mixed_layers": None,
}


class BamConfig(PretrainedConfig):
    """A mixture of `num_experts` dense models of one family.

    Args:
        dense_config: the seed's config, untouched; a dict or a config object.
        dense_layout: how the seed's modules are named and shaped: `attention` and `output` (names), `projections` (name
            to the list of query, key, value it holds), `qk_norm` (None, "head", "head_swapped", "width", "heads"),
            `gated` (the FFN), `fused_by_head`. Llama's names by default.
        expert_names: the experts' names, in their order.
        num_experts: N, FFN experts in every layer, and (with `attention_experts`) attention experts, unless
            `num_attention_experts` gives another number of these.
        num_experts_per_tok: k, FFN experts a token uses.
        norm_topk_prob: rescale the selected gates to sum to 1; the paper does not.
        ffn_scale: one number a layer, by which the FFN's gates are multiplied, or None. Soft gates that are not
            rescaled make an FFN quieter than the seeds'; this makes up for it, on average over the text that set the
            routers.
        attention_experts: attention is a soft mixture of N attention experts, else one dense attention.
        shared_key_value: the attention experts share keys and values.
        num_attention_experts_per_tok: attention experts of which a token uses the output, those with the largest gates;
            None for all. `norm_topk_attention` rescales their gates to sum to 1.
        granularity: G, each FFN expert has 1/G of the seed's inner units.
        num_shared_experts: FFNs of the seed's own kind that every token uses beside the routed ones.
        router_bias: the FFN routers have a bias.
        mixed_layers: numbers of the layers that have experts, None for all; the others are the seed's own.
        router_aux_loss_coef: weight of the load-balance loss.
        router_z_loss_coef: weight of the z-loss.
        output_router_logits: return router logits, and add both losses to the loss.
        format_version: of the checkpoint's tensors.
    """

    model_type = "bam"
    sub_configs: ClassVar = {"dense_config": AutoConfig}
    has_no_defaults_at_init = True

    def __init__(
        self,
        dense_config: Any = None,
        dense_layout: dict[str, Any] | None = None,
        num_experts: int = 4,
        expert_names: list[str] | None = None,
        num_experts_per_tok: int = 1,
        norm_topk_prob: bool = False,
        ffn_scale: list[float] | None = None,
        attention_experts: bool = True,
        shared_key_value: bool = False,
        num_attention_experts: int | None = None,
        num_attention_experts_per_tok: int | None = None,
        norm_topk_attention: bool = False,
        granularity: int = 1,
        num_shared_experts: int = 0,
        router_bias: bool = False,
        mixed_layers: list[int] | None = None,
        router_aux_loss_coef: float = 0.01,
        router_z_loss_coef: float = 0.001,
        output_router_logits: bool = False,
        format_version: int = 1,
        **kwargs: Any,
    ) -> None:
        if isinstance(dense_config, dict):
            dense_config = AutoConfig.for_model(**dense_config)
        self.dense_config = dense_config
        self.dense_layout = {
            "attention": "self_attn",
            "projections": {"q_proj": ["query"], "k_proj": ["key"], "v_proj": ["value"]},
            "output": "o_proj",
            "qk_norm": None,
            "gated": True,
            "fused_by_head": False,
            **(dense_layout or {}),
        }
        self.num_experts = num_experts
        self.expert_names = expert_names or [str(expert) for expert in range(num_experts)]
        self.num_experts_per_tok = num_experts_per_tok
        self.norm_topk_prob = norm_topk_prob
        self.ffn_scale = ffn_scale
        self.attention_experts = attention_experts
        self.shared_key_value = shared_key_value
        self.num_attention_experts = num_attention_experts
        self.num_attention_experts_per_tok = num_attention_experts_per_tok
        self.norm_topk_attention = norm_topk_attention
        self.granularity = granularity
        self.num_shared_experts = num_shared_experts
        self.router_bias = router_bias
        self.mixed_layers = mixed_layers
        self.router_aux_loss_coef = router_aux_loss_coef
        self.router_z_loss_coef = router_z_loss_coef
        self.output_router_logits = output_router_logits
        self.format_version = format_version
        if dense_config is not None:
            heads = dense_config.num_attention_heads
            key_value_heads = getattr(dense_config, "num_key_value_heads", None) or heads
            self.dense_key_value_heads = key_value_heads
            wide = (num_attention_experts or num_experts) if attention_experts else 1
            self.attention_width = wide
            # One cache serves every expert, so generation needs the widened counts.
            kwargs["num_attention_heads"] = heads * wide
            kwargs["num_key_value_heads"] = key_value_heads * (1 if shared_key_value else wide)
            kwargs["head_dim"] = getattr(dense_config, "head_dim", None) or dense_config.hidden_size // heads
            for key in _SHOWN:
                if hasattr(dense_config, key):
                    kwargs.setdefault(key, getattr(dense_config, key))
        super().__init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Plain data; what follows from `dense_config` alone is left out."""
        derived = {"dense_key_value_heads", "attention_width"}
        table = {key: value for key, value in super().to_dict().items() if key not in derived}
        return {key: value for key, value in table.items() if key not in _RARE or value != _RARE[key]}
