"""What a training was asked for, and what that means for a model, its data and this machine."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from upcycle.checkpoint import CONFIG, PROVENANCE, read_json
from upcycle.dense_config import read_dense
from upcycle.documents import find_files
from upcycle.errors import CheckpointError, SeedError, TrainingError
from upcycle.layout import Layout, make_layout
from upcycle.mixture import Mixture, is_mixture, read_mixture, router_records
from upcycle.optimization import parse_trained
from upcycle.recipe import Recipe
from upcycle.scaling import DENSE, layout_cost
from upcycle.schedules import Choice, default_batch_size, default_learning_rate, default_warm_up

_POSITIONS: Final = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "max_seq_len")
MAX_EXPERTS: Final = 2**16
MAX_SEQUENCE: Final = 2048  # the default, where the model could take longer ones


@dataclass(frozen=True)
class TrainingOptions:
    """What the user asked for; None where the default is to be found (`upcycle train --help` describes each)."""

    model: Path
    data: Mapping[str, str]
    out: Path
    steps: int
    shares: Mapping[str, float]
    heldout: Mapping[str, str] = field(default_factory=dict)
    sequence_length: int | None = None
    batch_size: int | None = None
    micro_batch_size: int | None = None
    learning_rate: float | None = None
    schedule: str = "cosine"
    warm_up: int | None = None
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    random_seed: int = 0
    trained: str = "all"
    lora: int = 0
    optimizer: str = "adamw"
    precision: str | None = None
    activation_checkpointing: bool = False
    experts_backend: str = "auto"
    liger: bool = False
    side_by_side: bool = False
    compile: bool = False
    shard: bool = False
    eval_every: int | None = None
    eval_windows: int = 100
    save_every: int | None = None
    log_with: str | None = None
    resume: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class Settings:
    """Everything that decides what a training computes; a resumed one must have the same."""

    steps: int
    sequence_length: int
    batch_size: int
    micro_batch_size: int
    processes: int
    learning_rate: float
    schedule: str
    warm_up: int
    weight_decay: float
    max_grad_norm: float
    random_seed: int
    trained: str
    lora: int
    optimizer: str
    precision: str
    activation_checkpointing: bool
    liger: bool
    side_by_side: bool
    compile: bool
    shard: bool
    shares: Mapping[str, float]
    eval_every: int
    eval_windows: int
    save_every: int

    @property
    def batch_tokens(self) -> int:
        """Tokens a step."""
        return self.batch_size * self.sequence_length

    @property
    def accumulation(self) -> int:
        """Forwards of each process a step."""
        return self.batch_size // (self.processes * self.micro_batch_size)

    def plain(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


@dataclass(frozen=True)
class ModelFacts:
    """What a training needs to know of the model before it is loaded.

    Attributes:
        kind: "bam", "native" (one of transformers' own mixtures) or "dense".
        top_k: experts a token uses, None for a dense model.
        load_balance, z: alpha and beta of the routers' losses.
        attention_experts: whether the attention is a mixture, too.
        experts: their names, or numbers.
        groups: the names of the FFNs that were made experts: those of the experts, unless each was split into several.
        layout: of the tensors, where upcycle knows the family or merged the mixture.
        recipe: the mixture's, where upcycle merged it.
        seed_parameters: of one dense model, without embeddings and head; 0 where the family is not known.
        routed: whether its routers were set from text.
    """

    kind: str
    config: Mapping[str, Any]
    top_k: int | None = None
    load_balance: float = 0.0
    z: float = 0.0
    attention_experts: bool = False
    experts: Sequence[str] = ()
    groups: Sequence[str] = ()
    layout: Layout | None = None
    recipe: Recipe = DENSE
    seed_parameters: int = 0
    routed: bool = False

    @property
    def dense(self) -> Mapping[str, Any]:
        """The config that holds the model's sizes: a BAM mixture's seed's, else its own."""
        return self.config.get("dense_config") or self.config

    @property
    def positions(self) -> int | None:
        """The longest sequence, where the config names one."""
        found = next((self.dense[key] for key in _POSITIONS if key in self.dense), None)
        return found if isinstance(found, int) and found > 0 else None

    @property
    def num_experts(self) -> int:
        """1 for a dense model."""
        return max(1, len(self.experts))

    @property
    def layers(self) -> Sequence[int]:
        """The layers with experts; none where they are not known."""
        return self.layout.mixed if self.layout else ()

    def training_flops(self, context: int) -> int | None:
        """FLOPs a token of a training at a context, or None where the family is not known."""
        if self.layout is None:
            return None
        return layout_cost(self.layout, self.recipe, 0, context).training_flops_per_token


def read_facts(folder: Path) -> ModelFacts:
    """What a checkpoint's config says about training it.

    Raises:
        CheckpointError, SeedError: no checkpoint, or a damaged one.
    """
    try:
        facts = _read_facts(folder, read_json(folder / CONFIG))
        vocab_size = facts.dense["vocab_size"]
        sound = isinstance(vocab_size, int) and math.isfinite(facts.load_balance) and math.isfinite(facts.z)
        sound = sound and (facts.top_k is None or 1 <= facts.top_k <= facts.num_experts)
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / CONFIG} or {PROVENANCE} holds a value of a wrong kind: {error!r}") from error
    if not sound:
        raise CheckpointError(
            f"{folder / CONFIG}: vocab_size {vocab_size!r}, {facts.top_k} of {facts.num_experts} experts a token, "
            f"loss weights {facts.load_balance} and {facts.z}: they are no sound values"
        )
    return facts


def _read_facts(folder: Path, config: Mapping[str, Any]) -> ModelFacts:
    if is_mixture(folder, config):
        return _merged_facts(read_mixture(folder), config)
    if config.get("num_experts_per_tok"):
        experts = next((config[key] for key in ("num_local_experts", "num_experts") if config.get(key)), 0)
        if not 0 < experts <= MAX_EXPERTS:
            raise TrainingError(
                f"{folder / CONFIG}: num_experts_per_tok is {config['num_experts_per_tok']}, but neither "
                f"num_local_experts nor num_experts says of how many (1 to {MAX_EXPERTS}); such a mixture cannot be "
                "trained here"
            )
        recorded = read_json(folder / PROVENANCE) if (folder / PROVENANCE).is_file() else {}
        loss = recorded.get("recipe", {}).get("loss", {})
        names = _expert_names(recorded, int(experts))
        return ModelFacts(
            kind="native",
            config=config,
            top_k=int(config["num_experts_per_tok"]),
            load_balance=float(loss.get("load_balance", config.get("router_aux_loss_coef", 0.01))),
            z=float(loss.get("z", 0.0)),
            experts=names,
            groups=names,
            routed=bool(router_records(recorded)),
        )
    try:
        layout = make_layout(read_dense(config, str(folder)), DENSE, 1)
    except SeedError:  # a family that cannot be mixed can still be trained
        return ModelFacts(kind="dense", config=config)
    return ModelFacts(kind="dense", config=config, layout=layout, seed_parameters=_inner_parameters(layout))


def _merged_facts(mixture: Mixture, config: Mapping[str, Any]) -> ModelFacts:
    """Of a mixture that upcycle merged, in either format."""
    native = mixture.layout.native is not None
    return ModelFacts(
        kind="native" if native else "bam",
        config=config,
        top_k=config["num_experts_per_tok"],
        load_balance=float(config.get("router_aux_loss_coef", 0.01)),
        # A native config has no word for it, so that upcycle.json keeps the recipe's.
        z=mixture.recipe.loss.z if native else float(config.get("router_z_loss_coef", 0.001)),
        attention_experts=mixture.recipe.attention_experts,
        experts=list(mixture.experts),
        groups=mixture.groups,
        layout=mixture.layout,
        recipe=mixture.recipe,
        seed_parameters=_inner_parameters(mixture.layout),
        routed=bool(router_records(mixture.provenance)),
    )


def _expert_names(recorded: Mapping[str, Any], count: int) -> list[str]:
    """As upcycle.json has them, else their numbers."""
    names = recorded.get("experts")
    if isinstance(names, list) and len(names) == count and all(type(name) is str for name in names):
        return names
    return [str(number) for number in range(count)]


def _inner_parameters(layout: Layout) -> int:
    dense = make_layout(layout.model, DENSE, 1)
    return sum(tensor.size for tensor in dense.mixture if ".layers." in tensor.name)


def local_files(options: TrainingOptions) -> list[Path]:
    """The files that a training reads its data from."""
    named = (("--data", options.data), ("--eval-data", options.heldout))
    return [
        file
        for option, sources in named
        for name, source in sources.items()
        for file in find_files(option, name, source)
    ]


def resolve(
    options: TrainingOptions, facts: ModelFacts, processes: int, cuda: bool
) -> tuple[Settings, Mapping[str, str]]:
    """Settings with every default filled in, and the reasons of those that need one.

    Raises:
        TrainingError: values that do not fit one another.
    """
    reasons: dict[str, str] = {}
    length = options.sequence_length or min(facts.positions or MAX_SEQUENCE, MAX_SEQUENCE)
    if facts.positions and length > facts.positions:
        raise TrainingError(f"--sequence-length {length}: the model has positions for {facts.positions} tokens")

    def chosen(name: str, choice: Choice) -> float:
        reasons[name] = choice.reason
        return choice.value

    batch = options.batch_size or int(
        chosen("batch_size", default_batch_size(options.steps, length, len(options.data), processes))
    )
    if batch % processes:
        raise TrainingError(f"--batch-size {batch} sequences do not divide among {processes} processes")
    micro = options.micro_batch_size or batch // processes
    if (batch // processes) % micro:
        raise TrainingError(
            f"--micro-batch-size {micro}: the {batch // processes} sequences of a process are no multiple of it"
        )
    rate = options.learning_rate
    if rate is None:
        tokens = options.steps * batch * length
        rate = chosen("learning_rate", default_learning_rate(facts.seed_parameters or 10**9, tokens, facts.routed))
    warm_up = options.warm_up
    if warm_up is None:
        warm_up = int(chosen("warm_up", default_warm_up(options.steps, facts.routed)))
    _check_options(options, facts, processes, rate)
    _check_acceleration(options, facts, cuda)
    settings = Settings(
        steps=options.steps,
        sequence_length=length,
        batch_size=batch,
        micro_batch_size=micro,
        processes=processes,
        learning_rate=rate,
        schedule=options.schedule,
        warm_up=warm_up,
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        random_seed=options.random_seed,
        trained=options.trained,
        lora=options.lora,
        optimizer=options.optimizer,
        precision=options.precision or ("bf16" if cuda else "fp32"),
        activation_checkpointing=options.activation_checkpointing,
        liger=options.liger,
        side_by_side=options.side_by_side,
        compile=options.compile,
        shard=options.shard,
        shares=options.shares,
        eval_every=options.eval_every or max(1, options.steps // 5),
        eval_windows=options.eval_windows,
        save_every=options.save_every or max(1, options.steps // 4),
    )
    return settings, reasons


def _check_options(options: TrainingOptions, facts: ModelFacts, processes: int, rate: float) -> None:
    """Refuse options that do not go together, or not with the model."""
    if not 0 < rate < float("inf"):
        raise TrainingError(f"--learning-rate {rate}: expected a number above 0")
    kind, router_steps = parse_trained(options.trained)
    for option, steps in (("--warm-up", options.warm_up or 0), ("--train routers-then-all", router_steps)):
        if steps > options.steps:
            raise TrainingError(f"{option}: {steps} steps, but the training has {options.steps}")
    if kind != "all" and facts.kind == "dense":
        raise TrainingError(f"--train {options.trained}: the model is dense, it has neither experts nor routers")
    if options.lora and options.trained != "all":
        raise TrainingError("--lora chooses what is trained itself (its factors and the routers); leave --train out")
    if options.shard and (options.lora or ":" in options.trained or options.optimizer == "adamw-offload"):
        raise TrainingError("--shard does not go with --lora, routers-then-all or adamw-offload")
    if options.shard and processes < 2:
        raise TrainingError("--shard spreads one model over several processes; start them with `accelerate launch`")


def _check_acceleration(options: TrainingOptions, facts: ModelFacts, cuda: bool) -> None:
    """Refuse what would make steps faster where it cannot."""
    backend = options.experts_backend
    wanted = {
        f"--experts-backend {backend}": backend in ("fused", "liger", "sonicmoe"),
        "--liger": options.liger,
        "--side-by-side": options.side_by_side,
    }
    for option, given in wanted.items():
        if given and not cuda:
            raise TrainingError(f"{option} needs a CUDA device, and there is none; leave it out")
    if options.shard and (options.compile or options.liger or options.side_by_side):
        raise TrainingError("--shard does not go with --compile, --liger or --side-by-side")
    if options.compile and options.lora:
        raise TrainingError("--compile does not go with --lora: its factors are put in anew at every forward")
    if options.side_by_side and options.activation_checkpointing:
        raise TrainingError("--side-by-side does not go with --activation-checkpointing, whose layers run in parts")
    if options.compile and options.side_by_side:
        raise TrainingError("--compile does not go with --side-by-side: a compiled layer has no streams of its own")
    if options.compile and options.activation_checkpointing:
        raise TrainingError("--compile does not go with --activation-checkpointing: its layers would not stay whole")
    if options.side_by_side and facts.kind != "bam":
        raise TrainingError(f"--side-by-side is for mixtures in the bam format, and this model is {facts.kind}")
