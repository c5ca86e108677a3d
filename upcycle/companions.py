"""What lies beside a result's weights: its config.json, its code and tokenizer."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from upcycle.checkpoint import COPIED_FILES, MAX_JSON, MODELING_FILES, TOKENIZER_CONFIG, read_json
from upcycle.layout import Layout
from upcycle.numeric import TORCH_NAMES
from upcycle.recipe import Recipe
from upcycle.seeds import Seed

FORMAT_VERSION: Final = 1
PLAIN: Final = "PreTrainedTokenizerFast"  # which reads tokenizer.json as it is


def bam_config(
    config: Mapping[str, Any], layout: Layout, recipe: Recipe, expert_names: Sequence[str], dtype: str
) -> dict[str, Any]:
    """The config.json of a BAM checkpoint: the seed's own config, untouched, and above it what engines read."""
    sizes, values = layout.model.sizes, layout.model.values
    heads = layout.experts if recipe.attention_experts else 1
    key_value_heads = heads if not recipe.shared_key_value else 1
    taken = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config}
    taken |= {key: values[key] for key in ("layer_types", "sliding_window") if key in values}
    return {
        "model_type": "bam",
        "architectures": ["BamForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_bam.BamConfig",
            "AutoModel": "modeling_bam.BamModel",
            "AutoModelForCausalLM": "modeling_bam.BamForCausalLM",
        },
        "format_version": FORMAT_VERSION,
        "dense_config": dict(config),
        "dense_layout": dense_layout(layout),
        "num_experts": len(expert_names),
        "expert_names": list(expert_names),
        "num_experts_per_tok": recipe.ffn_active,
        "norm_topk_prob": recipe.ffn_router.normalize,
        "attention_experts": recipe.attention_experts,
        "shared_key_value": recipe.shared_key_value,
        **_bam_extras(layout, recipe),
        "router_aux_loss_coef": recipe.loss.load_balance,
        "router_z_loss_coef": recipe.loss.z,
        "output_router_logits": False,
        "vocab_size": sizes.vocab,
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.inner,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads * heads,
        "num_key_value_heads": sizes.key_value_heads * key_value_heads,
        "head_dim": sizes.head_dim,
        "max_position_embeddings": values["max_position_embeddings"],
        "tie_word_embeddings": layout.model.tied,
        "dtype": TORCH_NAMES[dtype],
        **taken,
    }


def _bam_extras(layout: Layout, recipe: Recipe) -> dict[str, Any]:
    """The keys of what only some mixtures have."""
    found: dict[str, Any] = {}
    if recipe.attention_experts and layout.experts != recipe.ffn_count(layout.experts):
        found["num_attention_experts"] = layout.experts
    if recipe.attention_experts and recipe.attention_router.routing == "top-k":
        found["num_attention_experts_per_tok"] = recipe.attention_router.top_k
        found["norm_topk_attention"] = recipe.attention_router.normalize
    if recipe.experts.granularity > 1:
        found["granularity"] = recipe.experts.granularity
    if recipe.experts.shared:
        found["num_shared_experts"] = len(recipe.experts.shared)
    if recipe.ffn_router.bias:
        found["router_bias"] = True
    if len(layout.mixed) < layout.model.sizes.layers:
        found["mixed_layers"] = list(layout.mixed)
    return found


def dense_layout(layout: Layout) -> dict[str, Any]:
    """What modeling_bam.py must know of the seed's modules to widen them; it travels in the config."""
    family = layout.model.family
    return {
        "attention": family.attention,
        "projections": {name: list(parts) for name, parts in family.qkv.items()},
        "output": family.output,
        "qk_norm": family.qk_norm if layout.model.flag(family.qk_norm_key or True) else None,
        "gated": family.gated,
        "fused_by_head": family.qkv_by_head,
    }


def dense_config(config: Mapping[str, Any], dtype: str | None) -> dict[str, Any]:
    """The config.json of a dense result: the seed's, without code that is not copied, in the dtype written."""
    kept = {key: value for key, value in config.items() if key != "auto_map"}
    if dtype is None:
        return kept
    kept.pop("torch_dtype", None)
    return {**kept, "dtype": TORCH_NAMES[dtype]}


def copied_files(folder: Path, with_code: bool) -> dict[str, Path]:
    """The files beside the weights that a result takes over, and with `with_code` the model's own code."""
    files = {name: folder / name for name in COPIED_FILES if (folder / name).is_file()}
    if with_code:
        code = Path(__file__).parent / "modeling"
        files |= {name: code / name for name in MODELING_FILES}
    return files


def tokenizer_config(seed: Seed, native: bool) -> dict[str, Any] | None:
    """The tokenizer_config.json with which a mixture tokenizes like its seed, where a copy would not.

    AutoTokenizer takes tokenizer.json of some model types as it is and ignores the class that tokenizer_config.json
    names, and takes Qwen2Tokenizer for Qwen2 whatever is named. The mixture has another model type, for which the named
    class would be taken. A native one is read by transformers 4 too, which does not know TokenizersBackend.
    """
    path, family = seed.folder / TOKENIZER_CONFIG, seed.model.family
    if not path.is_file() or not (seed.folder / "tokenizer.json").is_file():
        return None
    table = read_json(path)
    named = table.get("tokenizer_class")
    wanted = named
    if native and named == "TokenizersBackend":
        wanted = PLAIN
    if not native and family.plain_tokenizer and named not in (None, "TokenizersBackend"):
        wanted = PLAIN
    if family.tokenizer and named not in (family.tokenizer, f"{family.tokenizer}Fast"):
        wanted = family.tokenizer
    return None if wanted == named else {**table, "tokenizer_class": wanted}


def tokenizer_note(seed: Seed) -> str | None:
    """What must be said of a native mixture that transformers 5 tokenizes otherwise than its seed.

    It makes a Llama's tokenizer by the class that is named, and reads a Mixtral's tokenizer.json as it is.
    """
    path, file = seed.folder / TOKENIZER_CONFIG, seed.folder / "tokenizer.json"
    if seed.model.model_type != "llama" or not (path.is_file() and file.is_file()) or file.stat().st_size > MAX_JSON:
        return None
    named = str(read_json(path).get("tokenizer_class", PLAIN)).removesuffix("Fast")
    if named in (PLAIN.removesuffix("Fast"), "TokenizersBackend"):
        return None
    if named == "LlamaTokenizer" and '"ByteLevel"' in file.read_text(encoding="utf-8", errors="replace"):
        return None
    return (
        "AutoTokenizer of transformers 5 makes a Llama's tokenizer by its class, but reads a Mixtral's tokenizer.json "
        "as it is: spaces, digits and special tokens may become other tokens than the seeds'; "
        f"{named}.from_pretrained gives theirs (docs/native-formats.md)"
    )
