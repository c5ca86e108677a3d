"""What a model card says of a checkpoint: what it is, of what, at which cost, how to use it, what is not known."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from upcycle.card_metadata import commit_of, repository_of
from upcycle.checkpoint import MODELING_FILES
from upcycle.layout import GROUPED_BYTES
from upcycle.licenses import Licensing, adapter_of, licensing, seed_records
from upcycle.markdown import code, grid, link, listed, plain, table
from upcycle.mixture import router_records
from upcycle.recipe_facts import expert_facts, mix_facts
from upcycle.report_tables import MISSING, class_of, cost_table, describe, percent
from upcycle.run_folder import STATE
from upcycle.run_records import Source
from upcycle.seeds import VOCABULARIES

HUB: Final = "https://huggingface.co"
ELSEWHERE: Final = "path/to/this/model"
_PATH: Final = re.compile(r"[\w.+][\w.+-]*(/[\w.+][\w.+-]*)?")


@dataclass(frozen=True)
class Subject:
    """The checkpoint that a card is about.

    Attributes:
        name: what it is called: `org/name`, or its folder's name.
        stated: the licence that the metadata state.
        given: whether a person gave that.
        evaluated: whether the card holds an evaluation.
    """

    source: Source
    name: str
    stated: str | None
    given: bool
    evaluated: bool

    @property
    def seeds(self) -> list[Mapping[str, Any]]:
        """What upcycle.json says of each seed."""
        return seed_records(self.source.provenance)

    @property
    def is_bam(self) -> bool:
        """Whether it is a mixture in upcycle's own format."""
        return self.source.config.get("model_type") == "bam"

    @property
    def native_class(self) -> str:
        """The class of transformers' own that it is; empty of all that upcycle did not merge as one."""
        inspection = self.source.inspection
        return class_of(self.source) if inspection and inspection.format == "native" else ""

    @property
    def untrained(self) -> bool:
        """Whether its routers are as the merge, or text, made them."""
        merged = self.source.provenance.get("format") in ("bam", "native")
        return merged and not self.in_training and not self.routed.get("after_training")

    @property
    def in_training(self) -> bool:
        """Whether a training wrote it; a training's own checkpoints have its record above them."""
        return self.source.training is not None or (self.source.folder / STATE).is_dir()

    @property
    def routed(self) -> Mapping[str, Any]:
        """What upcycle.json says of routers that were set from text, by kind; empty where they were not."""
        return router_records(self.source.provenance)

    @property
    def place(self) -> str:
        """How code and commands call it: never text that could end them."""
        return self.name if _PATH.fullmatch(self.name) else ELSEWHERE


def what_it_is(subject: Subject) -> str:
    """One paragraph, and that it is not trained where it is not."""
    source, seeds = subject.source, subject.seeds
    inspection, recipe = source.inspection, source.provenance.get("recipe")
    made = recipe if isinstance(recipe, dict) else {}
    extracted = source.provenance.get("extracted")
    names = [plain(seed.get("name")) for seed in seeds]
    kind = f"A mixture of {len(source.experts)} experts" if source.experts else "One dense model"
    if len(source.groups) < len(source.experts):
        kind += f", {len(source.experts) // len(source.groups)} of each of {len(source.groups)} FFNs"
    by = f", by the recipe {code(made['name'])}" if made.get("name") else ""
    if isinstance(extracted, dict):
        whole = f" of {listed(names)}" if names else ""
        sentences = [f"{kind}: the expert {plain(extracted.get('name'))} of a mixture{whole}, taken out by upcycle."]
    elif len(seeds) > 1:
        sentences = [f"{kind}, merged by upcycle from the dense models {listed(names)}{by}."]
    elif seeds:
        sentences = [f"{kind}, made by upcycle from one dense model, {names[0]}{by}."]
    else:
        sentences = [f"{kind}."]
    if made.get("summary"):
        sentences.append(f"{plain(made['summary'])}.")
    sentences += [f"{plain(name)}: {plain(parts)}." for name, parts in _parts(subject, made)]
    sentences += [f"{name}: {plain(value)}." for name, value in expert_facts(made)]
    if subject.is_bam or subject.native_class:
        sentences.append(_routing(source))
    if inspection:
        sentences.append(f"The family is {plain(inspection.family)}, the weights are in {plain(inspection.dtype)}.")
    if subject.is_bam:
        sentences.append(f"The files are in upcycle's BAM format, version {plain(source.config['format_version'])}.")
    if subject.native_class:
        sentences.append(f"It is a {code(subject.native_class)} of transformers' own, which needs no code but that.")
    if source.training is not None:
        sentences.append("It was trained after that, as said below." if seeds else "Its training is described below.")
    paragraphs = [" ".join(sentences)]
    if subject.untrained and subject.routed:
        paragraphs.append(
            "> **It is not trained yet.** Its routers are set from text: from a few thousand tokens for each "
            f"expert they learned which expert's text a token comes from{_accuracy(subject.routed)}. Training makes it "
            "better."
        )
    elif subject.routed.get("after_training") and not subject.in_training:
        paragraphs.append(
            "> **Its routers were set anew, from text, after it was trained**, and it was not trained since"
            f"{_accuracy(subject.routed)}."
        )
    elif subject.untrained:
        paragraphs.append(
            "> **Its routers are untrained.** It is as the merge made it, and its routers know nothing of its experts "
            "yet. It needs training on a mix of their domains before it is any good."
        )
    return "\n\n".join(paragraphs)


def _accuracy(routed: Mapping[str, Any]) -> str:
    """How well, over all layers, where it is known."""
    found = []
    for kind, name in (("attention", "attention"), ("ffn", "FFN")):
        record = routed.get(kind)
        values = record.get("accuracy") if isinstance(record, dict) else None
        if isinstance(values, list) and values and all(isinstance(value, (int, float)) for value in values):
            found.append(f"{percent(sum(values) / len(values))} of the time in the {name}")
    return f" (right {listed(found)} on text held back from them)" if found else ""


def _parts(subject: Subject, recipe: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The model's parts by the way in which they are mixed."""
    mix = recipe.get("mix")
    facts = mix_facts(mix) if isinstance(mix, dict) else []
    if len(subject.seeds) == 1:
        return [({"Experts": "Copied to every expert", "Averaged": "As in the seed"}.get(n, n), v) for n, v in facts]
    return [("Kept as experts" if name == "Experts" else name, parts) for name, parts in facts]


def _routing(source: Source) -> str:
    """Which experts a token uses: of the layers that have some."""
    config, count = source.config, len(source.experts)
    # Classes without that key always rescale.
    rescaled = "rescaled to sum to one" if config.get("norm_topk_prob", True) else "as they are"
    if config.get("ffn_scale"):
        rescaled = "times one number a layer, such that they sum to one on average"
    shown = source.layers
    total = config.get("num_hidden_layers")
    where = "" if len(shown) == total else f" in {len(shown)} of {total} layers ({', '.join(map(str, shown[:12]))}"
    where += (", …)" if len(shown) > 12 else ")") if where else ""
    text = f"A token uses {config['num_experts_per_tok']} of {count} FFN experts{where}, gates {rescaled}"
    if not config.get("attention_experts"):
        return f"{text}; there is one attention."
    shared = ", which share keys and values" if config["shared_key_value"] else ""
    attentions = config.get("num_attention_experts") or count
    used = config.get("num_attention_experts_per_tok")
    chosen = f"{used} of {attentions}" if used else f"all {attentions}"
    return f"{text}, and {chosen} attention experts{shared}, each by its gate."


def _adapter_license(adapter: Mapping[str, Any] | None) -> str:
    return "" if adapter is None else f", adapter {code(adapter.get('license') or 'not stated')}"


def _origin(record: Mapping[str, Any], key: str = "") -> str:
    """A link to the commit that a seed or an adapter was, else what stands under a key of its record."""
    repository, commit = repository_of(record), commit_of(record)
    at = f"/tree/{commit}" if commit else ""
    return link(repository, f"{HUB}/{repository}{at}") if repository else plain(record.get(key) or MISSING)


def seed_table(subject: Subject) -> str:
    """Where the experts come from; empty where upcycle.json does not say it."""
    ancestor, rows = subject.source.provenance.get("ancestor"), []
    for seed in subject.seeds:
        commit, adapter = commit_of(seed), adapter_of(seed)
        origin = _origin(seed) if adapter is None else f"{_origin(seed)} with the adapter {_origin(adapter, 'name')}"
        name = plain(seed.get("name"))
        known = len(subject.seeds) > 1 and seed.get("name") == ancestor
        rows.append(
            [
                f"{name}, the ancestor of the others" if known else name,
                origin,
                code(commit[:12] if commit else seed.get("revision") or MISSING),
                code(seed.get("license") or "not stated") + _adapter_license(adapter),
                code(str(seed.get("fingerprint") or MISSING)[:12]),
            ]
        )
    if not rows:
        return ""
    copied = len(subject.source.groups) if len(rows) == 1 and subject.source.experts else 0
    split = "FFNs that were split" if len(subject.source.groups) < len(subject.source.experts) else "experts"
    note = f"\n\nCopied to each of the {copied} {split}." if copied else ""
    columns = ["name", "Hub repository", "revision", "licence", "fingerprint"]
    return grid(columns, rows, len(columns)) + note


def cost(subject: Subject) -> str:
    """Sizes, FLOPs and cache; empty where nothing is known."""
    content = cost_table(subject.source)
    return table(replace(content, title="")) if content.rows else ""


def recipe_table(subject: Subject) -> str:
    """The recipe as it acted, and what made the files."""
    provenance = subject.source.provenance
    model, extracted, recipe = describe(subject.source), provenance.get("extracted"), provenance.get("recipe")
    rows = [[plain(name), plain(value)] for name, value in model.facts]
    weights = recipe.get("weights") if isinstance(recipe, dict) else None
    if isinstance(weights, dict):
        rows.append(["Shares", plain(", ".join(f"{name} {share}" for name, share in weights.items()))])
    if model.paper:
        rows.append(["Paper", link(model.paper, model.paper_url) if model.paper_url else plain(model.paper)])
    made = {
        "upcycle": provenance.get("upcycle_version"),
        "Plan": provenance.get("plan"),
        "Plan of the mixture": extracted.get("plan") if isinstance(extracted, dict) else None,
        "Random seed": provenance.get("random_seed"),
    }
    rows += [[name, code(value)] for name, value in made.items() if value is not None]
    return grid(["", ""], rows, 2)


def pictures(paths: Sequence[str]) -> str:
    """Pictures beside the card."""
    return "\n\n".join(f"![{plain(Path(path).stem.replace('-', ' '))}]({quote(path)})" for path in paths)


def how_to_load(subject: Subject) -> str:
    """The lines that load it."""
    options = ", trust_remote_code=True" if "auto_map" in subject.source.config else ""
    inspection = subject.source.inspection
    eager = "" if inspection is None or inspection.grouped else ', experts_implementation="eager"'
    tokenized = any((subject.source.folder / file).is_file() for file in VOCABULARIES)
    lines = [
        f"from transformers import AutoModelForCausalLM{', AutoTokenizer' if tokenized else ''}",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{subject.place}", dtype="auto"{eager}{options})',
    ]
    if tokenized:
        lines.append(f'tokenizer = AutoTokenizer.from_pretrained("{subject.place}"{options})')
    block = "\n".join(["```python", *lines, "```"])
    if eager:
        block += (
            "\n\nIts experts are computed one by one: the default, torch's grouped product, takes rows of whole "
            f"multiples of {GROUPED_BYTES} bytes alone."
        )
    if subject.is_bam:
        return (
            f"{block}\n\nThe option runs the code in {listed([code(file) for file in MODELING_FILES])}, so look at it "
            "first. With upcycle installed, `import upcycle; upcycle.register()` does without the option."
        )
    return block


def how_to_tune(subject: Subject) -> str:
    """The line that trains it further."""
    local = subject.place.rsplit("/", 1)[-1]
    names = [str(seed.get("name")) for seed in subject.seeds]
    fitting = 0 < len(names) <= 8 and all(re.fullmatch(r"\w[\w.+-]*", name) for name in names)
    data = " ".join(f"{name}={name}.jsonl" for name in names) if fitting else "NAME=FILE.jsonl"
    line = f"upcycle train {subject.place} --data {data} --out {local}-tuned --steps STEPS"
    told = "`STEPS` is the number of optimizer steps, each file the text of one domain."
    return f"```\n{line}\n```\n\n{told}"


def licences(subject: Subject) -> str:
    """The licence, and what of the seeds' stands against it."""
    found: Licensing = licensing(subject.source.provenance)
    stated = code(subject.stated) if subject.stated else ""
    if not subject.stated:
        text = "No licence is stated for this model."
    elif subject.given:
        text = f"Its publisher states {stated} for this model."
    elif subject.stated == found.license:
        text = f"All its seeds are under {stated}, and so is this model."
    else:
        text = f"The metadata of this card state {stated}."
    problems = [f"- {plain(problem)}" for problem in found.problems]
    paragraphs = [text]
    if problems:
        paragraphs += ["By itself, none follows from its seeds:", "\n".join(problems)]
    present = [code(file) for file in MODELING_FILES if (subject.source.folder / file).is_file()]
    if subject.is_bam and present:
        paragraphs.append(f"The code in {listed(present)} is part of upcycle, under `apache-2.0`.")
    return "\n\n".join(paragraphs)


def limits(subject: Subject) -> str:
    """What it needs, and what nobody measured."""
    config = subject.source.config
    lines = []
    if subject.is_bam:
        lines.append(
            "It needs transformers with this repository's code. Whether other engines (vLLM, llama.cpp with GGUF, …) "
            "take it has not been measured."
        )
    elif subject.native_class:
        lines.append(
            f"It needs nothing but transformers. Other engines (vLLM, llama.cpp with GGUF, …) that know "
            f"{code(subject.native_class)} read the same files; whether they do has not been measured."
        )
    positions = config.get("max_position_embeddings")
    if isinstance(positions, int):
        lines.append(f"It has positions for {positions:,} tokens; longer texts have not been measured.")
    if subject.evaluated:
        lines.append(
            "What is not in the tables above has not been measured: neither other domains nor safety nor bias."
        )
    else:
        lines.append("How good it is has not been measured, nor have safety and bias.")
    return "\n".join(f"- {line}" for line in lines)
