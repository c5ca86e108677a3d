"""What a dense model's config.json says: its family, its sizes, and every value that decides what it computes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from upcycle.errors import SeedError
from upcycle.families import FAMILIES, Family


def config_values(family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """Every value of a config.json that decides what the model computes, defaults filled in, in one spelling.

    Configs of transformers 4 and 5 spell rotary positions differently; both give one `rope` entry here.
    """
    values = {key: config.get(key, default) for key, default in family.defaults.items()}
    if values.get("num_key_value_heads", 0) is None:
        values["num_key_value_heads"] = values["num_attention_heads"]
    if values.get("head_dim", 0) is None:
        values["head_dim"] = values["hidden_size"] // max(1, values["num_attention_heads"])
    if "use_sliding_window" in values and not values["use_sliding_window"]:
        values["sliding_window"] = None
    if "no_rope_layers" in values and values["no_rope_layers"] is None:
        every = values["no_rope_layer_interval"]
        values["no_rope_layers"] = [int((i + 1) % every != 0) for i in range(values["num_hidden_layers"])]
    if "layer_types" in values and values["layer_types"] is None:
        values["layer_types"] = _layer_types(family, config, values)
    values["rope"] = _rope(family, config)
    return values


def decisive_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values in which seeds must agree: those that nothing else in `values` states or makes idle.

    The longest position is only a label unless the rotary scaling reads it, and fine-tunes of one ancestor often
    differ in it; window and position settings have already been written out layer by layer.
    """
    idle = {"max_window_layers", "use_sliding_window", "no_rope_layer_interval"}
    rope = values["rope"]
    kinds = [rope] if "rope_type" in rope else list(rope.values())
    if not any(_reads_longest_position(kind) for kind in kinds):
        idle.add("max_position_embeddings")
    return {key: value for key, value in values.items() if key not in idle}


def _reads_longest_position(rope: Mapping[str, Any]) -> bool:
    if rope["rope_type"] in ("default", "linear"):
        return False
    return rope["rope_type"] == "dynamic" or "original_max_position_embeddings" not in rope


def _layer_types(family: Family, config: Mapping[str, Any], values: Mapping[str, Any]) -> list[str]:
    layers = range(values["num_hidden_layers"])
    if family.sliding_every:
        every = config.get("sliding_window_pattern", family.sliding_every)
        sliding = [(i + 1) % every != 0 for i in layers]
    elif "no_rope_layers" in values:
        sliding = [values["sliding_window"] is not None and not values["no_rope_layers"][i] for i in layers]
    else:
        sliding = [values["sliding_window"] is not None and i >= values["max_window_layers"] for i in layers]
    return ["sliding_attention" if slides else "full_attention" for slides in sliding]


def _rope(family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary positions in transformers 5's spelling, from either."""
    scaling = config.get("rope_scaling") or {}
    written = config.get("rope_parameters") or {}
    theta = config.get("rope_theta", config.get("rotary_emb_base", family.rope_theta))
    if family.local_rope_theta is not None:
        full = {"rope_theta": theta, **scaling, **written.get("full_attention", {})}
        local_theta = config.get("rope_local_base_freq", family.local_rope_theta)
        local = {"rope_theta": local_theta, **written.get("sliding_attention", {})}
        return {"full_attention": _rope_type(full), "sliding_attention": _rope_type(local)}
    rope = {"rope_theta": theta}
    if family.partial_rotary_factor is not None:
        factor = config.get("rotary_pct", family.partial_rotary_factor)
        rope["partial_rotary_factor"] = config.get("partial_rotary_factor", factor)
    return _rope_type({**rope, **scaling, **written})


def _rope_type(rope: dict[str, Any]) -> dict[str, Any]:
    kind = rope.pop("type", None)  # transformers < 4.43
    return {**rope, "rope_type": rope.get("rope_type", kind or "default")}


@dataclass(frozen=True)
class Sizes:
    """The sizes of a dense model, read off its config.json."""

    vocab: int
    hidden: int
    inner: int
    layers: int
    heads: int
    key_value_heads: int
    head_dim: int

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.heads // self.key_value_heads


def find_family(config: Mapping[str, Any], where: str) -> Family:
    """The table entry for a config.json.

    Raises:
        SeedError: no entry; the message lists those there are.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise SeedError(
            f"{where}: config.json says model_type {model_type!r}, which cannot be mixed; these can: {known}"
        )
    return FAMILIES[model_type]


def read_sizes(family: Family, config: Mapping[str, Any], where: str) -> Sizes:
    """The sizes in a config.json.

    Raises:
        SeedError: a size that is missing, no whole number, below 1 or beyond any model, or heads that do not divide.
    """
    values = config_values(family, {**config, **_whole_numbers(family, config, where)})
    heads = values["num_attention_heads"]
    sizes = Sizes(
        vocab=values["vocab_size"],
        hidden=values["hidden_size"],
        inner=values["intermediate_size"],
        layers=values["num_hidden_layers"],
        heads=heads,
        key_value_heads=values.get("num_key_value_heads", heads),
        head_dim=values.get("head_dim", config.get("head_dim") or values["hidden_size"] // heads),
    )
    if sizes.heads % sizes.key_value_heads:
        raise SeedError(
            f"{where}: config.json says {sizes.heads} heads and {sizes.key_value_heads} key/value heads; "
            "the first must be a multiple of the second"
        )
    return sizes


def _whole_numbers(family: Family, config: Mapping[str, Any], where: str) -> dict[str, int]:
    limits = {
        "vocab_size": 2**24,
        "hidden_size": 2**20,
        "intermediate_size": 2**22,
        "num_hidden_layers": 2**12,
        "num_attention_heads": 2**14,
        "num_key_value_heads": 2**14,
        "head_dim": 2**16,
    }
    numbers: dict[str, int] = {}
    for key, limit in limits.items():
        value = config.get(key, family.defaults.get(key))
        if value is None and key in ("num_key_value_heads", "head_dim"):
            continue
        if type(value) is not int or not 1 <= value <= limit:
            raise SeedError(f"{where}: config.json says {key} = {value!r}, expected a whole number from 1 to {limit}")
        numbers[key] = value
    return numbers
