"""transformers' own mixture classes: which families they fit, how they name what they hold, and their config.json.

A class fits where it computes exactly what the recipe says. Names are those of published checkpoints, which older and
newer versions of transformers and other engines read; the config is in transformers 4's spelling, which 5 reads too,
but for rotary positions of a class that only 5 has.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from upcycle.dense_config import DenseModel
from upcycle.numeric import TORCH_NAMES
from upcycle.recipe import Recipe, mixed_layers

IDLE_UNITS: Final = 64  # of a shared expert that does nothing
_PER_EXPERT: Final = (
    "experts.{}.gate_proj.weight",
    "experts.{}.up_proj.weight",
    "experts.{}.down_proj.weight",
)
# Read by nothing else than `needs`, or written by `native_config` itself.
_NOT_CARRIED: Final = {
    *("rope", "head_dim", "intermediate_size", "layer_types", "mlp_bias", "use_sliding_window", "max_window_layers"),
    *("attention_bias", "sliding_window"),
}


@dataclass(frozen=True)
class NativeClass:
    """One of transformers' own mixture classes.

    Attributes:
        architecture: the class.
        block: what a layer calls its mixture.
        router: the router's weight `[E, D]` in it.
        experts: each expert's gate, up and down, `{}` its number; or two names of stacked `[gate; up]` and down.
        count, inner: the config's keys of the number of experts and of the inner units of each.
        rescales: the class rescales the selected gates to sum to 1, whatever its config says.
        needs: what the dense config must say, since the class knows nothing else.
        carries: keys beyond those that all classes take over from the dense config.
        adds: keys that always have this value.
        head_dim: whether a head's size may be another than the hidden size over the number of heads.
        gated_shared: the class has one shared expert, behind a sigmoid of its own, and cannot be without it.
        dense_layers: whether some layers may have no experts (`mlp_only_layers`).
        rope_parameters: the class reads scaled rotary positions in transformers 5's spelling alone.
    """

    architecture: str
    block: str = "mlp"
    router: str = "gate.weight"
    experts: tuple[str, ...] = _PER_EXPERT
    count: str = "num_experts"
    inner: str = "intermediate_size"
    rescales: bool = False
    needs: Mapping[str, Any] = field(default_factory=dict)
    carries: tuple[str, ...] = ()
    adds: Mapping[str, Any] = field(default_factory=dict)
    head_dim: bool = False
    gated_shared: bool = False
    dense_layers: bool = False
    rope_parameters: bool = False


_NO_BIASES: Final = {"attention_bias": False, "mlp_bias": False}
_QWEN_ADDS: Final = {"use_sliding_window": False, "sliding_window": None, "decoder_sparse_step": 1}

# Keyed by config.json's model_type.
NATIVE: Final[Mapping[str, NativeClass]] = {
    "mixtral": NativeClass(
        architecture="MixtralForCausalLM",
        block="block_sparse_moe",
        experts=("experts.{}.w1.weight", "experts.{}.w3.weight", "experts.{}.w2.weight"),
        count="num_local_experts",
        rescales=True,
        needs=_NO_BIASES,
        carries=("sliding_window",),
        adds={"sliding_window": None, "router_jitter_noise": 0.0},
        head_dim=True,
    ),
    "qwen2_moe": NativeClass(
        architecture="Qwen2MoeForCausalLM",
        inner="moe_intermediate_size",
        needs={"sliding_window": None},
        adds={**_QWEN_ADDS, "qkv_bias": True},
        gated_shared=True,
        dense_layers=True,
    ),
    "qwen3_moe": NativeClass(
        architecture="Qwen3MoeForCausalLM",
        inner="moe_intermediate_size",
        needs={"sliding_window": None},
        carries=("attention_bias",),
        adds=_QWEN_ADDS,
        head_dim=True,
        dense_layers=True,
    ),
    "flex_olmo": NativeClass(architecture="FlexOlmoForCausalLM", carries=("attention_bias",)),
    "granitemoe": NativeClass(
        architecture="GraniteMoeForCausalLM",
        block="block_sparse_moe",
        router="router.layer.weight",
        experts=("input_linear.weight", "output_linear.weight"),
        count="num_local_experts",
        rescales=True,
        needs={"mlp_bias": False},
        carries=("attention_bias",),
    ),
    "cohere2_moe": NativeClass(
        architecture="Cohere2MoeForCausalLM",
        rescales=True,
        carries=("attention_bias", "sliding_window", "layer_types"),
        adds={"expert_selection_fn": "softmax", "norm_topk_prob": True, "num_shared_experts": 0},
        head_dim=True,
        rope_parameters=True,
    ),
}


def native_misfit(model: DenseModel, recipe: Recipe, from_text: bool) -> str | None:
    """Why no class of transformers' own computes exactly what a recipe makes of a family's models; None if one does.

    Args:
        from_text: whether its routers are set from text.
    """
    family, ffn = model.family, recipe.ffn_router
    if not recipe.ffn_experts:
        return f"recipe '{recipe.name}' makes a dense model"
    if recipe.attention_experts:
        return "its attention is mixed too, and no class but BAM's has attention experts"
    native = NATIVE.get(family.native)
    if native is None:
        return f"transformers has no mixture class whose layers are those of a {family.architecture}"
    name = native.architecture.removesuffix("ForCausalLM")
    for key, value in native.needs.items():
        if model.values.get(key, value) != value:
            return f"the seeds have {key} = {model.values[key]!r}, and {name} knows only {value!r}"
    sizes = model.sizes
    if not native.head_dim and sizes.heads * sizes.head_dim != sizes.hidden:
        return f"the seeds' heads have {sizes.head_dim} elements, and {name} knows only hidden_size / number of heads"
    if native.rescales and not ffn.normalize:
        return f"{name} always rescales the selected gates to sum to 1, and the recipe (normalize = false) does not"
    if ffn.bias:
        return f"{name}'s router has no bias"
    if len(recipe.experts.shared) > native.gated_shared:
        held = "one shared expert" if native.gated_shared else "no shared experts"
        return f"{name} has {held}, and the recipe makes {len(recipe.experts.shared)}"
    if len(mixed_layers(recipe.layers, sizes.layers)) < sizes.layers and not native.dense_layers:
        return f"{name} has experts in every layer, and the recipe leaves some dense"
    if from_text and ffn.keep_scale and not ffn.normalize:
        return f"its routers are set from text with a scale a layer (keep_scale), which {name} has not"
    return None


def native_config(
    config: Mapping[str, Any], model: DenseModel, recipe: Recipe, num_experts: int, dtype: str
) -> dict[str, Any]:
    """The config.json of a native mixture: what the dense model's says, in the mixture class's words.

    Args:
        config: the dense model's config.json.
        num_experts: as many as dense models are mixed.
        dtype: of the weights: "BF16", …
    """
    native = NATIVE[model.family.native]
    values, sizes = model.values, model.sizes
    carried = {key: values[key] for key in values if key not in _NOT_CARRIED}
    carried |= {key: values[key] for key in native.carries if key in values}
    ids = dict(zip(("bos_token_id", "eos_token_id", "pad_token_id"), model.family.token_ids, strict=True))
    ids = {key: config.get(key, default) for key, default in ids.items()}
    inner = {"intermediate_size": sizes.inner} | {native.inner: sizes.inner // recipe.experts.granularity}
    written = {
        "model_type": model.family.native,
        "architectures": [native.architecture],
        **native.adds,
        **carried,
        **ids,
        **inner,
        **{key: config[key] for key in ("initializer_range", "use_cache") if key in config},
        **({"head_dim": sizes.head_dim} if native.head_dim else {}),
        "num_key_value_heads": sizes.key_value_heads,
        **_rope(native, values["rope"]),
        native.count: recipe.ffn_count(num_experts),
        "num_experts_per_tok": recipe.ffn_active,
        "output_router_logits": False,
        "router_aux_loss_coef": recipe.loss.load_balance,
        "torch_dtype": TORCH_NAMES[dtype],
    }
    if not native.rescales:
        written["norm_topk_prob"] = recipe.ffn_router.normalize
    if native.gated_shared:
        written["shared_expert_intermediate_size"] = sizes.inner if recipe.experts.shared else IDLE_UNITS
    if native.dense_layers:
        mixed = mixed_layers(recipe.layers, sizes.layers)
        written["mlp_only_layers"] = [layer for layer in range(sizes.layers) if layer not in mixed]
    return written


def _rope(native: NativeClass, rope: Mapping[str, Any]) -> dict[str, Any]:
    if native.rope_parameters:
        return {"rope_parameters": dict(rope)}
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    return {"rope_theta": rope["rope_theta"], "rope_scaling": None if rope["rope_type"] == "default" else scaling}
