"""A recipe in words, the format it can have with each family, and its cost beside one dense seed's."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from upcycle.dense_config import DenseModel, read_dense
from upcycle.errors import RecipeError
from upcycle.families import FAMILIES
from upcycle.native import NATIVE, native_misfit
from upcycle.recipe import (
    ANCESTOR,
    EQUAL,
    EXPERTS,
    FROM_TEXT,
    MEAN,
    ROLES,
    SEED_PREFIX,
    USAGE,
    WEIGHTED,
    AttentionRouter,
    Experts,
    FfnRouter,
    Recipe,
    mixed_layers,
)
from upcycle.recipe_checks import check_recipe
from upcycle.recipe_file import MAX_LAYERS
from upcycle.scaling import Estimate, estimate

# A Llama of 1.24 billion parameters (Llama 3.2 1B's sizes), of which costs are shown where no config.json is given.
REFERENCE: Final[Mapping[str, Any]] = {
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
REFERENCE_NAME: Final = "a Llama of 1.24 billion parameters"
EXPERTS_SHOWN: Final = 4
_LABELS: Final = {"ffn": "FFN", "norm": "norms"}


@dataclass(frozen=True)
class Fit:
    """What becomes of a family's models, of the values that their configs have by default.

    Attributes:
        format: "native", "bam", "dense" or "refused".
        native: the class of transformers' own, where it is native.
        why: it is not; None where it is.
        why_with_text: it is not where routers are set from text; None where that changes nothing.
    """

    format: str
    native: str | None = None
    why: str | None = None
    why_with_text: str | None = None


@dataclass(frozen=True)
class Explanation:
    """A recipe in words.

    Attributes:
        sections: heading and text, in the order in which they are to be read.
        formats: by model type.
        model: in words, what `estimate` is of.
        num_experts: as many dense models are mixed, or copies made, in `estimate`.
        estimate: the costs, None where the recipe cannot serve the reference model.
        misfit: why it cannot.
    """

    recipe: Recipe
    sections: tuple[tuple[str, str], ...]
    formats: Mapping[str, Fit]
    model: str
    num_experts: int
    estimate: Estimate | None
    misfit: str | None


def explain(
    recipe: Recipe, config: Mapping[str, Any] | None = None, where: str = "", num_experts: int | None = None
) -> Explanation:
    """Explain a recipe, with the costs of `num_experts` models of a config.json, else of `REFERENCE`.

    Args:
        config: a dense model's; `where` names it in messages.
        num_experts: 4 by default, or as many as the recipe's routers choose.

    Raises:
        RecipeError, SeedError: a `config` that cannot be mixed, or not by this recipe.
    """
    attention = recipe.attention_router.top_k if recipe.attention_experts else 1
    count = num_experts or max(EXPERTS_SHOWN, recipe.ffn_router.top_k, attention)
    costs, misfit = None, None
    try:
        costs = estimate(recipe, config or REFERENCE, where or REFERENCE_NAME, count)
    except RecipeError as error:
        if config:
            raise
        misfit = str(error)
    formats = {model_type: _family_fit(recipe, model_type) for model_type in FAMILIES}
    own = _fit(recipe, read_dense(config, where)) if config else None
    sections = [
        ("Needs", recipe.needs),
        ("Mix", "\n".join(f"{label}: {words}" for label, words in _roles(recipe))),
        ("Experts", " ".join(_experts(recipe))),
        ("Layers", _layers(recipe)),
        ("FFN router", _ffn_router(recipe) if recipe.ffn_experts else ""),
        ("Attention router", _attention_router(recipe) if recipe.attention_experts else ""),
        ("At the start", _STARTS[starts_as(recipe)](recipe)),
        ("Loss", _loss(recipe)),
        ("Format", "\n".join(_formats(formats, where, own))),
        ("Example", recipe.example),
    ]
    return Explanation(
        recipe=recipe,
        sections=tuple((heading, text) for heading, text in sections if text),
        formats=formats,
        model=where or REFERENCE_NAME,
        num_experts=count,
        estimate=costs,
        misfit=misfit,
    )


def in_one_line(recipe: Recipe) -> str:
    """What a recipe makes."""
    by_way: dict[str, list[str]] = {}
    for label, way in _merged(recipe):
        by_way.setdefault(way, []).append(label)
    mixes = "; ".join(f"{', '.join(labels)}: {way}" for way, labels in by_way.items())
    if not recipe.ffn_experts:
        return f"a dense model ({mixes})"
    of = "copies of one seed" if recipe.copies else "the seeds"
    active = f"top {recipe.ffn_active}" + (", gates rescaled" if recipe.ffn_router.normalize else "")
    return f"a mixture of {of}, {active} ({mixes})"


def starts_as(recipe: Recipe) -> str:
    """What the result computes before any training.

    "dense": there are no experts; "seed": the one seed's function, up to rounding; "equal": that of the seeds, if they
    were equal; "other": not even that.
    """
    if not recipe.ffn_experts:
        return "dense"
    attention = recipe.attention_router
    sums_to_one = recipe.ffn_router.normalize and (
        not recipe.attention_experts or attention.routing == "soft" or attention.normalize
    )
    if not sums_to_one or recipe.experts.noise or recipe.experts.drop:
        return "other"
    return "seed" if recipe.copies else "equal"


def _merged(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Roles and how they are mixed, the attention's as one where they all are alike."""
    attention = {recipe.mix[role] for role in ROLES if role.startswith("attention.")}
    for role in ROLES:
        if role.startswith("attention.") and len(attention) == 1:
            if role == "attention.query":
                yield "attention", recipe.mix[role]
        else:
            yield _LABELS.get(role, role), recipe.mix[role]


def _roles(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Roles that are mixed alike on one line, and how, in words."""
    by_words: dict[str, list[str]] = {}
    for label, way in _merged(recipe):
        by_words.setdefault(_way(recipe, way, label), []).append(label)
    for words, labels in by_words.items():
        yield ", ".join(labels), words


def _way(recipe: Recipe, way: str, label: str) -> str:
    shares = ", ".join(f"{name} {share:g}" for name, share in recipe.weights.items())
    weighted = f"the mean, weighted: {shares}"
    if way == EXPERTS:
        if recipe.copies:
            return "the seed's, copied into every expert"
        which = "the router picks some for each token"
        if label != "FFN" and recipe.attention_router.routing == "soft":
            which = "every token uses all of them, each by its gate"
        return f"each seed's stays an expert of its own; {which}"
    if way.startswith(SEED_PREFIX):
        return f"that of seed '{way.removeprefix(SEED_PREFIX)}'"
    if recipe.copies and way in (MEAN, WEIGHTED, EQUAL, ANCESTOR):
        return "the seed's"
    average = weighted if recipe.weights else "the mean"
    words = {
        MEAN: "the mean of the seeds'",
        WEIGHTED: weighted,
        EQUAL: "the same in all seeds; refused, and by which tensor, where it is not",
        ANCESTOR: "that of the seeds' ancestor, which is found among four or more by its weights",
        USAGE: f"with --router-data each token's row by how often each seed's text has it, else {average}",
    }
    return words[way]


def _one(way: str) -> str:
    names = {ANCESTOR: "the ancestor's", MEAN: "the seeds' mean", WEIGHTED: "the seeds' weighted mean"}
    return names.get(way) or f"seed '{way.removeprefix(SEED_PREFIX)}'s"


def _experts(recipe: Recipe) -> Iterator[str]:
    """What [experts] makes of the FFNs, in sentences."""
    experts: Experts = recipe.experts
    if not recipe.ffn_experts:
        return
    if recipe.copies:
        yield "As many as --num-experts says, all of the one seed."
    else:
        yield "One for each seed."
    if experts.extra:
        yield f"{experts.extra} more, {_one(experts.extra_from)} FFN."
    if experts.granularity > 1:
        yield (
            f"Each FFN is split by its inner units into {experts.granularity} experts with equal router rows, so a "
            f"token takes all {experts.granularity} or none until training tells them apart; their outputs are "
            f"multiplied by {experts.granularity}."
        )
    if experts.shared:
        ways = ", ".join(f"{_one(way)} FFN" for way in experts.shared)
        yield (
            f"Beside them every token uses {len(experts.shared)} shared ({ways}); their share of the output is "
            f"{experts.shared_weight:g}, that of the routed ones {1 - experts.shared_weight:g}."
        )
    if experts.noise:
        yield f"Each expert's weights get normal noise of {experts.noise:g} of their own standard deviation."
    if experts.drop:
        yield (
            f"Of each expert's inner units {experts.drop:.0%} are drawn anew, gate, up and down alike, with the mean "
            "and deviation of what they replace."
        )


def _layers(recipe: Recipe) -> str:
    if recipe.layers == "all":
        return ""
    which = recipe.layers if recipe.layers.startswith("every") else f"number {recipe.layers} (from 0)"
    return f"Experts are in these layers: {which}. The others are dense, mixed as the norms are ({recipe.mix['norm']})."


def _ffn_router(recipe: Recipe) -> str:
    router, shards = recipe.ffn_router, recipe.experts.granularity
    what = "expert" if shards == 1 else "FFN"
    several = f"{router.top_k} {what}s" if router.top_k > 1 else what
    whole = f", whole: {recipe.ffn_active} experts" if shards > 1 else ""
    which = f"Each token uses the {several} with the largest gate{'s' * (router.top_k > 1)}{whole}."
    if recipe.ffn_active == 1:
        gates = "Its gate is the router's probability as it is, less than 1."
        if router.normalize:
            gates = "Its gate is rescaled to 1, so the language-model loss gives the router no gradient."
    elif router.normalize:
        gates = "Their gates are rescaled to sum to 1."
    else:
        gates = "Their gates are the router's probabilities as they are, which sum to less than 1."
    biases = ", ".join(f"{name} {bias:g}" for name, bias in router.bias.items())
    bias = [f"A bias on its logits, by expert: {biases}."] if biases else []
    return " ".join([which, gates, _init(recipe, router), *bias])


def _attention_router(recipe: Recipe) -> str:
    router = recipe.attention_router
    if router.routing == "soft":
        which = "Soft: every token uses every expert, and gates sum to 1."
    else:
        which = f"Every token uses the {router.top_k} with the largest gates; the others' outputs are multiplied by 0."
        which += " Gates are rescaled to sum to 1." if router.normalize else " Gates sum to less than 1."
    return f"{which} {_init(recipe, router)}"


def _takes_text(recipe: Recipe) -> bool:
    """Whether --router-data may set its routers."""
    return recipe.ffn_experts and not recipe.copies and not recipe.experts.extra


def _init(recipe: Recipe, router: FfnRouter | AttentionRouter) -> str:
    fit = f"a logistic regression on each seed's text (softness {router.softness:g})"
    scaled = isinstance(router, FfnRouter) and router.keep_scale and not router.normalize
    scale = ", and a number a layer makes gates sum to 1 on average (keep_scale)" if scaled else ""
    if router.init == "fit":
        return f"It starts as {fit}{scale}."
    if router.init == "prototypes":
        return f"It starts as the means of each seed's text (softness {router.softness:g}){scale}."
    if router.init == "zeros":
        return "It starts at zero: all gates are alike."
    drawn = f"It starts at random (standard deviation {router.std:g})"
    if not _takes_text(recipe) or recipe.from_text():
        return f"{drawn}."
    return f"{drawn}; with --router-data as {fit}{scale}."


def _other(recipe: Recipe) -> str:
    """Why a mixture starts as no seed's function, and would not if all seeds were equal."""
    causes = []
    router = recipe.ffn_router
    if not router.normalize:
        scaled = router.init in FROM_TEXT and router.keep_scale
        quieter = "the FFN's gates sum to less than 1, so it is quieter than a seed's"
        causes.append("the FFN's gates sum to 1 on average alone" if scaled else quieter)
    attention = recipe.attention_router
    if recipe.attention_experts and attention.routing != "soft" and not attention.normalize:
        causes.append("the attention's gates sum to less than 1")
    if recipe.experts.noise:
        causes.append("the experts are a seed's with noise")
    if recipe.experts.drop:
        causes.append("a share of the experts' units is drawn anew")
    of = "the seed's" if recipe.copies else "any seed's, even if all were equal"
    return f"Not the function of {of}: {'; '.join(causes)}. Train it."


_STARTS: Final = {
    "dense": lambda _: "A dense model; there are no routers to train.",
    "seed": lambda _: "The seed's own function, up to rounding: the experts are equal and the gates sum to 1.",
    "equal": lambda recipe: (
        "A mixture of the seeds' functions, whose gates sum to 1: equal seeds would give their own function. Train it"
        + (", or set its routers from text." if _takes_text(recipe) and not recipe.from_text() else ".")
    ),
    "other": _other,
}


def _loss(recipe: Recipe) -> str:
    if not recipe.ffn_experts:
        return ""
    return f"In training: that of the next token + {recipe.loss.load_balance:g} load balance + {recipe.loss.z:g} z."


def _fit(recipe: Recipe, model: DenseModel) -> Fit:
    """The format of what a recipe makes of a dense model."""
    if not recipe.ffn_experts:
        return Fit("dense")
    why = native_misfit(model, recipe, bool(recipe.from_text()))
    if why is not None:
        return Fit("bam", why=why)
    with_text = native_misfit(model, recipe, True) if _takes_text(recipe) else None
    return Fit("native", NATIVE[model.family.native].architecture, why_with_text=with_text)


def _family_fit(recipe: Recipe, model_type: str) -> Fit:
    """`_fit` of a family, whatever its models' numbers of layers and inner units."""
    model = read_dense({"model_type": model_type}, model_type)
    some = recipe.ffn_experts and len(mixed_layers(recipe.layers, MAX_LAYERS)) < MAX_LAYERS
    general = replace(recipe, layers="every 2" if some else "all", experts=replace(recipe.experts, granularity=1))
    try:
        check_recipe(general, model, max(EXPERTS_SHOWN, recipe.ffn_router.top_k, recipe.attention_router.top_k))
    except RecipeError as error:
        return Fit("refused", why=str(error))
    return _fit(general, model)


def _formats(formats: Mapping[str, Fit], where: str, own: Fit | None) -> Iterator[str]:
    """With which families it is native, and why not with the others, those of one reason in one line."""
    if own and own.format != "dense":
        yield f"{where}: native, {own.native}." if own.native else f"{where}: BAM, since {own.why}."
    groups: dict[tuple[str, str], dict[str, list[str]]] = {}  # families by their class, by format and reason
    for model_type, fit in formats.items():
        family = FAMILIES[model_type]
        name = family.architecture.removesuffix("ForCausalLM")
        known = NATIVE[family.native].architecture.removesuffix("ForCausalLM") if family.native else ""
        reasons = [(fit.format, fit.why)] + [("fitted", fit.why_with_text)] * bool(fit.why_with_text)
        for kind, why in reasons:
            reason = why or ""
            if family.architecture in reason:
                reason = "transformers has no mixture class with their layers"
            of = known if kind == "native" or known in reason else ""
            reason = reason.replace(known, "the class") if known else reason
            groups.setdefault((kind, reason), {}).setdefault(of, []).append(name)
    order = ["dense", "native", "fitted", "bam", "refused"]
    for (kind, reason), classes in sorted(groups.items(), key=lambda group: order.index(group[0][0])):
        families = ", ".join(f"{', '.join(names)} ({of})" if of else ", ".join(names) for of, names in classes.items())
        if sum(map(len, classes.values())) == len(formats):
            families = "every family"
        yield {
            "dense": "A dense model of the seeds' own family.",
            "native": f"Native, a class of transformers' own, for {families}.",
            "bam": f"BAM for {families}: {reason}.",
            "refused": f"Refused for {families}: {reason}.",
            "fitted": f"With --router-data BAM for {families}: {reason}.",
        }[kind]
    if not own and any(fit.native for fit in formats.values()):
        yield "That is of configs like each family's default; --config tells of yours."
