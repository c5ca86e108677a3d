"""The table of families against transformers' own classes."""

import dataclasses

import pytest
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.tiny import CASES, dense_config
from upcycle.dense_config import config_values, find_family, read_sizes
from upcycle.errors import SeedError
from upcycle.families import FAMILIES

# Keys that change nothing of what a trained model computes.
BOOKKEEPING = {
    *("initializer_range", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "pretraining_tp"),
    *("attention_dropout", "classifier_dropout", "is_decoder", "rope_parameters"),
}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_defaults_are_those_of_transformers(model_type):
    family = FAMILIES[model_type]
    assert MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type] == family.architecture
    config = AutoConfig.for_model(model_type)
    base = {field.name for field in dataclasses.fields(AutoConfig.for_model("llama").__class__.__mro__[1])}
    own = {field.name for field in dataclasses.fields(type(config))} - base - BOOKKEEPING
    assert own - {"head_dim"} == set(family.defaults) - {"head_dim"}
    values = config_values(family, {})
    for key in sorted(own):
        assert values[key] == getattr(config, key), key
    expected = dict(config.rope_parameters)
    assert values["rope"] == expected


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_transformers_saves_is_read_alike(case):
    """A config as transformers writes it: sizes, window pattern and rope agree with the object."""
    config = dense_config(case)
    written = config.to_dict()
    family = find_family(written, "x")
    values, sizes = config_values(family, written), read_sizes(family, written, "x")
    assert values["rope"] == dict(config.rope_parameters)
    if "layer_types" in values:
        assert values["layer_types"] == config.layer_types
    heads = config.num_attention_heads
    assert sizes.head_dim == (getattr(config, "head_dim", None) or config.hidden_size // heads)
    assert sizes.key_value_heads == (getattr(config, "num_key_value_heads", None) or heads)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"rope_theta": 5e5, "rope_scaling": None}, {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}),
        (
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}},
        ),
        ({"torch_dtype": "bfloat16"}, {"dtype": "bfloat16"}),
    ],
)
def test_both_spellings_of_a_config_are_one(old, new):
    family = FAMILIES["llama"]
    assert config_values(family, old) == config_values(family, new)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", "256"),
        ("num_hidden_layers", 2**40),
        ("num_hidden_layers", 0),
        ("vocab_size", True),
        ("head_dim", -1),
    ],
)
def test_a_size_of_the_wrong_kind_is_refused(key, value):
    with pytest.raises(SeedError, match=key):
        read_sizes(FAMILIES["llama"], {key: value}, "seed 'x'")


def test_heads_must_divide():
    with pytest.raises(SeedError, match="multiple"):
        read_sizes(FAMILIES["llama"], {"num_attention_heads": 6, "num_key_value_heads": 4}, "seed 'x'")


def test_an_unknown_family_lists_the_known():
    with pytest.raises(SeedError, match=r"gpt_neox.*llama"):
        find_family({"model_type": "bert"}, "seed 'x'")
