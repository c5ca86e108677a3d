"""Recipe files: TOML, strictly checked, and the command line's changes to it."""

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any, Final, TypeVar

from upcycle.errors import RecipeError, did_you_mean
from upcycle.recipe import (
    ANCESTOR,
    EQUAL,
    EXPERTS,
    INITS,
    MEAN,
    ROLES,
    SEED_PREFIX,
    USAGE,
    WEIGHTED,
    AttentionRouter,
    Experts,
    FfnRouter,
    Loss,
    Recipe,
    mixed_layers,
)

MAX_RECIPE: Final = 100_000  # bytes
MAX_EXPERTS: Final = 1024  # of any kind
MAX_LAYERS: Final = 4096
# What stands at the top of a file, and its tables.
SCALARS: Final[Mapping[str, type]] = {"summary": str, "paper": str, "needs": str, "example": str, "copies": bool}
SECTIONS: Final = ("mix", "layers", "experts", "weights", "prompts", "router", "loss")
_Section = TypeVar("_Section", FfnRouter, AttentionRouter, Loss, Experts)


def builtin_recipes() -> dict[str, Recipe]:
    """Every recipe that ships with upcycle, by name."""
    files = resources.files("upcycle.recipes").iterdir()
    names = sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml"))
    return {name: load_recipe(name) for name in names}


def load_recipe(name: str, overrides: Iterable[str] = (), weights: Iterable[str] = ()) -> Recipe:
    """Read a recipe by name or from a `.toml` file, then apply `key=value` overrides (`router.ffn.top_k=2`), and the
    shares `seed=share` that `--weights` gives.

    Raises:
        RecipeError: it cannot be read, or is none; an override or a share that cannot be.
    """
    table = _read_table(name)
    for override in overrides:
        _override(table, override)
    return parse_recipe(Path(name).stem if name.endswith(".toml") else name, table, parse_weights(weights))


def parse_weights(words: Iterable[str]) -> dict[str, float]:
    """`code=2 law=1` by name.

    Raises:
        RecipeError: no such pair, a name that stands twice, a share that is no number of 0 or more, all of them 0.
    """
    weights: dict[str, float] = {}
    for word in words:
        name, _, share = word.partition("=")
        try:
            weight = float(share)
        except ValueError:
            name = ""
        if not name:
            raise RecipeError(
                f"--weights {word[:80]}: expected NAME=SHARE, a seed and a number: --weights code=2 law=1"
            )
        if name in weights:
            raise RecipeError(f"--weights: seed '{name[:80]}' has two shares; give it one")
        weights[name] = weight
    return _parse_weights("--weights", weights)


def parse_recipe(name: str, table: Mapping[str, Any], weights: Mapping[str, float] | None = None) -> Recipe:
    """Check a recipe's table and turn it into a `Recipe`; `weights` are shares given beside it (`Recipe.weighted_by`).

    Raises:
        RecipeError: an unknown key (the nearest right one is named), a wrong type, or a combination that cannot be.
    """
    where = f"recipe '{name}'"
    _check_keys(where, table, (*SCALARS, *SECTIONS))
    values = {key: _typed(where, key, table[key], kind) for key, kind in SCALARS.items() if key in table}
    if "summary" not in values:
        raise RecipeError(f"{where}: 'summary' is missing; say in one sentence what the recipe does")
    routers = _table(where, "router", table)
    _check_keys(f"{where}, [router]", routers, ("ffn", "attention"))
    layers = _table(where, "layers", table)
    _check_keys(f"{where}, [layers]", layers, ("mix",))
    recipe = Recipe(
        name=name,
        mix=_parse_mix(where, _table(where, "mix", table)),
        layers=_parse_layers(f"{where}, [layers]", layers.get("mix", "all")),
        experts=_section(f"{where}, [experts]", Experts(), _table(where, "experts", table)),
        weights=_parse_weights(f"{where}, [weights]", _table(where, "weights", table)),
        prompts=_parse_prompts(where, _table(where, "prompts", table)),
        ffn_router=_section(f"{where}, [router.ffn]", FfnRouter(), _table(where, "ffn", routers)),
        attention_router=_section(
            f"{where}, [router.attention]", AttentionRouter(), _table(where, "attention", routers)
        ),
        loss=_section(f"{where}, [loss]", Loss(), _table(where, "loss", table)),
        **values,
    )
    if weights:
        recipe = recipe.weighted_by(weights)
    _check_combination(where, recipe)
    _check_routers(where, recipe)
    _check_experts(where, recipe)
    _check_used(where, recipe, {*table, *(f"router.{kind}" for kind in routers)})
    return recipe


def _read_table(name: str) -> dict[str, Any]:
    if name.endswith(".toml"):
        try:
            path = Path(name)
            if path.exists() and not (path.is_file() and path.stat().st_size <= MAX_RECIPE):
                raise RecipeError(f"recipe file '{name}' is no plain file of at most {MAX_RECIPE} bytes")
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"recipe file '{name}' cannot be read: {error}") from error
    else:
        file = resources.files("upcycle.recipes") / f"{name}.toml"
        known = [
            f.name.removesuffix(".toml") for f in resources.files("upcycle.recipes").iterdir() if f.name[-5:] == ".toml"
        ]
        if name not in known:
            raise RecipeError(
                f"there is no recipe '{name}'{did_you_mean(name, known)} (a file of your own ends in .toml)"
            )
        text = file.read_text(encoding="utf-8")
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"recipe '{name}' is not valid TOML: {error}") from error


def _override(table: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set {override}: expected key=value, for example router.ffn.top_k=2")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        value = text  # a bare word is a string
    *path, last = key.split(".")
    for part in path:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise RecipeError(f"--set {override}: '{part}' is a value, not a table")
    table[last] = value


def _parse_mix(where: str, table: Mapping[str, Any]) -> dict[str, str]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{inner}": mixed for inner, mixed in value.items()}
        else:
            flat[key] = value
    _check_keys(f"{where}, [mix]", flat, (*ROLES, "default"))
    for role, mix in flat.items():
        ways = (EXPERTS, MEAN, WEIGHTED, USAGE, EQUAL, ANCESTOR)
        if not isinstance(mix, str) or not (mix in ways or mix.startswith(SEED_PREFIX)):
            hint = did_you_mean(str(mix)[:80], (*ways, "seed:<name>"))
            raise RecipeError(f"{where}, [mix]: {role} = {mix!r} is no way to mix{hint}")
    default = flat.get("default", MEAN)
    if default == EXPERTS:
        raise RecipeError(
            f"{where}, [mix]: default = 'experts' would split norms and embeddings; name the roles instead"
        )
    return {role: flat.get(role, default) for role in ROLES}


def _check_used(where: str, recipe: Recipe, sections: set[str]) -> None:
    """Refuse sections that nothing reads, so that no option is without effect."""
    mix = recipe.mix
    read = {
        "router.ffn": mix["ffn"] == EXPERTS,
        "router.attention": mix["attention.query"] == EXPERTS,
        "loss": mix["ffn"] == EXPERTS,
        "weights": WEIGHTED in recipe.ways or USAGE in mix.values(),
        "prompts": mix["ffn"] == EXPERTS,
        "experts": mix["ffn"] == EXPERTS,
        "layers": mix["ffn"] == EXPERTS,
    }
    for section, used in read.items():
        if section in sections and not used:
            raise RecipeError(
                f"{where}: [{section}] has no effect, since [mix] mixes nothing that reads it; leave it out"
            )


def _parse_weights(where: str, table: Mapping[str, Any]) -> dict[str, float]:
    weights = {key: _typed(where, key, value, float) for key, value in table.items()}
    for key, weight in weights.items():
        if not 0 <= weight < float("inf"):
            raise RecipeError(f"{where}: {key} is {weight}, expected 0 or more")
    if weights and not 0 < sum(weights.values()) < float("inf"):
        raise RecipeError(f"{where}: all weights are 0, or their sum is too large")
    return weights


def _parse_layers(where: str, value: Any) -> str:
    """A single layer may be written as a number."""
    return str(value) if type(value) is int else _typed(where, "mix", value, str)


def _parse_prompts(where: str, table: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    for name, prompts in table.items():
        if not isinstance(prompts, list) or not prompts or not all(type(one) is str and one.strip() for one in prompts):
            raise RecipeError(
                f"{where}, [prompts]: {name} is {str(prompts)[:80]}, expected a list of texts: "
                '["def f(x):", "import os"]'
            )
    return {name: tuple(prompts) for name, prompts in table.items()}


def _check_combination(where: str, recipe: Recipe) -> None:
    mix = recipe.mix
    for role in ("norm", "embedding", "head"):
        if mix[role] == EXPERTS:
            raise RecipeError(
                f"{where}, [mix]: {role} cannot be experts, since no router chooses among its copies; use mean"
            )
    for role in ROLES:
        if mix[role] == USAGE and role not in ("embedding", "head"):
            raise RecipeError(
                f"{where}, [mix]: {role} has no row for each token, so it cannot be mixed by usage; use mean"
            )
    if (mix["attention.query"] == EXPERTS) != (mix["attention.output"] == EXPERTS):
        raise RecipeError(f"{where}, [mix]: attention.query and attention.output must both be experts, or neither")
    if (mix["attention.key"] == EXPERTS) != (mix["attention.value"] == EXPERTS):
        raise RecipeError(f"{where}, [mix]: attention.key and attention.value must both be experts, or neither")
    if mix["attention.key"] == EXPERTS and not recipe.attention_experts:
        raise RecipeError(f"{where}, [mix]: keys and values can be experts only where attention.query is")
    if recipe.attention_experts and not recipe.ffn_experts:
        raise RecipeError(f"{where}, [mix]: attention experts need ffn = 'experts' beside them (BAM mixes both)")
    if recipe.copies and not recipe.ffn_experts:
        raise RecipeError(f"{where}: copies = true copies a seed into experts, but ffn = '{mix['ffn']}'")
    if WEIGHTED in recipe.ways and not recipe.weights:
        raise RecipeError(
            f"{where}: a role is 'weighted' but [weights] is missing; give each seed a share, code = 2, here or by "
            "--weights code=2 law=1"
        )


def _check_routers(where: str, recipe: Recipe) -> None:
    if recipe.ffn_router.top_k < 1:
        raise RecipeError(f"{where}, [router.ffn]: top_k is {recipe.ffn_router.top_k}, expected 1 or more")
    if recipe.attention_router.routing not in ("soft", "top-k"):
        raise RecipeError(
            f"{where}, [router.attention]: routing is '{recipe.attention_router.routing}', expected 'soft' or 'top-k'"
        )
    if recipe.attention_router.top_k < 1:
        raise RecipeError(f"{where}, [router.attention]: top_k is {recipe.attention_router.top_k}, expected 1 or more")
    for name, bias in recipe.ffn_router.bias.items():
        if not -1e4 < bias < 1e4:
            raise RecipeError(f"{where}, [router.ffn] bias: {name} is {bias}, expected a number of a logit's size")
    for section, router in (("ffn", recipe.ffn_router), ("attention", recipe.attention_router)):
        if router.init not in INITS:
            hint = did_you_mean(router.init, INITS)
            raise RecipeError(f"{where}, [router.{section}]: init is '{router.init}'{hint}")
        if not 0 < router.std < 1:
            raise RecipeError(f"{where}, [router.{section}]: std is {router.std}, expected between 0 and 1")
        if not 0 < router.softness <= 100:
            raise RecipeError(
                f"{where}, [router.{section}]: softness is {router.softness}, expected above 0; 1 is the fit's own"
            )
    for key, weight in asdict(recipe.loss).items():
        if not 0 <= weight < 1e3:
            raise RecipeError(f"{where}, [loss]: {key} is {weight}, expected 0 or more")


def _check_experts(where: str, recipe: Recipe) -> None:
    mixed_layers(recipe.layers, MAX_LAYERS)
    where, experts = f"{where}, [experts]", recipe.experts
    for key, low, high in (("granularity", 1, MAX_EXPERTS), ("extra", 0, MAX_EXPERTS)):
        if not low <= getattr(experts, key) <= high:
            raise RecipeError(f"{where}: {key} is {getattr(experts, key)}, expected {low} to {high}")
    for key, ways in (("extra_from", [experts.extra_from]), ("shared", experts.shared)):
        for way in ways:
            if way not in (ANCESTOR, MEAN, WEIGHTED) and not way.startswith(SEED_PREFIX):
                hint = did_you_mean(way[:80], (ANCESTOR, MEAN, WEIGHTED, "seed:<name>"))
                expected = "expected ancestor, mean, weighted or seed:<name>"
                raise RecipeError(f"{where}: {key} has {way[:80]!r}{hint}; {expected}")
    if experts.granularity > 1 and recipe.ffn_router.init == "zeros":
        raise RecipeError(
            f"{where}: granularity is {experts.granularity} and [router.ffn] init is 'zeros': all gates tie, so the "
            "top-k would take parts of several FFNs instead of whole ones; take init = 'random'"
        )
    if not 0 < experts.shared_weight < 1:
        raise RecipeError(f"{where}: shared_weight is {experts.shared_weight}, expected between 0 and 1")
    if not 0 <= experts.noise <= 10:
        raise RecipeError(f"{where}: noise is {experts.noise}, expected 0 (none) to 10 standard deviations")
    if not 0 <= experts.drop <= 1:
        raise RecipeError(f"{where}: drop is {experts.drop}, expected 0 (none) to 1 (every unit)")
    if len(experts.shared) > MAX_EXPERTS:
        raise RecipeError(f"{where}: {len(experts.shared)} shared experts, expected at most {MAX_EXPERTS}")


def _check_keys(where: str, table: Mapping[str, Any], known: Iterable[str]) -> None:
    known = tuple(known)
    for key in table:
        if key not in known:
            raise RecipeError(f"{where}: unknown key '{key}'{did_you_mean(key, known)}")


def _table(where: str, key: str, table: Mapping[str, Any]) -> Mapping[str, Any]:
    value = table.get(key, {})
    if not isinstance(value, dict):
        raise RecipeError(f"{where}: '{key}' is {value!r}, expected a table")
    return value


def _section(where: str, default: _Section, table: Mapping[str, Any]) -> _Section:
    names = [field.name for field in fields(default)]
    _check_keys(where, table, names)
    return replace(
        default, **{key: _typed(where, key, value, type(getattr(default, key))) for key, value in table.items()}
    )


def _typed(where: str, key: str, value: Any, kind: type) -> Any:
    if kind in (dict, tuple):
        return _typed_many(where, key, value, kind)
    if type(value) is int and not -(2**63) < value < 2**63:
        raise RecipeError(f"{where}: {key} is a whole number beyond any use")
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        names = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}
        raise RecipeError(f"{where}: {key} is {value!r}, expected {names[kind]}")
    return value


def _typed_many(where: str, key: str, value: Any, kind: type) -> Any:
    """A table of numbers, or a list of texts."""
    if kind is dict and isinstance(value, dict):
        return {name: _typed(f"{where}, {key}", name, one, float) for name, one in value.items()}
    if kind is tuple and isinstance(value, list | tuple):
        return tuple(_typed(where, key, one, str) for one in value)
    expected = "a table of numbers: { code = -1.0 }" if kind is dict else 'a list of texts: ["mean"]'
    raise RecipeError(f"{where}: {key} is {str(value)[:80]!r}, expected {expected}")
