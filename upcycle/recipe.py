"""Recipes: how each role of a dense model is mixed, read from TOML and strictly checked."""

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any, Final, TypeVar

from upcycle.errors import RecipeError, did_you_mean

ROLES: Final = (
    "ffn",
    "attention.query",
    "attention.key",
    "attention.value",
    "attention.output",
    "norm",
    "embedding",
    "head",
)
MAX_RECIPE: Final = 100_000  # bytes
EXPERTS: Final = "experts"
MEAN: Final = "mean"
SOFTNESS: Final = 0.3  # docs/routers.md says what it was chosen by
WEIGHTED: Final = "weighted"
USAGE: Final = "usage"
SEED_PREFIX: Final = "seed:"
FROM_TEXT: Final = ("fit", "prototypes")
INITS: Final = ("random", "zeros", *FROM_TEXT)


@dataclass(frozen=True)
class FfnRouter:
    """Top-k router of the FFN experts; `normalize` rescales the selected gates to sum to 1 (arXiv:2408.08274, 3).

    Set from text, `softness` multiplies what the text gives, and `keep_scale` multiplies gates that are not rescaled
    by a number a layer, such that they sum to 1 on average.
    """

    top_k: int = 1
    normalize: bool = False
    init: str = "random"
    std: float = 0.02
    softness: float = SOFTNESS
    keep_scale: bool = True


@dataclass(frozen=True)
class AttentionRouter:
    """Soft router of the attention experts: every token uses every expert (arXiv:2408.08274)."""

    routing: str = "soft"
    init: str = "random"
    std: float = 0.02
    softness: float = SOFTNESS


@dataclass(frozen=True)
class Loss:
    """Weights of the auxiliary losses: NLL + sum over layers of load_balance * L_LB + z * L_z."""

    load_balance: float = 0.01
    z: float = 0.001


_Section = TypeVar("_Section", FfnRouter, AttentionRouter, Loss)


@dataclass(frozen=True)
class Recipe:
    """How each role is mixed.

    `mix` holds every role of `ROLES`; `weights` the share of each seed, by name, where a role is `weighted`; `prompts`
    text for each seed's expert, by name, where no other is given; `copies` means one seed, copied to every expert.
    """

    name: str
    summary: str
    mix: Mapping[str, str]
    paper: str = ""
    needs: str = ""
    example: str = ""
    copies: bool = False
    weights: Mapping[str, float] = field(default_factory=dict)
    prompts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    ffn_router: FfnRouter = FfnRouter()
    attention_router: AttentionRouter = AttentionRouter()
    loss: Loss = Loss()

    @property
    def ffn_experts(self) -> bool:
        """Whether the FFN of each seed stays an expert of its own."""
        return self.mix["ffn"] == EXPERTS

    @property
    def attention_experts(self) -> bool:
        """Whether the attention of each seed stays an expert of its own."""
        return self.mix["attention.query"] == EXPERTS

    @property
    def shared_key_value(self) -> bool:
        """Whether the attention experts share one key and value projection."""
        return self.attention_experts and self.mix["attention.key"] != EXPERTS

    def resolved(self) -> dict[str, Any]:
        """The recipe as it acts, for `upcycle.json`: defaults filled in, routers and losses where there are any."""
        result: dict[str, Any] = {
            "name": self.name,
            "summary": self.summary,
            "paper": self.paper,
            "mix": dict(self.mix),
        }
        if self.copies:
            result["copies"] = True
        if self.weights:
            result["weights"] = dict(self.weights)
        if self.prompts:
            result["prompts"] = {name: list(prompts) for name, prompts in self.prompts.items()}
        if self.ffn_experts:
            result["router"] = {"ffn": asdict(self.ffn_router)}
            if self.attention_experts:
                result["router"]["attention"] = asdict(self.attention_router)
            result["loss"] = asdict(self.loss)
        return result

    def routers(self) -> dict[str, FfnRouter | AttentionRouter]:
        """The routers that the mixture will have, by kind."""
        found: dict[str, FfnRouter | AttentionRouter] = {}
        if self.ffn_experts:
            found["ffn"] = self.ffn_router
        if self.attention_experts:
            found["attention"] = self.attention_router
        return found

    def from_text(self) -> dict[str, FfnRouter | AttentionRouter]:
        """Those of its routers that are initialised from text."""
        return {kind: router for kind, router in self.routers().items() if router.init in FROM_TEXT}

    def settled(self, has_text: bool) -> "Recipe":
        """What it means where the merge has text for every expert, or has none.

        With text, random routers are fitted to it, unless the recipe says of another router that text initialises it;
        without, what is mixed by `usage` is averaged.

        Raises:
            RecipeError: text without a use, or a router that needs text where there is none.
        """
        if not has_text:
            if self.from_text():
                kind, router = next(iter(self.from_text().items()))
                raise RecipeError(
                    f"recipe '{self.name}': [router.{kind}] init is '{router.init}', which needs text for each expert; "
                    "give --router-data NAME=FILE …, or [prompts] in the recipe"
                )
            return replace(self, mix={role: MEAN if mix == USAGE else mix for role, mix in self.mix.items()})
        if not self.ffn_experts or self.copies:
            why = "makes all experts of one seed" if self.copies else "makes no experts"
            raise RecipeError(f"recipe '{self.name}' {why}, so text cannot tell them apart; leave out --router-data")
        if self.from_text():
            return self
        fitted: dict[str, Any] = {
            f"{kind}_router": replace(router, init="fit")
            for kind, router in self.routers().items()
            if router.init == "random"
        }
        settled = replace(self, **fitted)
        if not settled.from_text() and USAGE not in self.mix.values():
            raise RecipeError(f"recipe '{self.name}' initialises nothing from text; leave out --router-data")
        return settled


def builtin_recipes() -> dict[str, Recipe]:
    """Every recipe that ships with upcycle, by name."""
    files = resources.files("upcycle.recipes").iterdir()
    names = sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml"))
    return {name: load_recipe(name) for name in names}


def load_recipe(name: str, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe by name or from a `.toml` file, then apply `key=value` overrides (`router.ffn.top_k=2`)."""
    table = _read_table(name)
    for override in overrides:
        _override(table, override)
    return parse_recipe(Path(name).stem if name.endswith(".toml") else name, table)


def parse_recipe(name: str, table: Mapping[str, Any]) -> Recipe:
    """Check a recipe's table and turn it into a `Recipe`.

    Raises:
        RecipeError: an unknown key (the nearest right one is named), a wrong type, or a combination that cannot be.
    """
    where = f"recipe '{name}'"
    scalars = {"summary": str, "paper": str, "needs": str, "example": str, "copies": bool}
    _check_keys(where, table, (*scalars, "mix", "weights", "prompts", "router", "loss"))
    values = {key: _typed(where, key, table[key], kind) for key, kind in scalars.items() if key in table}
    if "summary" not in values:
        raise RecipeError(f"{where}: 'summary' is missing; say in one sentence what the recipe does")
    routers = _table(where, "router", table)
    _check_keys(f"{where}, [router]", routers, ("ffn", "attention"))
    recipe = Recipe(
        name=name,
        mix=_parse_mix(where, _table(where, "mix", table)),
        weights=_parse_weights(where, _table(where, "weights", table)),
        prompts=_parse_prompts(where, _table(where, "prompts", table)),
        ffn_router=_section(f"{where}, [router.ffn]", FfnRouter(), _table(where, "ffn", routers)),
        attention_router=_section(
            f"{where}, [router.attention]", AttentionRouter(), _table(where, "attention", routers)
        ),
        loss=_section(f"{where}, [loss]", Loss(), _table(where, "loss", table)),
        **values,
    )
    _check_combination(where, recipe)
    _check_used(where, recipe.mix, {*table, *(f"router.{kind}" for kind in routers)})
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
        ways = (EXPERTS, MEAN, WEIGHTED, USAGE)
        if not isinstance(mix, str) or not (mix in ways or mix.startswith(SEED_PREFIX)):
            hint = did_you_mean(str(mix)[:80], (*ways, "seed:<name>"))
            raise RecipeError(f"{where}, [mix]: {role} = {mix!r} is no way to mix{hint}")
    default = flat.get("default", MEAN)
    if default == EXPERTS:
        raise RecipeError(
            f"{where}, [mix]: default = 'experts' would split norms and embeddings; name the roles instead"
        )
    return {role: flat.get(role, default) for role in ROLES}


def _check_used(where: str, mix: Mapping[str, str], sections: set[str]) -> None:
    """Refuse sections that nothing reads, so that no option is without effect."""
    read = {
        "router.ffn": mix["ffn"] == EXPERTS,
        "router.attention": mix["attention.query"] == EXPERTS,
        "loss": mix["ffn"] == EXPERTS,
        "weights": WEIGHTED in mix.values(),
        "prompts": mix["ffn"] == EXPERTS,
    }
    for section, used in read.items():
        if section in sections and not used:
            raise RecipeError(
                f"{where}: [{section}] has no effect, since [mix] mixes nothing that reads it; leave it out"
            )


def _parse_weights(where: str, table: Mapping[str, Any]) -> dict[str, float]:
    weights = {key: _typed(f"{where}, [weights]", key, value, float) for key, value in table.items()}
    for key, weight in weights.items():
        if not 0 <= weight < float("inf"):
            raise RecipeError(f"{where}, [weights]: {key} is {weight}, expected 0 or more")
    if weights and sum(weights.values()) == 0:
        raise RecipeError(f"{where}, [weights]: all weights are 0")
    return weights


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
    if recipe.ffn_router.top_k < 1:
        raise RecipeError(f"{where}, [router.ffn]: top_k is {recipe.ffn_router.top_k}, expected 1 or more")
    if recipe.attention_router.routing != "soft":
        raise RecipeError(
            f"{where}, [router.attention]: routing is '{recipe.attention_router.routing}', expected 'soft'"
        )
    if WEIGHTED in mix.values() and not recipe.weights:
        raise RecipeError(f"{where}: a role is 'weighted' but [weights] is missing; give each seed a share, code = 2")
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
    if type(value) is int and not -(2**63) < value < 2**63:
        raise RecipeError(f"{where}: {key} is a whole number beyond any use")
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        names = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}
        raise RecipeError(f"{where}: {key} is {value!r}, expected {names[kind]}")
    return value
