"""What a recipe says of its result, in words: rows of a report and of a model card."""

from collections.abc import Mapping
from typing import Any, Final

from upcycle.run_records import clean

_ROLE_NAMES: Final = {
    "ffn": "FFN",
    "attention.query": "attention query",
    "attention.key": "attention key",
    "attention.value": "attention value",
    "attention.output": "attention output",
    "norm": "norms",
    "embedding": "embedding",
    "head": "head",
}
_MIX_NAMES: Final = {
    "experts": "Experts",
    "mean": "Averaged",
    "weighted": "Weighted mean",
    "usage": "By token",
    "equal": "The same in all",
    "ancestor": "Of the ancestor alone",
}


def _table(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def mix_facts(mix: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The roles by the way in which they are mixed."""
    ways: dict[str, list[str]] = {}
    for role, name in _ROLE_NAMES.items():
        if role in mix:
            ways.setdefault(clean(mix[role]), []).append(name)
    order = sorted(ways, key=lambda way: way != "experts")
    return [(_MIX_NAMES.get(way, f"Of {way.removeprefix('seed:')} alone"), ", ".join(ways[way])) for way in order]


def expert_facts(recipe: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a recipe makes of the FFNs beside taking each for one expert, and in which layers."""
    facts = []
    experts, layers = _table(recipe.get("experts")), _table(recipe.get("layers"))
    if layers.get("mix"):
        facts.append(("Layers with experts", f"{clean(layers['mix'])}; the others are mixed as the norms are"))
    if experts.get("granularity", 1) != 1:
        facts.append(("Each FFN split into", f"{clean(experts['granularity'])} experts"))
    if experts.get("extra"):
        facts.append(("Extra experts", f"{clean(experts['extra'])}, of {clean(experts.get('extra_from'))}"))
    shared = experts.get("shared")
    if isinstance(shared, list) and shared:
        share = f"{clean(experts.get('shared_weight'))} of the output"
        facts.append(("Shared experts", f"{', '.join(map(clean, shared))}; {share}"))
    if experts.get("noise"):
        facts.append(("Noise on experts", f"{clean(experts['noise'])} standard deviations"))
    if experts.get("drop"):
        facts.append(("Inner units drawn anew", f"{clean(experts['drop'])} of each expert's"))
    return facts


def router_facts(recipe: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How tokens are routed, from which start, and the routers' losses."""
    facts = []
    routers, loss = _table(recipe.get("router")), _table(recipe.get("loss"))
    if "ffn" in routers:
        router = _table(routers["ffn"])
        gates = "gates rescaled to 1" if router.get("normalize") else "gates as they are"
        bias = ", ".join(f"{clean(name)} {clean(value)}" for name, value in _table(router.get("bias")).items())
        biased = f", bias {bias}" if bias else ""
        facts.append(("FFN router", f"top {clean(router.get('top_k'))}, {gates}, {_init(router)}{biased}"))
    if "attention" in routers:
        router = _table(routers["attention"])
        routing = clean(router.get("routing"))
        if routing == "top-k":
            rescaled = "gates rescaled to 1" if router.get("normalize") else "gates as they are"
            routing = f"top {clean(router.get('top_k'))}, {rescaled}"
        facts.append(("Attention router", f"{routing}, {_init(router)}"))
    if loss:
        terms = f"{clean(loss.get('load_balance'))} × load balance + {clean(loss.get('z'))} × z"
        facts.append(("Routers' losses", terms))
    return facts


def _init(router: Mapping[str, Any]) -> str:
    starts = {
        "zeros": "starts at zero",
        "fit": f"fitted to text (softness {clean(router.get('softness'))})",
        "prototypes": f"from text, by its means (softness {clean(router.get('softness'))})",
    }
    return starts.get(str(router.get("init")), f"random start (std {clean(router.get('std'))})")
