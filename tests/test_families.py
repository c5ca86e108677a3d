"""The table of families, and what is read off a config.json, against transformers' own classes."""

import dataclasses

import pytest
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.auto.tokenization_auto import (
    MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS,
    TOKENIZER_MAPPING_NAMES,
)

from tests.tiny import CASES, dense_config
from upcycle.dense_config import differences, read_dense
from upcycle.errors import SeedError
from upcycle.families import FAMILIES

# Keys that change nothing of what a trained model computes.
BOOKKEEPING = {
    *("initializer_range", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "pretraining_tp"),
    *("attention_dropout", "classifier_dropout", "is_decoder", "rope_parameters"),
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0}


def read(model_type="llama", **config):
    return read_dense({"model_type": model_type, **config}, "seed 'x'")


@pytest.mark.parametrize("model_type", FAMILIES)
def test_defaults_are_those_of_transformers(model_type):
    family = FAMILIES[model_type]
    assert MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type] == family.architecture
    config = AutoConfig.for_model(model_type)
    base = {field.name for field in dataclasses.fields(PretrainedConfig)}
    own = {field.name for field in dataclasses.fields(type(config))} - base - BOOKKEEPING
    assert own - {"head_dim"} == set(family.defaults) - {"head_dim"}
    values = read(model_type).values
    for key in sorted(own):
        assert values[key] == getattr(config, key), key
    assert values["rope"] == dict(config.rope_parameters)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_families_whose_tokenizer_is_read_as_it_is(model_type):
    """AutoTokenizer maps these model types to no class of their own."""
    plain = TOKENIZER_MAPPING_NAMES.get(model_type) in ("TokenizersBackend", "PreTrainedTokenizerFast")
    assert FAMILIES[model_type].plain_tokenizer == plain or model_type == "mistral"
    imposed = TOKENIZER_MAPPING_NAMES.get(model_type) if not plain else None  # whatever class is named
    own = imposed if model_type in MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS else None
    assert FAMILIES[model_type].tokenizer == (own or "")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_transformers_saves_is_read_alike(case):
    """A config as transformers writes it: sizes, window pattern and rope agree with the object."""
    config = dense_config(case)
    model = read_dense(config.to_dict(), "x")
    assert model.values["rope"] == dict(config.rope_parameters)
    if "layer_types" in model.values:
        assert model.values["layer_types"] == config.layer_types
    heads = config.num_attention_heads
    assert model.sizes.head_dim == (getattr(config, "head_dim", None) or config.hidden_size // heads)
    assert model.sizes.key_value_heads == (getattr(config, "num_key_value_heads", None) or heads)


@pytest.mark.parametrize(
    ("model_type", "old"),
    [
        ("llama", {"rope_theta": 5e5, "rope_scaling": None, "torch_dtype": "bfloat16"}),
        ("llama", {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}),
        ("llama", {"rope_theta": 5e5, "rope_scaling": LLAMA3, "max_position_embeddings": 512}),
        ("llama", {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 128}}),
        ("qwen3", {"rope_scaling": {**YARN, "original_max_position_embeddings": 64}, "rope_theta": 1e6}),
        ("gemma3_text", {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 3}),
        ("gpt_neox", {"rotary_pct": 0.5, "rotary_emb_base": 20_000}),
        ("phi3", {"partial_rotary_factor": 0.75, "original_max_position_embeddings": 64}),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 8}),
        ("cohere2", {"sliding_window_pattern": 2}),
        ("smollm3", {"no_rope_layers": [1, 0], "no_rope_layer_interval": 2}),
    ],
)
def test_configs_of_transformers_4_and_5_read_alike(model_type, old):
    """A config of transformers 4 against what transformers 5 makes and saves of it."""
    old = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, **old}
    old["model_type"] = model_type
    one, other = read_dense(old, "old"), read_dense(AutoConfig.for_model(**old).to_dict(), "new")
    assert differences(one, other) == []


@pytest.mark.parametrize(
    ("first", "second", "key"),
    [
        ({}, {"rope_theta": 5e5}, "rope.rope_theta"),
        ({}, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope.rope_type"),
        ({}, {"rms_norm_eps": 1e-5}, "rms_norm_eps"),
        ({"rope_scaling": LLAMA3}, {"rope_scaling": {**LLAMA3, "factor": 4.0}}, "rope.factor"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            {"max_position_embeddings": 9},
            "max_position_embeddings",
        ),
    ],
)
def test_what_computes_differently_is_found(first, second, key):
    both = {**first, **second}
    assert key in [name for name, _, _ in differences(read(**first), read(**both))]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"max_position_embeddings": 4096}, {"max_position_embeddings": 8192}),
        ({"model_type": "starcoder2", "residual_dropout": 0.1}, {"model_type": "starcoder2", "residual_dropout": 0.0}),
        ({"model_type": "qwen2", "max_window_layers": 21}, {"model_type": "qwen2", "sliding_window": 131_072}),
    ],
)
def test_what_decides_nothing_may_differ(first, second):
    assert differences(read(**first), read(**second)) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("hidden_size", value) for value in ("256", 0, 2**40, True, None, 2.5)),
        *(("rope_scaling", value) for value in ("linear", 3, [1])),
        *(("head_dim", value) for value in (-1, "x")),
        ("rope_parameters", 7),
        ("hidden_act", None),
        ("tie_word_embeddings", "yes"),
        ("rms_norm_eps", "small"),
        ("rope_theta", 0),
        ("attention_bias", 1),
        ("num_key_value_heads", 5),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused(key, value):
    with pytest.raises(SeedError, match=key.replace("num_key_value_heads", "multiple")):
        read(**{key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [("layer_types", 3), ("layer_types", ["full_attention"]), ("sliding_window", -4), ("sliding_window_pattern", 0)],
)
def test_a_wrong_window_is_refused(key, value):
    with pytest.raises(SeedError, match=key):
        read("gemma3_text", **{key: value})


def test_an_unknown_family_lists_the_known():
    with pytest.raises(SeedError, match=r"gpt_neox.*llama"):
        read("bert")
