"""Recipes: how each role of a dense model is mixed. `recipe_file.py` reads them from TOML."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

from upcycle.errors import RecipeError

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
EXPERTS: Final = "experts"
MEAN: Final = "mean"
SOFTNESS: Final = 0.3  # docs/routers.md says what it was chosen by
WEIGHTED: Final = "weighted"
USAGE: Final = "usage"
EQUAL: Final = "equal"
ANCESTOR: Final = "ancestor"
SEED_PREFIX: Final = "seed:"
FROM_TEXT: Final = ("fit", "prototypes")
INITS: Final = ("random", "zeros", *FROM_TEXT)


@dataclass(frozen=True)
class FfnRouter:
    """Top-k router of the FFN experts; `normalize` rescales the selected gates to sum to 1 (arXiv:2408.08274, 3).

    Set from text, `softness` multiplies what the text gives, and `keep_scale` multiplies gates that are not rescaled
    by a number a layer, such that they sum to 1 on average. `top_k` counts experts before they are split
    (`Experts.granularity`). `bias` is added to the logits of the experts that it names (arXiv:2507.07024).
    """

    top_k: int = 1
    normalize: bool = False
    init: str = "random"
    std: float = 0.02
    softness: float = SOFTNESS
    keep_scale: bool = True
    bias: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class AttentionRouter:
    """Router of the attention experts: soft, every token uses every expert, or "top-k" (arXiv:2408.08274, table 6).

    With "top-k" the gates of all but the `top_k` largest are 0, and `normalize` rescales those to sum to 1.
    """

    routing: str = "soft"
    top_k: int = 1
    normalize: bool = False
    init: str = "random"
    std: float = 0.02
    softness: float = SOFTNESS


@dataclass(frozen=True)
class Loss:
    """Weights of the auxiliary losses: NLL + sum over layers of load_balance * L_LB + z * L_z."""

    load_balance: float = 0.01
    z: float = 0.001


@dataclass(frozen=True)
class Experts:
    """How FFN experts are made of the seeds' FFNs.

    Attributes:
        granularity: G; each FFN is split by its inner units into G experts, whose router rows are equal, so that a
            token takes all G or none, and whose outputs are scaled by G (virtual groups, arXiv:2410.07524).
        extra: so many further experts, all `extra_from`, "ancestor", "mean", "weighted" or "seed:NAME"
            (arXiv:2408.08274, table 4).
        shared: FFNs that every token uses beside the routed ones, each one of these.
        shared_weight: the share of all of them in the output; the routed experts have the rest, so that equal FFNs
            give what one of them gives.
        noise: each expert's weights get normal noise of so many times their own standard deviation.
        drop: the share r of each expert's inner units that are drawn anew, gate, up and down alike, with the mean and
            standard deviation of what they replace (arXiv:2502.19261).
    """

    granularity: int = 1
    extra: int = 0
    extra_from: str = ANCESTOR
    shared: Sequence[str] = ()
    shared_weight: float = 0.5
    noise: float = 0.0
    drop: float = 0.0


@dataclass(frozen=True)
class Recipe:
    """How each role is mixed.

    `mix` holds every role of `ROLES`; `weights` the share of each seed, by name, where a role is `weighted`, or `usage`
    and there is no text; `prompts` text for each seed's expert, by name, where no other is given; `copies` means one
    seed, copied to every expert; `layers` says which layers get experts ("all", "every 2", "0-3, 8-"), the others are
    mixed as their norms are.
    """

    name: str
    summary: str
    mix: Mapping[str, str]
    paper: str = ""
    needs: str = ""
    example: str = ""
    copies: bool = False
    layers: str = "all"
    experts: Experts = Experts()
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

    def ffn_groups(self, num_experts: int) -> int:
        """How many FFNs are routed, before they are split: one for each expert, and the extra ones."""
        return num_experts + self.experts.extra

    def ffn_count(self, num_experts: int) -> int:
        """How many FFN experts a layer has in all."""
        return self.ffn_groups(num_experts) * self.experts.granularity

    @property
    def ffn_active(self) -> int:
        """How many FFN experts a token uses."""
        return self.ffn_router.top_k * self.experts.granularity

    @property
    def ways(self) -> tuple[str, ...]:
        """Every way to mix that it uses: of its roles, its shared experts and its extra ones."""
        experts = self.experts
        return (*self.mix.values(), *experts.shared, *((experts.extra_from,) if experts.extra else ()))

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
        if self.layers != "all":
            result["layers"] = {"mix": self.layers}
        if self.ffn_experts:
            if self.experts != Experts():
                result["experts"] = {**asdict(self.experts), "shared": list(self.experts.shared)}
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

    def weighted_by(self, weights: Mapping[str, float]) -> "Recipe":
        """It with these shares of the seeds, by name, in whatever it averages: `mean` becomes `weighted`.

        What is mixed by `usage` stays so, and falls back to these shares where there is no text.

        Raises:
            RecipeError: it averages nothing.
        """
        if self.copies:
            raise RecipeError(f"recipe '{self.name}' copies one seed, so nothing is averaged; leave out --weights")

        def weighted(way: str) -> str:
            return WEIGHTED if way == MEAN else way

        experts = replace(
            self.experts,
            shared=tuple(weighted(way) for way in self.experts.shared),
            extra_from=weighted(self.experts.extra_from) if self.experts.extra else self.experts.extra_from,
        )
        mix = {role: weighted(way) for role, way in self.mix.items()}
        made = replace(self, mix=mix, experts=experts, weights=dict(weights))
        if not {WEIGHTED, USAGE} & {*made.ways}:
            ways = ", ".join(sorted({*made.ways}))
            raise RecipeError(
                f"recipe '{self.name}' averages nothing (its roles are mixed by {ways}); leave out --weights"
            )
        return made

    def settled(self, has_text: bool) -> "Recipe":
        """What it means where the merge has text for every expert, or has none.

        With text, random routers are fitted to it, unless the recipe says of another router that text initialises it;
        without, what is mixed by `usage` is averaged, by `weights` where there are some.

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
            average = WEIGHTED if self.weights else MEAN
            return replace(self, mix={role: average if mix == USAGE else mix for role, mix in self.mix.items()})
        if not self.ffn_experts or self.copies:
            why = "makes all experts of one seed" if self.copies else "makes no experts"
            raise RecipeError(f"recipe '{self.name}' {why}, so text cannot tell them apart; leave out --router-data")
        if self.experts.extra:
            raise RecipeError(
                f"recipe '{self.name}' makes extra experts that no text belongs to; leave out --router-data"
            )
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


def mixed_layers(layers: str, count: int) -> tuple[int, ...]:
    """Which of `count` layers get experts, by `Recipe.layers`: "all", "every N" (the Nth, the 2Nth, …), or numbers and
    ranges from 0 on: "0-3, 6, 8-".

    Raises:
        RecipeError: it cannot be read, names a layer that there is not, or none.
    """
    every = re.fullmatch(r"every ([1-9]\d{0,4})", layers)
    chosen: set[int] = set()
    if layers == "all" or every:
        step = int(every[1]) if every else 1
        chosen = set(range(step - 1, count, step))
    for part in () if layers == "all" or every else layers.split(","):
        match = re.fullmatch(r"(\d{1,5})(-(\d{1,5})?)?", part.strip())
        if not match:
            raise RecipeError(f'[layers]: mix is \'{layers[:80]}\', expected "all", "every 2" or like "0-3, 6, 8-"')
        first = int(match[1])
        last = int(match[3]) if match[3] else count - 1 if match[2] else first
        if not first <= last < count:
            raise RecipeError(f"[layers]: mix is '{layers[:80]}', but there are the layers 0 to {count - 1}")
        chosen |= {*range(first, last + 1)}
    if not chosen:
        raise RecipeError(f"[layers]: mix is '{layers[:80]}', which is none of the {count} layers")
    return tuple(sorted(chosen))
