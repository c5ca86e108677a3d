"""What a dense model's config.json says: its family, its sizes, and the values that decide what it computes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from upcycle.errors import SeedError
from upcycle.families import FAMILIES, Family

# The largest size of each kind that any model could have; beyond it a config.json is damaged.
_LIMITS: Final = {
    "vocab_size": 2**24,
    "hidden_size": 2**20,
    "intermediate_size": 2**22,
    "num_hidden_layers": 2**12,
    "num_attention_heads": 2**14,
    "num_key_value_heads": 2**14,
    "head_dim": 2**16,
}
_TABLES: Final = ("rope_scaling", "rope_parameters")
_LISTS: Final = ("layer_types", "no_rope_layers")
_POSITIVE: Final = (
    *("rope_theta", "rope_local_base_freq", "rotary_emb_base", "rotary_pct", "partial_rotary_factor"),
    *("sliding_window", "sliding_window_pattern", "no_rope_layer_interval"),
)
# Values that act in training alone, or that other values already say layer by layer.
_IDLE: Final = {
    *("max_window_layers", "use_sliding_window", "no_rope_layer_interval"),
    *("resid_pdrop", "embd_pdrop", "residual_dropout", "embedding_dropout", "hidden_dropout"),
}


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


@dataclass(frozen=True)
class DenseModel:
    """A dense model as its config.json describes it.

    `values` holds every key that its transformers class knows and that a trained model depends on, defaults filled in,
    in one spelling: configs of transformers 4 and 5 write rotary positions differently, and both give one `rope` here.
    """

    model_type: str
    family: Family
    sizes: Sizes
    values: Mapping[str, Any]

    @property
    def tied(self) -> bool:
        """Whether the output head is the input embedding."""
        return bool(self.values["tie_word_embeddings"])

    def flag(self, key: bool | str) -> bool:
        """A family's yes, no, or the config key that says."""
        return bool(self.values[key]) if isinstance(key, str) else key


def read_dense(config: Mapping[str, Any], where: str) -> DenseModel:
    """Read a config.json; `where` names its model in messages.

    Raises:
        SeedError: a family that cannot be mixed, or a value that is missing, of the wrong kind or of no possible size.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise SeedError(
            f"{where}: config.json says model_type {model_type!r}, which cannot be mixed; these can: {known}"
        )
    family = FAMILIES[model_type]
    _check_kinds(family, config, where)
    values = _values(family, config)
    for key in values.keys() & set(_LISTS):
        if len(values[key]) < values["num_hidden_layers"]:
            layers = values["num_hidden_layers"]
            raise SeedError(f"{where}: config.json lists {len(values[key])} {key} for {layers} layers")
    heads = values["num_attention_heads"]
    sizes = Sizes(
        vocab=values["vocab_size"],
        hidden=values["hidden_size"],
        inner=values["intermediate_size"],
        layers=values["num_hidden_layers"],
        heads=heads,
        key_value_heads=values.get("num_key_value_heads", heads),
        head_dim=values.get("head_dim") or config.get("head_dim") or values["hidden_size"] // heads,
    )
    if sizes.heads % sizes.key_value_heads or not sizes.head_dim:
        raise SeedError(
            f"{where}: config.json says {sizes.heads} heads of {sizes.head_dim} and {sizes.key_value_heads} key/value "
            "heads; the number of heads must be a multiple of that of key/value heads"
        )
    return DenseModel(model_type, family, sizes, values)


def _check_kinds(family: Family, config: Mapping[str, Any], where: str) -> None:
    """Refuse values that no config of this family can hold; null stands for the default wherever there is one."""
    for key, limit in _LIMITS.items():
        value = config.get(key, family.defaults.get(key))
        if value is None and key in ("num_key_value_heads", "head_dim"):
            continue
        if type(value) is not int or not 1 <= value <= limit:
            raise SeedError(
                f"{where}: config.json says {key} = {value!r:.80}, expected a whole number from 1 to {limit}"
            )
    for key in sorted(config.keys() & {*family.defaults, *_TABLES, *_LISTS, *_POSITIVE}):
        value, default = config[key], family.defaults.get(key)
        if value is None and (default is None or key in ("sliding_window", "head_dim", "num_key_value_heads")):
            continue
        if key in _TABLES:
            fits, expected = isinstance(value, dict), "a table"
        elif key in _LISTS:
            fits, expected = isinstance(value, list), "a list"
        elif isinstance(default, bool | str):
            fits, expected = type(value) is type(default), "true or false" if isinstance(default, bool) else "text"
        else:
            fits, expected = isinstance(value, int | float), "a number"
            if fits and key in _POSITIVE:
                fits, expected = value > 0, "a number above 0"
        if not fits:
            raise SeedError(f"{where}: config.json says {key} = {value!r:.80}, expected {expected}")
    for kind in ("full_attention", "sliding_attention"):
        nested = (config.get("rope_parameters") or {}).get(kind)
        if not isinstance(nested, dict | None):
            raise SeedError(f"{where}: config.json says rope_parameters.{kind} = {nested!r:.80}, expected a table")


def _values(family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    values = {key: config.get(key, default) for key, default in family.defaults.items()}
    if values.get("num_key_value_heads", 0) is None:
        values["num_key_value_heads"] = values["num_attention_heads"]
    if values.get("head_dim", 0) is None:
        values["head_dim"] = values["hidden_size"] // values["num_attention_heads"]
    if "use_sliding_window" in values and not values["use_sliding_window"]:
        values["sliding_window"] = None
    if "no_rope_layers" in values and values["no_rope_layers"] is None:
        every = values["no_rope_layer_interval"]
        values["no_rope_layers"] = [int((i + 1) % every != 0) for i in range(values["num_hidden_layers"])]
    if "layer_types" in values and values["layer_types"] is None:
        values["layer_types"] = _layer_types(family, config, values)
    values["rope"] = _rope(family, config, values)
    return values


def _layer_types(family: Family, config: Mapping[str, Any], values: Mapping[str, Any]) -> list[str]:
    layers = range(values["num_hidden_layers"])
    if family.sliding_every:
        every = config.get("sliding_window_pattern") or family.sliding_every
        sliding = [(i + 1) % every != 0 for i in layers]
    elif "no_rope_layers" in values:
        sliding = [values["sliding_window"] is not None and not values["no_rope_layers"][i] for i in layers]
    else:
        sliding = [values["sliding_window"] is not None and i >= values["max_window_layers"] for i in layers]
    return ["sliding_attention" if slides else "full_attention" for slides in sliding]


def _rope(family: Family, config: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary positions in transformers 5's spelling, from either."""
    scaling = config.get("rope_scaling") or {}
    written = config.get("rope_parameters") or {}
    theta = config.get("rope_theta") or config.get("rotary_emb_base") or family.rope_theta
    if family.local_rope_theta is not None:
        local_theta = config.get("rope_local_base_freq") or family.local_rope_theta
        kinds = {
            "full_attention": {"rope_theta": theta, **scaling, **(written.get("full_attention") or {})},
            "sliding_attention": {"rope_theta": local_theta, **(written.get("sliding_attention") or {})},
        }
        return {kind: _complete_rope(rope, values) for kind, rope in kinds.items()}
    rope = {"rope_theta": theta}
    if family.partial_rotary_factor is not None:
        factor = config.get("rotary_pct", family.partial_rotary_factor)
        rope["partial_rotary_factor"] = config.get("partial_rotary_factor", factor)
    return _complete_rope({**rope, **scaling, **written}, values)


def _complete_rope(rope: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    kind = rope.pop("type", None)  # transformers < 4.43
    rope["rope_type"] = rope.get("rope_type") or kind or "default"
    if rope["rope_type"] in ("llama3", "yarn", "longrope"):  # scaled from the length of pre-training
        original = values.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
        rope["original_max_position_embeddings"] = original or values["max_position_embeddings"]
    return rope


def differences(one: DenseModel, other: DenseModel) -> list[tuple[str, Any, Any]]:
    """The values in which two models of a family compute differently, as (key, of one, of other).

    The longest position is only a label unless a rotary scaling reads it, and fine-tunes of one ancestor often differ
    in it, so it counts only where one of the two reads it.
    """
    idle = set(_IDLE)
    if not (_reads_longest_position(one) or _reads_longest_position(other)):
        idle.add("max_position_embeddings")
    first, second = _flat(one.values), _flat(other.values)
    keys = [key for key in first if key not in idle] + [key for key in second if key not in first]
    return [(key, first.get(key), second.get(key)) for key in keys if first.get(key) != second.get(key)]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _reads_longest_position(model: DenseModel) -> bool:
    rope = model.values["rope"]
    kinds = [rope] if "rope_type" in rope else list(rope.values())
    # Scaling without a factor of its own takes it from the longest position.
    return any(
        kind["rope_type"] == "dynamic" or (kind["rope_type"] in ("yarn", "longrope") and "factor" not in kind)
        for kind in kinds
    )
