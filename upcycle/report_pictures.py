"""Which pictures a report shows of trainings and routings, each with how to read it."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from upcycle.numeric import Array
from upcycle.pictures import Curve, Picture, heat_picture, line_picture, smooth
from upcycle.run_records import NAN, Routing, Source, as_number, clean, shorten


def slug(text: str) -> str:
    """A name for a file and an id, whatever the text."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40] or "x"


def comparison_picture(evaluation: Mapping[str, Any], labels: Mapping[str, str]) -> Iterator[Picture]:
    """How far each model is from the best of each domain, where there are several."""
    in_bytes = evaluation.get("measure") == "bits_per_byte"
    key, unit = ("bits_per_byte", "bits per byte") if in_bytes else ("loss", "nats per token")
    models = {labels[path]: model["domains"] for path, model in evaluation["models"].items()}
    domains = list(dict.fromkeys(name for parts in models.values() for name in parts))
    losses = np.array([[as_number((parts.get(name) or {}).get(key)) for name in domains] for parts in models.values()])
    if len(models) < 2 or not np.isfinite(losses).any():
        return
    losses = np.column_stack([losses, losses.mean(1)])
    columns = [*map(clean, domains), "mean"]
    known = np.isfinite(losses).any(0)
    best = np.where(known, np.where(np.isfinite(losses), losses, np.inf).min(0), np.nan)
    winners = [f"{name}: {list(models)[int(np.nanargmin(losses[:, i]))]}" for i, name in enumerate(columns) if known[i]]
    yield heat_picture(
        "losses",
        "Behind the best of each domain",
        {"": losses - best},
        columns=columns,
        rows=list(models),
        low=0.0,
        high=max(float(np.nanmax(losses - best)), 1e-3),
        bar_label=f"{unit} behind the best; 0: the best",
        mark=None,
        bright_is_low=True,
        digits=3,
        caption=f"How many {unit} of held-out loss each model is behind the best of a column: bright is near the best, "
        "0 is the best itself.",
        alt=f"Heat map of how far each model is behind the best of each domain. The best: {', '.join(winners)}.",
    )


def loss_picture(runs: Sequence[Source]) -> Iterator[Picture]:
    """The training loss of all runs in one picture, if any has one."""
    curves, told = [], []
    for run in runs:
        nll = run.metrics.columns["nll"]
        values = nll if np.isfinite(nll).any() else run.metrics.columns["loss"]
        if np.isfinite(values).any():
            curves.append(Curve(run.label, run.metrics.steps, smooth(values), values))
            told.append(f"{run.label}: {_ends(run.metrics.steps, values)}")
    if curves:
        yield line_picture(
            "loss",
            "Training loss",
            curves,
            x_label="step",
            y_label="nats per token",
            caption="Loss of each step's own text, without the routers' terms; lower is better. The faint line is "
            "every step, the strong one their running mean; gaps are steps whose loss was not finite.",
            alt=f"Line chart of the training loss over steps. {'; '.join(told)}.",
        )


def heldout_pictures(runs: Sequence[Source]) -> Iterator[Picture]:
    """The held-out loss over steps, one picture a domain, all runs in it."""
    domains = list(dict.fromkeys(name for run in runs for name in run.metrics.domains))
    stems = [slug(name) for name in domains]
    for number, (domain, stem) in enumerate(zip(domains, stems, strict=True), 1):
        curves, told = [], []
        for run in runs:
            losses = [values.get(domain, NAN) for values in run.metrics.evaluations.values()]
            if np.isfinite(losses).any():
                steps = list(run.metrics.evaluations)
                curves.append(Curve(run.label, steps, losses))
                told.append(f"{run.label}: {_ends(steps, losses)}")
        if not curves:
            continue
        yield line_picture(
            f"heldout-{stem}" if stems.count(stem) == 1 else f"heldout-{number}-{stem}",
            f"Held-out loss: {domain}",
            curves,
            x_label="step",
            y_label="nats per token",
            markers=True,
            caption=f"Loss on text of {shorten(domain)} that the training never sees, at each evaluation; lower is "
            "better. Where it rises while the training loss falls, the model learns by heart.",
            alt=f"Line chart of the held-out loss in {domain} over steps. {'; '.join(told)}.",
        )


def _ends(steps: Sequence[int], values: Sequence[float]) -> str:
    finite = [(step, value) for step, value in zip(steps, values, strict=True) if math.isfinite(value)]
    return f"{finite[0][1]:.3f} at step {finite[0][0]}, {finite[-1][1]:.3f} at step {finite[-1][0]}"


def speed_picture(runs: Sequence[Source]) -> Iterator[Picture]:
    """Tokens per second of all runs in one picture, if any recorded them."""
    rated = [(run, run.metrics.columns["tokens_per_second"]) for run in runs]
    rated = [(run, rates) for run, rates in rated if np.isfinite(rates).any()]
    if rated:
        told = "; ".join(f"{run.label}: median {np.nanmedian(rates):,.0f}" for run, rates in rated)
        yield line_picture(
            "speed",
            "Speed",
            [Curve(run.label, run.metrics.steps, smooth(rates), rates) for run, rates in rated],
            x_label="step",
            y_label="tokens per second",
            from_zero=True,
            caption="Tokens per second of every step (faint) and their running mean, evaluations and saving not "
            "counted. Dips are other work on the machine, or longer steps.",
            alt=f"Line chart of tokens per second over steps. {told}.",
        )


def routing_pictures(routing: Routing, stem: str) -> Iterator[Picture]:
    """Heat maps of loads and gates, own experts' shares and entropies; `stem` is added to each file's name."""
    if routing.load:
        yield _shares(
            f"load{stem}",
            "FFN load by layer and expert",
            routing,
            routing.load,
            _names(routing, next(iter(routing.load.values())).shape[1]),
            "share of the routed tokens",
            "Which FFN experts the router sends each domain's tokens to; a row adds up to 1. The line on the scale "
            "is what an even spread would give: columns that stay dark in every domain are idle experts.",
        )
    if routing.gates:
        yield _shares(
            f"gates{stem}",
            "Attention gates by layer and expert",
            routing,
            routing.gates,
            _attention_names(routing, next(iter(routing.gates.values())).shape[1]),
            "mean gate",
            "How much each attention expert counts by its router's softmax, of which a recipe may keep the largest "
            "alone; a row adds up to 1. The line on the scale is the even mixture.",
        )
    yield from _layer_pictures(routing, stem)


def _shares(
    name: str,
    title: str,
    routing: Routing,
    shares: Mapping[str, Array],
    names: Sequence[str],
    bar_label: str,
    caption: str,
) -> Picture:
    uniform = 1 / len(names)
    highest = max((float(np.nanmax(values)) for values in shares.values() if np.isfinite(values).any()), default=1.0)
    told = []
    for domain, values in shares.items():
        mean = np.nan_to_num(values).mean(0)
        best = int(mean.argmax())
        told.append(f"{domain}: most to {names[best]}, {mean[best]:.2f} over all layers")
    return heat_picture(
        name,
        title,
        shares,
        columns=names,
        rows=_layers(routing, len(next(iter(shares.values())))),
        row_label="layer",
        low=0.0,
        high=max(highest, 1.5 * uniform),
        bar_label=f"{bar_label}; uniform: {uniform:.3g}",
        mark=uniform,
        caption=caption,
        alt=f"{title}, one heat map a domain. {'; '.join(told)}.",
    )


def _names(routing: Routing, count: int) -> list[str]:
    """The experts' names where there is one for each, else numbers."""
    return list(routing.experts) if len(routing.experts) == count else [str(index) for index in range(count)]


def _attention_names(routing: Routing, count: int) -> list[str]:
    """The attention experts' names: those of FFNs before they were split, of which the last may have been added."""
    names = routing.groups or routing.experts
    return list(names[:count]) if len(names) >= count else [str(index) for index in range(count)]


def _layers(routing: Routing, count: int) -> list[str] | None:
    """The numbers of the layers with experts, where others have none."""
    known = len(routing.layers) == count and list(routing.layers) != list(range(count))
    return [str(layer) for layer in routing.layers] if known else None


def _numbers(routing: Routing, count: int) -> Sequence[int]:
    return routing.layers if len(routing.layers) == count else range(count)


def _layer_pictures(routing: Routing, stem: str) -> Iterator[Picture]:
    experts = max(1, routing.num_experts)
    chosen = routing.top_k / experts
    gates = next(iter(routing.gates.values()), None)
    attention = experts if gates is None else gates.shape[1]
    even, even_attention = ((math.log(n), f"even, {math.log(n):.2f}") for n in (experts, attention))
    reads = "High: tokens are spread over all experts. Low: the router is sure. The dashed line is an even spread."
    wanted = [
        ("own-expert", "Own expert's share", routing.own_share, "share of tokens", (chosen, f"uniform, {chosen:.2g}"),
         "How often the router picks the expert that came from the text's own domain, by layer. Above the dashed line, "
         "it does so more often than chance."),
        ("entropy", "Entropy of the FFN router", routing.entropy, "nats", even, reads),
        ("attention-entropy", "Entropy of the attention router", routing.attention_entropy, "nats", even_attention,
         reads),
    ]  # fmt: skip
    for name, title, values, unit, reference, caption in wanted:
        shown = {key: layers for key, layers in values.items() if np.isfinite(layers).any()}
        if shown:
            told = "; ".join(f"{key}: {np.nanmean(layers):.2f} on average" for key, layers in shown.items())
            yield line_picture(
                f"{name}{stem}",
                title,
                [Curve(key, _numbers(routing, len(layers)), layers.tolist()) for key, layers in shown.items()],
                x_label="layer",
                y_label=unit,
                reference=reference,
                markers=True,
                from_zero=True,
                caption=caption,
                alt=f"Line chart: {title.lower()} by layer. {told}.",
            )


def similarity_pictures(routing: Routing, stem: str) -> Iterator[Picture]:
    """Heat maps of the cosines between experts: their mean, and the layer where they are most alike."""
    for key, (title, caption) in _SIMILARITIES.items():
        layers = routing.similarity.get(key)
        if layers is None or layers.shape[1] != layers.shape[2] or layers.shape[1] < 2:
            continue
        names = (_attention_names if key.startswith("attention") else _names)(routing, layers.shape[1])
        others = np.where(np.eye(layers.shape[1], dtype=bool), np.nan, np.nan_to_num(layers))
        most = int(np.nanmean(others, axis=(1, 2)).argmax())
        layer = _numbers(routing, len(layers))[most]
        one, two = np.unravel_index(int(np.nanargmax(others[most])), others[most].shape)
        yield heat_picture(
            f"similarity-{key.replace('_', '-')}{stem}",
            f"{title}: experts compared",
            {"mean over layers": np.nan_to_num(layers).mean(0), f"layer {layer}, most alike": layers[most]},
            columns=names,
            rows=names,
            low=float(np.floor(np.nanmin(others) * 10) / 10),  # from 0 on, related experts would all look the same
            high=1.0,
            bar_label="cosine; 1: the same",
            mark=None,
            caption=caption,
            alt=f"{title}: heat maps of the cosines between experts. They are most alike in layer {layer}, there "
            f"{names[one]} and {names[two]} with {others[most][one, two]:.2f}.",
        )


_WEIGHTS = (
    "Cosine between every two experts' weights. Seeds of one ancestor share most of them, so it begins near 1; what "
    "the experts answer says more."
)
_OUTPUTS = (
    "Cosine between what every two experts answer to the same token, before any gate. Near 1 they do the same, and "
    "have collapsed into one another."
)
_SIMILARITIES = {
    "ffn_weights": ("FFN weights", _WEIGHTS),
    "ffn_outputs": ("FFN outputs", _OUTPUTS),
    "attention_weights": ("Attention weights", _WEIGHTS),
    "attention_outputs": ("Attention outputs", _OUTPUTS),
}
