"""What is said of figures: sides, distances, probabilities, and what is left unsaid."""

from typing import Any

import numpy as np

from upcycle.relatives import Relatives
from upcycle.verdict import Scores, short_names, verdict

DOMAINS = ["code", "law"]
LOSSES = {
    "out/mix": (2.10, 3.10),
    "code": (2.00, 3.50),
    "law": (2.60, 3.00),
    "base": (2.50, 3.40),
    "mean": (2.45, 3.39),
}
FAMILY = Relatives({"base": "base", "code": "code", "law": "law"}, "base", "mean")


def scores(losses: dict[str, tuple[float, ...]] = LOSSES, noise: float = 0.01, **changes: Any) -> Scores:
    table = np.array(list(losses.values())).T
    random = np.random.default_rng(0)
    draws = [row + random.normal(0, noise, (1000, len(losses))) for row in table]
    values = {"unit": "nats per token", "draws": draws, "documents": [50, 50], **changes}
    return Scores(list(losses), DOMAINS[: len(table)], losses=table, **values)


def said(*arguments: Any, **changes: Any) -> str:
    return "\n".join(verdict(scores(*arguments, **changes), {"out/mix": FAMILY}, {}))


def test_the_answer_comes_first_then_each_comparison() -> None:
    first, oracle, seed, way, average = verdict(scores(), {"out/mix": FAMILY}, {})
    assert first == (
        "In the mean of the domains mix is the best of all that were measured; next is code (0.150 nats per token "
        "ahead, 2.600 against 2.750, real with a probability above 99.9%). It is the best in 0 of 2 domains."
    )
    assert "the oracle: 0.100 nats per token behind, 2.600 against 2.500" in oracle
    assert oracle.endswith("By domain: code 0.100 behind code; law 0.100 behind law.")
    assert "(base): 0.350 nats per token ahead, 2.600 against 2.950" in seed
    assert seed.endswith("better in 2 of 2 domains.")
    assert way == "That is 78% of the way from that seed to the oracle."
    assert "Against the plain average of its seeds (mean): 0.320 nats per token ahead, 2.600 against 2.920" in average


def test_a_mixture_worse_than_its_seed_is_told_so() -> None:
    text = said(LOSSES | {"out/mix": (2.8, 3.6)})
    assert "mix is not the best: code is better (0.450 nats per token behind" in text
    assert "So far mix is worse than what it began with: train it before you use it." in text


def test_of_a_second_mixture_less_is_said() -> None:
    losses = LOSSES | {"out/fresh": (2.9, 3.6)}
    family = {"out/fresh": FAMILY, "out/mix": FAMILY}
    text = "\n".join(verdict(scores(losses), family, {}))
    assert text.count("the oracle") == 2  # the mixture's own two sentences, the other is far from it
    assert text.index("In the mean of the domains mix") < text.index("In the mean of the domains fresh")
    assert "So far fresh is worse than what it began with" in text


def test_a_difference_within_the_noise_is_called_none() -> None:
    text = said(LOSSES | {"out/mix": (2.01, 3.49)}, 0.5)
    assert "no clear difference, real with a probability of only " in text
    assert "code 0.010 behind code (no clear difference" in text


def test_a_single_document_gives_no_probability() -> None:
    text = said(draws=[None, None], documents=[1, 1])
    assert "probability " not in text.replace("probabilities", "")
    assert "Few documents, counted as if of one length: code (1), law (1)" in text


def test_what_was_not_measured_is_asked_for_not_guessed() -> None:
    alone = {"out/mix": (2.1, 3.1)}
    family = Relatives({"code": None, "law": None})
    (only,) = verdict(scores(alone), {"out/mix": family}, {})
    assert only == (
        "mix was measured alone: 2.600 nats per token in the mean. Add code and law to compare it with what it was "
        "merged from."
    )


def test_several_tokenizers_are_said() -> None:
    text = said(unit="bits per byte")
    assert "0.150 bits per byte ahead" in text
    assert "different tokenizers, so they are compared by bits per byte only" in text


def test_without_a_mixture_the_best_is_named() -> None:
    dense = {name: losses for name, losses in LOSSES.items() if name != "out/mix"}
    (sentence,) = verdict(scores(dense), {}, {})
    assert sentence.startswith("Best in the mean is code (0.050 nats per token ahead of law, real with a probability")
    assert sentence.endswith("Best by domain: code code, law law.")


def test_routing_is_told_where_it_says_something() -> None:
    def domain(load: list[list[float]], own: list[float] | None) -> dict[str, Any]:
        return {"load": load, "own_share": own}

    loads = {"code": domain([[0.9, 0.05, 0.05]] * 2, [0.8, 0.7]), "law": domain([[0.96, 0.01, 0.03]] * 2, None)}
    alike = np.array([np.eye(3), [[1, 0.5, 0.995], [0.5, 1, 0.5], [0.995, 0.5, 1]]])
    routing = {
        "experts": ["code", "b", "c"],
        "top_k": 1,
        "layers": [4, 6],
        "domains": loads,
        "similarity": {"ffn_outputs": alike.tolist()},
    }
    text = "\n".join(verdict(scores(), {"out/mix": FAMILY}, {"out/mix": routing}))
    assert "routes a token to the expert of its text's domain: code 75% (chance: 33%)" in text
    assert "Idle experts of mix, with under a tenth of an equal share of the tokens: b in layer 4, b in layer 6" in text
    assert "FFN experts of mix answer almost alike: code and c in layer 6, cosine 0.995." in text


def test_names_are_short_where_they_can_be() -> None:
    assert short_names(["a/x", "b/x", "c/y/"]) == {"a/x": "a/x", "b/x": "b/x", "c/y/": "y"}
