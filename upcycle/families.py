"""The dense architectures that can be mixed, one table entry each.

A config.json is read as plain JSON, without transformers; an entry's `defaults` are the values that transformers'
own class fills in for keys that a config leaves out (the tests compare them with those classes).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

# Where a projection's rows belong: `{"qkv_proj": ("query", "key", "value")}` is one matrix for all three.
_SEPARATE: Final = {"q_proj": ("query",), "k_proj": ("key",), "v_proj": ("value",)}
_GATED: Final = ("gate_proj", "up_proj")


@dataclass(frozen=True)
class Family:
    """How one architecture names and shapes its tensors.

    Attributes:
        architecture: the transformers class.
        defaults: what transformers assumes for keys that a config.json leaves out.
        ffn_in: the projections into the FFN, gate before up; one name is a fused `[gate; up]` or a plain FFN.
        gated: whether the FFN is down(act(gate(x)) * up(x)), else down(act(up(x))).
        qkv: the projections into the attention and whose rows each holds.
        qkv_by_head: a fused projection's rows are ordered (head, query/key/value) instead of (query/key/value, head).
        grouped_queries: whether the attention knows fewer key/value heads than query heads.
        qkv_bias, output_bias, ffn_bias: False, True, or the config key that says.
        qk_norm: shape and place of the norms of queries and keys:
            "head" `[head_dim]` before heads and positions are swapped, "head_swapped" the same after,
            "width" `[heads * head_dim]`, "heads" `[heads, head_dim]`, or None.
        qk_norm_key: the config key that switches `qk_norm` on, where there is one.
        norms: the other norms of a layer, in the model's order.
        norm_bias: whether these norms, and the final one, have a bias.
        rope_theta: the default base of the rotary positions.
        local_rope_theta: that of the sliding layers, where they have one of their own.
        partial_rotary_factor: the default share of a head that is rotated, where a config can change it.
        sliding_every: layer i is sliding unless (i + 1) is a multiple of this (Gemma, Cohere2), 0 for other rules.
        plain_tokenizer: transformers reads tokenizer.json of this model type as it is, whatever tokenizer class
            tokenizer_config.json names; for other types the named class may rebuild parts of it.
        tokenizer: the class that transformers takes for this model type whatever is named, where it does.
        native: model type of transformers' mixture class whose layers are the family's (`native.py`), if there is one.
        token_ids: what transformers assumes for bos, eos and pad where a config leaves them out.
        dropped: endings of tensor names that old checkpoints hold and no model reads (buffers).
    """

    architecture: str
    defaults: Mapping[str, Any]
    base: str = "model"
    attention: str = "self_attn"
    qkv: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: _SEPARATE)
    qkv_by_head: bool = False
    grouped_queries: bool = True
    output: str = "o_proj"
    qkv_bias: bool | str = False
    output_bias: bool | str = False
    qk_norm: str | None = None
    qk_norm_key: str | None = None
    ffn_in: tuple[str, ...] = _GATED
    ffn_out: str = "down_proj"
    gated: bool = True
    ffn_bias: bool | str = False
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    norm_bias: bool = False
    embedding: str = "embed_tokens"
    final_norm: str = "norm"
    head: str = "lm_head"
    rope_theta: float = 10_000.0
    local_rope_theta: float | None = None
    partial_rotary_factor: float | None = None
    sliding_every: int = 0
    plain_tokenizer: bool = False
    tokenizer: str = ""
    native: str = ""
    token_ids: tuple[int | None, int | None, int | None] = (None, None, None)
    dropped: tuple[str, ...] = ("rotary_emb.inv_freq",)


_COMMON: Final = {"hidden_act": "silu", "tie_word_embeddings": False, "max_position_embeddings": 2048}
_SLIDING: Final = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None}
_GEMMA: Final = {
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6,
    "vocab_size": 256_000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
}
_COHERE: Final = {
    **_COMMON,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
    "layer_norm_eps": 1e-5,
    "logit_scale": 0.0625,
    "vocab_size": 256_000,
    "hidden_size": 8192,
    "intermediate_size": 22_528,
    "num_hidden_layers": 40,
    "num_attention_heads": 64,
    "num_key_value_heads": None,
    "attention_bias": False,
}
_GEMMA_NORMS: Final = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
_7B: Final = {
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
}
_QWEN: Final = {
    **_COMMON,
    **_SLIDING,
    **_7B,
    "vocab_size": 151_936,
    "intermediate_size": 22_016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
}

# Keyed by config.json's model_type.
FAMILIES: Final[Mapping[str, Family]] = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        native="mixtral",
        token_ids=(1, 2, None),
        defaults={
            **_COMMON,
            **_7B,
            "vocab_size": 32_000,
            "head_dim": None,
            "rms_norm_eps": 1e-6,
            "attention_bias": False,
            "mlp_bias": False,
        },
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        ffn_bias="mlp_bias",
    ),
    "mistral": Family(
        architecture="MistralForCausalLM",
        native="mixtral",
        token_ids=(1, 2, None),
        plain_tokenizer=True,
        defaults={
            **_COMMON,
            **_7B,
            "vocab_size": 32_000,
            "intermediate_size": 14_336,
            "num_key_value_heads": 8,
            "head_dim": None,
            "max_position_embeddings": 131_072,
            "rms_norm_eps": 1e-6,
            "sliding_window": 4096,
        },
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM", native="qwen2_moe", tokenizer="Qwen2Tokenizer", defaults=_QWEN, qkv_bias=True
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        native="qwen3_moe",
        defaults={**_QWEN, "head_dim": 128, "attention_bias": False},
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        qk_norm="head",
    ),
    "gemma": Family(
        architecture="GemmaForCausalLM",
        token_ids=(2, 1, 0),
        defaults={
            **_COMMON,
            "hidden_act": "gelu_pytorch_tanh",
            "tie_word_embeddings": True,
            "vocab_size": 256_000,
            "hidden_size": 3072,
            "intermediate_size": 24_576,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "head_dim": 256,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-6,
            "attention_bias": False,
            "use_bidirectional_attention": None,
        },
        qkv_bias="attention_bias",
        output_bias="attention_bias",
    ),
    "gemma2": Family(
        architecture="Gemma2ForCausalLM",
        defaults={
            **_GEMMA,
            "max_position_embeddings": 8192,
            "final_logit_softcapping": 30.0,
            "attn_logit_softcapping": 50.0,
            "use_bidirectional_attention": None,
        },
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        norms=_GEMMA_NORMS,
        sliding_every=2,
    ),
    "gemma3_text": Family(
        architecture="Gemma3ForCausalLM",
        defaults={
            **_GEMMA,
            "vocab_size": 262_208,
            "max_position_embeddings": 131_072,
            "final_logit_softcapping": None,
            "attn_logit_softcapping": None,
            "use_bidirectional_attention": False,
        },
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        qk_norm="head_swapped",
        norms=_GEMMA_NORMS,
        rope_theta=1_000_000.0,
        local_rope_theta=10_000.0,
        sliding_every=6,
    ),
    "cohere": Family(
        architecture="CohereForCausalLM",
        defaults={**_COHERE, "use_qk_norm": False},
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        qk_norm="heads",
        qk_norm_key="use_qk_norm",
        norms=("input_layernorm",),
        rope_theta=500_000.0,
    ),
    "cohere2": Family(
        architecture="Cohere2ForCausalLM",
        native="cohere2_moe",
        token_ids=(5, 255_001, 0),
        defaults={**_COHERE, "sliding_window": 4096, "layer_types": None},
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        norms=("input_layernorm",),
        sliding_every=4,
    ),
    "olmo2": Family(
        architecture="Olmo2ForCausalLM",
        native="flex_olmo",
        token_ids=(None, 50_279, 1),
        plain_tokenizer=True,
        defaults={**_COMMON, **_7B, "vocab_size": 50_304, "rms_norm_eps": 1e-5, "attention_bias": False},
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        qk_norm="width",
        norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    ),
    "granite": Family(
        architecture="GraniteForCausalLM",
        native="granitemoe",
        token_ids=(1, 2, None),
        plain_tokenizer=True,
        defaults={
            **_COMMON,
            **_7B,
            "vocab_size": 32_000,
            "rms_norm_eps": 1e-6,
            "attention_bias": False,
            "mlp_bias": False,
            "embedding_multiplier": 1.0,
            "logits_scaling": 1.0,
            "residual_multiplier": 1.0,
            "attention_multiplier": 1.0,
        },
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        ffn_bias="mlp_bias",
    ),
    "smollm3": Family(
        architecture="SmolLM3ForCausalLM",
        defaults={
            **_COMMON,
            "vocab_size": 128_256,
            "hidden_size": 2048,
            "intermediate_size": 11_008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32_768,
            "rms_norm_eps": 1e-6,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "sliding_window": None,
            "no_rope_layers": None,
            "no_rope_layer_interval": 4,
            "layer_types": None,
        },
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        ffn_bias="mlp_bias",
        rope_theta=2_000_000.0,
    ),
    "phi3": Family(
        architecture="Phi3ForCausalLM",
        plain_tokenizer=True,
        defaults={
            **_COMMON,
            **_7B,
            "vocab_size": 32_064,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "sliding_window": None,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
        },
        qkv={"qkv_proj": ("query", "key", "value")},
        ffn_in=("gate_up_proj",),
        partial_rotary_factor=1.0,
    ),
    "starcoder2": Family(
        architecture="Starcoder2ForCausalLM",
        defaults={
            **_COMMON,
            "hidden_act": "gelu_pytorch_tanh",
            "vocab_size": 49_152,
            "hidden_size": 3072,
            "intermediate_size": 12_288,
            "num_hidden_layers": 30,
            "num_attention_heads": 24,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "norm_epsilon": 1e-5,
            "sliding_window": None,
            "residual_dropout": 0.0,
            "embedding_dropout": 0.0,
            "use_bias": True,
            "tie_word_embeddings": True,
        },
        qkv_bias="use_bias",
        output_bias="use_bias",
        ffn_in=("c_fc",),
        ffn_out="c_proj",
        gated=False,
        ffn_bias="use_bias",
        norm_bias=True,
    ),
    "gpt_neox": Family(
        architecture="GPTNeoXForCausalLM",
        defaults={
            **_COMMON,
            "hidden_act": "gelu",
            "vocab_size": 50_432,
            "hidden_size": 6144,
            "intermediate_size": 24_576,
            "num_hidden_layers": 44,
            "num_attention_heads": 64,
            "layer_norm_eps": 1e-5,
            "hidden_dropout": 0.0,
            "use_parallel_residual": True,
            "attention_bias": True,
        },
        base="gpt_neox",
        attention="attention",
        qkv={"query_key_value": ("query", "key", "value")},
        qkv_by_head=True,
        grouped_queries=False,
        output="dense",
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        ffn_in=("dense_h_to_4h",),
        ffn_out="dense_4h_to_h",
        gated=False,
        ffn_bias=True,
        norm_bias=True,
        embedding="embed_in",
        final_norm="final_layer_norm",
        head="embed_out",
        partial_rotary_factor=0.25,
        dropped=("rotary_emb.inv_freq", "attention.bias", "attention.masked_bias"),
    ),
}
