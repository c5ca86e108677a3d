"""`upcycle train`: a mixture, or a dense model, trained on a mix of domains."""

import signal
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from . import output
from .fetch import fetched
from .merge import Json
from .push import License, PushTo, prepare_push, push_result

if TYPE_CHECKING:
    from upcycle.train import TrainingResult


ExpertsBackend = Annotated[
    Literal["auto", "fused", "grouped_mm", "eager", "liger", "sonicmoe"],
    typer.Option(help="What computes the FFN experts; auto: on CUDA the fastest of them, measured at the start."),
]


def train(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="Folder or Hub name of a mixture (BAM or transformers' own) or a dense model."
        ),
    ],
    data: Annotated[
        list[str],
        typer.Option(
            "--data",
            metavar="NAME=FILE ...",
            help="Training data by domain: .jsonl or .parquet ('text', or 'messages' for chats, whose loss counts the "
            "assistant's turns alone), .txt (one document), .npy (tokens), a pattern of such files in quotes, or a Hub "
            "dataset. Documents are packed without padding; attention may cross from one into the next.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to make: the checkpoint, its metrics, the state to resume from.")],
    steps: Annotated[int, typer.Option(min=1, max=10**8, help="Optimizer steps.")],
    mix: Annotated[
        list[str] | None,
        typer.Option("--mix", metavar="NAME=SHARE ...", help="Shares of the domains; equal by default."),
    ] = None,
    eval_data: Annotated[
        list[str] | None,
        typer.Option("--eval-data", metavar="NAME=FILE ...", help="Held-out data by domain, measured while training."),
    ] = None,
    sequence_length: Annotated[int | None, typer.Option(min=2, help="Tokens a sequence.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Sequences a step, over all processes.")] = None,
    micro_batch_size: Annotated[
        int | None, typer.Option(min=1, help="Sequences a forward; the rest of the batch is accumulated.")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(min=0, help="The peak; found by a law if not given.")] = None,
    schedule: Annotated[
        Literal["cosine", "wsd", "power"], typer.Option(help="How the learning rate falls after its warm-up.")
    ] = "cosine",
    warm_up: Annotated[int | None, typer.Option(min=0, help="Steps of warm-up; a tenth, at most 1500.")] = None,
    weight_decay: Annotated[float, typer.Option(min=0, help="Of matrices; norms and biases do not decay.")] = 0.1,
    max_grad_norm: Annotated[float, typer.Option(min=0, help="Gradients are clipped to this norm; 0: never.")] = 1.0,
    random_seed: Annotated[int, typer.Option(min=0, max=2**63, help="Of the order of the data.")] = 0,
    trained: Annotated[
        str,
        typer.Option("--train", metavar="WHAT", help="all, experts, routers or routers-then-all:STEPS."),
    ] = "all",
    lora: Annotated[int, typer.Option("--lora", min=0, help="Train LoRA factors of this rank instead; 0: no.")] = 0,
    optimizer: Annotated[
        Literal["adamw", "adamw-8bit", "adamw-offload"], typer.Option(help="The latter two save GPU memory (torchao).")
    ] = "adamw",
    precision: Annotated[
        Literal["bf16", "fp32"] | None, typer.Option(help="Of the products; bf16 on a GPU. Weights are kept in fp32.")
    ] = None,
    activation_checkpointing: Annotated[
        bool, typer.Option("--activation-checkpointing", help="Compute activations twice instead of keeping them.")
    ] = False,
    experts_backend: ExpertsBackend = "auto",
    liger: Annotated[
        bool,
        typer.Option("--liger", help="Norms, rotary positions and the loss by Liger's kernels (the extra `cuda`)."),
    ] = False,
    side_by_side: Annotated[
        bool, typer.Option("--side-by-side", help="Attention and FFN of a parallel block at the same time (CUDA).")
    ] = False,
    compile_layers: Annotated[
        bool, typer.Option("--compile", help="Compile each layer (torch.compile); the first step takes longer.")
    ] = False,
    shard: Annotated[
        bool, typer.Option("--shard", help="Spread one model over all processes (FSDP2) instead of copying it.")
    ] = False,
    eval_every: Annotated[int | None, typer.Option(min=1, help="Steps; a fifth of them all.")] = None,
    eval_windows: Annotated[int, typer.Option(min=1, help="Held-out sequences of a domain.")] = 100,
    save_every: Annotated[int | None, typer.Option(min=1, help="Steps; a quarter of them all.")] = None,
    log_with: Annotated[
        str | None, typer.Option(help="A tracker that accelerate knows: tensorboard, wandb, ...")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Overwrite a former training.")] = False,
    push_to: PushTo = None,
    license: License = None,
    as_json: Json = False,
) -> None:
    """Train a checkpoint on a mix of domains; the result loads like the one that went in.

    Ctrl-C or SIGTERM ends the training after the step at hand, saved; --resume goes on from there, bit for bit.

    Example: upcycle train bam-3x --data code=code.jsonl law=law.jsonl --eval-data code=held.jsonl --out out --steps 100
    """
    if license and not push_to:
        raise typer.BadParameter("--license is for --push-to")
    folder = fetched(model)
    if push_to and output.is_first_process():
        from upcycle.push_plan import read_provenance

        prepare_push(push_to, read_provenance(folder), license, trained=True)
    from upcycle.data import parse_shares, split_names
    from upcycle.train import train as run
    from upcycle.training_settings import TrainingOptions

    sources = split_names("--data", data)
    options = TrainingOptions(
        model=folder,
        data=sources,
        out=out,
        steps=steps,
        shares=parse_shares(mix or [], sources),
        heldout=split_names("--eval-data", eval_data or []),
        sequence_length=sequence_length,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        learning_rate=learning_rate,
        schedule=schedule,
        warm_up=warm_up,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        random_seed=random_seed,
        trained=trained,
        lora=lora,
        optimizer=optimizer,
        precision=precision,
        activation_checkpointing=activation_checkpointing,
        experts_backend=experts_backend,
        liger=liger,
        side_by_side=side_by_side,
        compile=compile_layers,
        shard=shard,
        eval_every=eval_every,
        eval_windows=eval_windows,
        save_every=save_every,
        log_with=log_with,
        resume=resume,
        overwrite=yes,
    )
    from .live import training_view

    with _Stop() as stop, training_view() as watch:

        def see(event: Mapping[str, Any]) -> None:
            if event["event"] == "start":
                stop.listen()
            watch(event)

        if not output.is_first_process():
            stop.listen()  # events come to the first process alone
        result = run(options, see, lambda: bool(stop.came))
    if output.is_first_process():
        if push_to and result.finished:
            _show_and_push(result, push_to, license, as_json)
        else:
            _show(result, as_json)
    if not result.finished and signal.SIGTERM not in stop.came:
        raise output.Stopped


class _Stop:
    """SIGINT and SIGTERM end a training after the step at hand; before its first step, and the second time, at once."""

    def __init__(self) -> None:
        self.came: list[int] = []
        self._former: dict[signal.Signals, Any] = {}

    def listen(self) -> None:
        """From now on there is something to save."""
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            if handler != signal.SIG_IGN:
                self._former[number] = handler
                signal.signal(number, self._note)

    def _note(self, number: int, _: object) -> None:
        if number in self.came and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.came.append(number)

    def __enter__(self) -> "_Stop":
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)


def _show_and_push(result: "TrainingResult", repository: str, license: str | None, as_json: bool) -> None:
    if not as_json:
        _show(result, as_json=False)
        output.data_line(push_result(result.out, repository, license).url)
        return
    url = None
    try:
        url = push_result(result.out, repository, license).url
    finally:
        _show(result, as_json=True, more={"url": url})


def _show(result: "TrainingResult", as_json: bool, more: Mapping[str, Any] | None = None) -> None:
    if as_json:
        output.data_object(
            {
                "out": str(result.out),
                "finished": result.finished,
                "steps": result.steps,
                "tokens": result.tokens,
                "seconds": round(result.seconds, 3),
                "tokens_per_second": round(result.tokens_per_second, 1),
                "heldout": dict(result.heldout),
                "first_heldout": dict(result.first_heldout),
                "warnings": list(result.warnings),
                **(more or {}),
            }
        )
        return
    if result.heldout:
        rows = _rows(result.first_heldout, result.heldout)
        output.table("Held-out loss, nats per token", ["domain", "before", "after", "change"], rows)
    speed = f"{result.seconds:.0f} s, {result.tokens_per_second:,.0f} tokens/s"
    output.data_line(f"{result.steps} steps, {result.tokens:,} tokens, {speed}\n{result.out}")
    if not result.finished:
        output.data_line("stopped and saved; the same command with --resume goes on")


def _rows(before: Mapping[str, float], after: Mapping[str, float]) -> list[list[str]]:
    rows: list[list[Any]] = [[name, before[name], loss] for name, loss in after.items()]
    if len(rows) > 1:
        rows.append(["mean", sum(before.values()) / len(before), sum(after.values()) / len(after)])
    return [[name, f"{old:.3f}", f"{new:.3f}", f"{new - old:+.3f}"] for name, old, new in rows]
