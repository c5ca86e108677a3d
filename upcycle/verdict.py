"""What the figures say, in words: a mixture against its specialists, its seed, the plain average and all others."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from upcycle.numeric import Array
from upcycle.relatives import Relatives
from upcycle.resampling import FEW, probability_below

TIE: Final = 1e-5  # nats or bits: what batches and rounding may change
CLEAR: Final = 0.975  # probability of its sign from which a difference is called one: its 95 % interval leaves out 0
IDLE: Final = 0.1  # of its equal share of the tokens, below which an expert is called idle in a layer
ALIKE: Final = 0.99  # cosine of two experts' answers, above which they are called alike


@dataclass(frozen=True)
class Scores:
    """Losses of models by domain, with draws of each that are in step with one another.

    Attributes:
        unit: "nats per token", or "bits per byte" for models of different tokenizers.
        losses: `[domains, models]`.
        draws: by domain `[draws, models]`, or None where a single document allows none.
        documents: by domain, long ones and short ones together worth so many of one length.
    """

    models: Sequence[str]
    domains: Sequence[str]
    unit: str
    losses: Array
    draws: Sequence[Array | None]
    documents: Sequence[float]

    def loss(self, model: str, domain: str | None = None) -> float:
        """In one domain, or the mean over all."""
        column = self.losses[:, self.models.index(model)]
        return float(column.mean() if domain is None else column[self.domains.index(domain)])

    def ahead(self, model: str, others: Sequence[str]) -> tuple[float, float | None]:
        """How far a model is ahead of another one in each domain, in the mean; and the probability that it is.

        Args:
            others: the model to compare with, by domain.
        """
        mine = self.models.index(model)
        theirs = [self.models.index(other) for other in others]
        gap = float(np.mean([losses[other] - losses[mine] for losses, other in zip(self.losses, theirs, strict=True)]))
        total: Any = 0.0
        for draws, other in zip(self.draws, theirs, strict=True):
            if draws is None:
                return gap, None
            total = total + draws[:, mine] - draws[:, other]
        return gap, probability_below(total / len(self.domains), TIE)

    def ahead_in(self, model: str, other: str, domain: str) -> tuple[float, float | None]:
        """The same in one domain."""
        index = self.domains.index(domain)
        one = Scores(
            self.models, [domain], self.unit, self.losses[[index]], [self.draws[index]], [self.documents[index]]
        )
        return one.ahead(model, [other])


def verdict(scores: Scores, relatives: Mapping[str, Relatives], routing: Mapping[str, Any]) -> list[str]:
    """Sentences: the answer first, what it rests on after.

    Args:
        relatives: of every mixture.
        routing: of every mixture, as `evaluate_models` gives it; None where the model does not tell.
    """
    names = short_names(scores.models)
    sentences = []
    # The best mixture is what the reader came for; of others, such as the same one before its training, less is said.
    for rank, mixture in enumerate(sorted(relatives, key=scores.loss)):
        family = relatives[mixture]
        writer = _Writer(scores, names, mixture, family)
        sentences += writer.against_all()
        if rank == 0:
            sentences += writer.against_specialists()
        sentences += writer.against_ancestor(with_oracle=rank == 0)
        if rank == 0:
            sentences += writer.against("the plain average of its seeds", family.average)
        if routing.get(mixture):
            sentences += _routing_sentences(names[mixture], routing[mixture])
        elif mixture in routing:
            sentences.append(
                f"What the routers of {names[mixture]} do is not shown: the model does not tell whom they select."
            )
    if not relatives:
        sentences += _best_of(scores, names)
    return sentences + _limits(scores)


def short_names(models: Sequence[str]) -> dict[str, str]:
    """What tables and sentences call each model: the shortest ends of paths that tell them apart."""
    parts = {model: [part for part in Path(model).absolute().parts if part != "/"] or ["/"] for model in models}
    names = {}
    for model, mine in parts.items():
        others = [other for other in parts.values() if other != mine]
        length = 1
        while length < len(mine) and any(other[-length:] == mine[-length:] for other in others):
            length += 1
        names[model] = "/".join(mine[-length:])
    return names


class _Writer:
    def __init__(self, scores: Scores, names: Mapping[str, str], mixture: str, family: Relatives) -> None:
        self.scores, self.names, self.mixture, self.family = scores, names, mixture, family
        self.name = names[mixture]

    def against_all(self) -> list[str]:
        """The mixture against the best other model in the mean."""
        scores = self.scores
        others = sorted((model for model in scores.models if model != self.mixture), key=scores.loss)
        missing = [name for name, model in self.family.seeds.items() if model is None]
        hint = f" Add {_listed(missing)} to compare it with what it was merged from." if missing else ""
        if not others:
            return [f"{self.name} was measured alone: {scores.loss(self.mixture):.3f} {scores.unit} in the mean.{hint}"]
        gap, probability = scores.ahead(self.mixture, [others[0]] * len(scores.domains))
        rank = f"the best of all that were measured; next is {self.names[others[0]]}"
        if gap < TIE:
            level = gap > -TIE or (probability is not None and probability > 1 - CLEAR)
            rank = f"{'about as good as' if level else 'not the best:'} {self.names[others[0]]}"
            rank += "" if level else " is better"
        wins = sum(
            scores.loss(self.mixture, domain) < min(scores.loss(other, domain) for other in others) - TIE
            for domain in scores.domains
        )
        figures = self._figures(gap, probability, scores.loss(self.mixture), scores.loss(others[0]))
        first = f"In the mean of the domains {self.name} is {rank} ({figures})."
        return [f"{first} It is the best in {wins} of {_count(len(scores.domains), 'domain')}.{hint}"]

    def against_specialists(self) -> list[str]:
        """The oracle: in each domain whichever of the mixture's seeds is best there."""
        scores, seeds = self.scores, self._candidates()
        if not seeds or seeds == [self.family.ancestor]:
            return []
        best = [min(seeds, key=lambda seed: scores.loss(seed, domain)) for domain in scores.domains]
        gap, probability = scores.ahead(self.mixture, best)
        oracle = float(np.mean([scores.loss(seed, domain) for seed, domain in zip(best, scores.domains, strict=True)]))
        parts = []
        for seed, domain in zip(best, scores.domains, strict=True):
            distance, sure = scores.ahead_in(self.mixture, seed, domain)
            unclear = "" if abs(distance) < TIE else _unclear(sure)
            parts.append(f"{domain} {_gap(distance)} {self.names[seed]}{unclear}")
        figures = self._figures(gap, probability, scores.loss(self.mixture), oracle)
        some = "" if all(self.family.seeds.values()) else f" (of those measured: {self._listed_seeds(seeds)})"
        return [
            f"Against the best of its seeds in each domain, the oracle{some}: {figures}. By domain: {'; '.join(parts)}."
        ]

    def against_ancestor(self, with_oracle: bool) -> list[str]:
        """The seed that all began with; and how much of the way from it to the oracle the mixture goes."""
        ancestor, scores = self.family.ancestor, self.scores
        if ancestor is None:
            return []
        sentences = self.against("the seed that its specialists were trained from", ancestor)
        if self.family.recorded_ancestor:
            sentences.append(
                f"That seed was named by --base; {self.name}'s own record names {self.family.recorded_ancestor}."
            )
        everywhere = [ancestor] * len(scores.domains)
        gap, probability = scores.ahead(self.mixture, everywhere)
        if gap < 0 and (probability is None or probability <= 1 - CLEAR):
            sentences.append(f"So far {self.name} is worse than what it began with: train it before you use it.")
        candidates = self._candidates()
        if with_oracle and gap >= 0 and candidates:
            best = [min(candidates, key=lambda seed: scores.loss(seed, domain)) for domain in scores.domains]
            way, probability = scores.ahead(ancestor, best)
            if probability is not None and probability <= 1 - CLEAR:
                sentences.append(f"That is {gap / -way:.0%} of the way from that seed to the oracle.")
        return sentences

    def _candidates(self) -> list[str]:
        """For the oracle: the seeds that were measured, and what they came from."""
        found = [model for model in self.family.seeds.values() if model]
        return list(dict.fromkeys([*found, *([self.family.ancestor] if found and self.family.ancestor else [])]))

    def _listed_seeds(self, seeds: Sequence[str]) -> str:
        return _listed([self.names[seed] for seed in dict.fromkeys(seeds)])

    def against(self, what: str, other: str | None) -> list[str]:
        """The mixture against one other model."""
        if other is None:
            return []
        scores = self.scores
        gap, probability = scores.ahead(self.mixture, [other] * len(scores.domains))
        better = sum(scores.loss(self.mixture, domain) < scores.loss(other, domain) - TIE for domain in scores.domains)
        figures = self._figures(gap, probability, scores.loss(self.mixture), scores.loss(other))
        domains = _count(len(scores.domains), "domain")
        return [f"Against {what} ({self.names[other]}): {figures}; better in {better} of {domains}."]

    def _figures(self, gap: float, probability: float | None, mine: float, other: float) -> str:
        if abs(gap) < TIE:
            return f"level, {mine:.3f} {self.scores.unit} both"
        side = "ahead" if gap > 0 else "behind"
        sure = "" if probability is None else f", {_sure(probability)}"
        return f"{abs(gap):.3f} {self.scores.unit} {side}, {mine:.3f} against {other:.3f}{sure}"


def _gap(gap: float) -> str:
    return "level with" if abs(gap) < TIE else f"{abs(gap):.3f} {'ahead of' if gap > 0 else 'behind'}"


def _sure(probability: float) -> str:
    """A probability that the first is better, as that of what is seen."""
    sure = max(probability, 1 - probability)
    if sure < CLEAR:
        return f"no clear difference, real with a probability of only {sure:.0%}"
    return "real with a probability " + ("above 99.9%" if sure > 0.999 else f"of {np.floor(sure * 1000) / 10:.1f}%")


def _unclear(probability: float | None) -> str:
    clear = probability is not None and max(probability, 1 - probability) >= CLEAR
    return "" if clear or probability is None else f" (no clear difference, {max(probability, 1 - probability):.0%})"


def _best_of(scores: Scores, names: Mapping[str, str]) -> list[str]:
    """Without a mixture: the best in the mean, and in each domain."""
    ranked = sorted(scores.models, key=scores.loss)
    if len(ranked) < 2:
        return ["One model was measured, so there is nothing to compare it with."]
    best, second = ranked[:2]
    gap, probability = scores.ahead(best, [second] * len(scores.domains))
    sure = "" if probability is None else f", {_sure(probability)}"
    figures = f"{gap:.3f} {scores.unit} ahead of {names[second]}{sure}"
    if gap < TIE:
        figures = f"level with {names[second]}"
    parts = []
    for domain in scores.domains:
        winner = min(scores.models, key=lambda model: scores.loss(model, domain))
        parts.append(f"{domain} {names[winner]}")
    return [f"Best in the mean is {names[best]} ({figures}). Best by domain: {', '.join(parts)}."]


def _routing_sentences(name: str, routing: Mapping[str, Any]) -> list[str]:
    experts, domains, layers = routing["experts"], routing["domains"], routing["layers"]
    sentences = []
    own = {domain: float(np.mean(found["own_share"])) for domain, found in domains.items() if found["own_share"]}
    if own:
        shares = ", ".join(f"{domain} {share:.0%}" for domain, share in own.items())
        chance = routing["top_k"] / len(experts)
        sentences.append(f"{name} routes a token to the expert of its text's domain: {shares} (chance: {chance:.0%}).")
    load = np.mean([found["load"] for found in domains.values()], axis=0)
    idle = [(experts[expert], layers[layer]) for layer, expert in np.argwhere(load < IDLE / len(experts))]
    if idle:
        listed = ", ".join(f"{expert} in layer {layer}" for expert, layer in idle[:3])
        more = f" and {len(idle) - 3} more" if len(idle) > 3 else ""
        sentences.append(f"Idle experts of {name}, with under a tenth of an equal share of the tokens: {listed}{more}.")
    groups = routing.get("groups", experts)
    for kind, what, names in (("ffn_outputs", "FFN", experts), ("attention_outputs", "Attention", groups)):
        cosines = np.array(routing["similarity"].get(kind, []))
        if cosines.size and len(names) > 1:
            above = np.argwhere(np.triu(cosines, 1) > ALIKE)
            for layer, one, other in above[:1]:
                more = f" (one pair of {len(above)})" if len(above) > 1 else ""
                sentences.append(
                    f"{what} experts of {name} answer almost alike: {names[one]} and {names[other]} in layer "
                    f"{layers[layer]}, cosine {cosines[layer, one, other]:.3f}{more}."
                )
    return sentences


def _limits(scores: Scores) -> list[str]:
    sentences = []
    pairs = zip(scores.domains, scores.documents, strict=True)
    few = [f"{domain} ({number:.0f})" for domain, number in pairs if number < FEW]
    if few:
        sentences.append(
            f"Few documents, counted as if of one length: {', '.join(few)}; take their intervals and probabilities as "
            "rough."
        )
    if scores.unit == "bits per byte":
        sentences.append(
            "The models have different tokenizers, so they are compared by bits per byte only; their losses and "
            "perplexities per token are not comparable."
        )
    return sentences


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
