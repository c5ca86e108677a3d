"""Tiny random dense models of every family, to merge and compare."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging import version
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig

VOCAB = 96


@dataclass(frozen=True)
class Case:
    """One family, or a variant of it. `exact` is the bound that float64 parity can reach: RMSNorm rounds to fp32."""

    name: str
    model_type: str
    config: Mapping[str, Any] = field(default_factory=dict)
    exact: float = 1e-6
    grouped: bool = True


_SLIDING = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}

CASES = (
    Case("llama", "llama"),
    Case("llama-biases", "llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    Case("llama-mha", "llama", {"num_key_value_heads": 4}),
    Case("mistral", "mistral", {"sliding_window": 6}),
    Case("qwen2", "qwen2", {"use_sliding_window": True, **_SLIDING}),
    Case("qwen2-full", "qwen2"),
    Case("qwen3", "qwen3", {"head_dim": 16, "attention_bias": True}),
    Case("gemma", "gemma", {"head_dim": 16}),
    Case("gemma2", "gemma2", {"head_dim": 16, **_SLIDING}),
    Case("gemma3_text", "gemma3_text", {"head_dim": 16, **_SLIDING}),
    Case("cohere", "cohere", {"use_qk_norm": True, "logit_scale": 1.0}),
    Case("cohere-plain", "cohere", {"use_qk_norm": False, "attention_bias": True}),
    Case("cohere2", "cohere2", {**_SLIDING, "tie_word_embeddings": False}),
    Case("olmo2", "olmo2"),
    Case("granite", "granite", {"residual_multiplier": 0.5, "logits_scaling": 2.0, "embedding_multiplier": 3.0}),
    Case("smollm3", "smollm3", {"no_rope_layer_interval": 2}),
    Case(
        "phi3",
        "phi3",
        {
            "sliding_window": 6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        },
    ),
    Case("starcoder2", "starcoder2", {"use_bias": True, "sliding_window": 6}, exact=1e-10),
    Case("gpt_neox", "gpt_neox", {"num_key_value_heads": None}, exact=1e-10, grouped=False),
    Case(
        "gpt_neox-sequential", "gpt_neox", {"num_key_value_heads": None, "use_parallel_residual": False}, 1e-10, False
    ),
)
BY_NAME = {case.name: case for case in CASES}


def dense_config(case: Case) -> Any:
    """The transformers config of a case: 2 layers, 4 heads in 2 groups, hidden 32."""
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **case.config,
    }
    if sizes["num_key_value_heads"] is None:
        del sizes["num_key_value_heads"]
    return AutoConfig.for_model(case.model_type, **sizes)


def skip_what_tells_nothing(name: str) -> None:
    """GraniteMoe of older transformers tells no router logits."""
    if name == "granite" and version.parse(transformers.__version__) < version.parse("5.24"):
        pytest.skip("tells no router logits")


def mixtral_config() -> MixtralConfig:
    """One of transformers' own mixtures, four experts of which a token uses two."""
    return MixtralConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
    )


def make_seed(case: Case, folder: Path, random_seed: int, dtype: torch.dtype = torch.float32) -> Path:
    """Write a dense checkpoint whose every weight, norms and biases included, is random."""
    torch.manual_seed(random_seed)
    model = AutoModelForCausalLM.from_config(dense_config(case), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.mul_(3)
    model.to(dtype).save_pretrained(folder)
    return folder


def make_seeds(case: Case, folder: Path, count: int = 3, dtype: torch.dtype = torch.float32) -> list[Path]:
    """Seeds `a`, `b`, `c` … of one case, each random for itself (so they share no ancestor)."""
    return [make_seed(case, folder / name, index, dtype) for index, name in enumerate("abcdef"[:count])]


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file, or remove those set to `...`."""
    table = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in table.items() if value is not ...}))
