"""The training of a mixture, or of a dense model: an own loop on `accelerate`, from one CPU to many GPUs.

Order of a step: draw the batch (every process draws the whole one and takes its share), forward and backward in
micro-batches, gather what was measured, ask the watchdog, update, log; evaluate and save when it is time.
"""

import contextlib
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh

from upcycle.acceleration import speed_up
from upcycle.card import is_handwritten, read_card, write_card
from upcycle.checkpoint import PROVENANCE
from upcycle.data import Domain
from upcycle.errors import OutputError, TrainingError
from upcycle.evaluate import measure
from upcycle.fit import check_memory, check_space, fit_micro_batch, free_memory
from upcycle.losses import RouterLosses, forward_losses
from upcycle.metrics import finite, router_metrics, tracked
from upcycle.optimization import add_lora, choose_trained, forget_others, make_optimizer, parse_trained
from upcycle.processes import make_accelerator, mean_over_forwards, one_by_one
from upcycle.run_folder import PROGRESS, RunFolder, copy_companions
from upcycle.schedules import schedule
from upcycle.sharding import load_sharded
from upcycle.speed import matmul_rate
from upcycle.staging import partial_folder, staging
from upcycle.stream import MAX_EPOCHS, Batch, TokenStream
from upcycle.training_data import check_same, prepare_data, training_record
from upcycle.training_settings import ModelFacts, Settings, TrainingOptions, local_files, read_facts, resolve
from upcycle.training_state import load_state, save_state
from upcycle.watchdog import Watchdog
from upcycle.weights import load_model, quiet_transformers, write_weights

Watch = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class TrainingResult:
    """What a training did.

    Attributes:
        out: the run's folder, with the finished checkpoint in it once `finished`.
        steps: done, those of an earlier start included.
        tokens: that the model was trained on, those of an earlier start included.
        seconds: of this start.
        tokens_per_second: of this start, evaluations and checkpoints not counted.
        heldout: the last held-out loss of each domain, nats per token, and the first.
        first_heldout: that before the first step.
        finished: all steps are done; else it was asked to stop.
        warnings: everything that was warned of.
    """

    out: Path
    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    heldout: Mapping[str, float]
    first_heldout: Mapping[str, float]
    finished: bool
    warnings: Sequence[str] = field(default_factory=list)


def train(
    options: TrainingOptions, watch: Watch = lambda _: None, stop: Callable[[], bool] = lambda: False
) -> TrainingResult:
    """Train a checkpoint and write the result as one of the same form.

    Args:
        watch: called in the main process with each event as plain data: `{"event": "start" | "tokens" | "step" |
            "eval" | "checkpoint" | "warning", …}`; steps and evaluations are also what `metrics.jsonl` holds.
        stop: asked after every step; True ends the training there, saved.

    Raises:
        UpcycleError: input that cannot be served, before the first step; or a training that went wrong.
    """
    facts = read_facts(options.model)
    quiet_transformers()
    # What accelerate would shard is sharded here instead, where each process reads its share alone.
    sharded = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" or options.shard
    options = replace(options, shard=sharded)
    accelerator = make_accelerator(options)
    settings, reasons = resolve(options, facts, accelerator.num_processes, accelerator.device.type == "cuda")
    run = RunFolder(options.out)
    try:
        with one_by_one(accelerator):
            if accelerator.is_main_process:
                run.open(options.resume, options.overwrite, [options.model, *local_files(options)])
        settings = _fitted(options, settings, facts, accelerator, run)
        return _Training(options, settings, facts, accelerator, run, watch).run_all(reasons, stop)
    finally:
        run.close()
        accelerator.end_training()


def _fitted(
    options: TrainingOptions, settings: Settings, facts: ModelFacts, accelerator: Accelerator, run: RunFolder
) -> Settings:
    """Settings whose step fits into the memory of every process's device, as the resumed training's did.

    Raises:
        TrainingError: none does.
    """
    free = free_memory(accelerator.device, accelerator.num_processes)
    if accelerator.num_processes > 1:
        free = int(accelerator.gather(torch.tensor([free], device=accelerator.device)).min())
    if options.micro_batch_size is None:
        if options.resume:
            former = run.record().get("settings", {}).get("micro_batch_size")
            settings = replace(settings, micro_batch_size=former or settings.micro_batch_size)
        else:
            settings = fit_micro_batch(settings, facts, free)
    check_memory(settings, facts, free, accelerator.device)
    return settings


class _Training:
    """One training while it runs."""

    def __init__(
        self,
        options: TrainingOptions,
        settings: Settings,
        facts: ModelFacts,
        accelerator: Accelerator,
        run: RunFolder,
        watch: Watch,
    ) -> None:
        self.options, self.settings, self.facts = options, settings, facts
        self.accelerator, self.run, self.sharded = accelerator, run, settings.shard
        self.main = accelerator.is_main_process
        self._watch = watch
        self.warnings: list[str] = []
        self.watchdog = Watchdog(facts.experts, facts.layers)
        self.step = self.first_step = 0
        self.first_heldout: dict[str, float] = {}
        self.heldout: dict[str, float] = {}
        self.busy = 0.0  # seconds in steps alone
        _, self.router_steps = parse_trained(settings.trained)

    def run_all(self, reasons: Mapping[str, str], stop: Callable[[], bool]) -> TrainingResult:
        """Prepare, train, finish."""
        began = time.monotonic()
        domains, self.windows = prepare_data(
            self.options,
            self.settings,
            self.facts,
            self.run.tokens,
            self.accelerator,
            lambda domain, tokens: self.tell("tokens", domain=domain, tokens=tokens),
        )
        settings = self.settings
        self.stream = TokenStream(
            domains, settings.shares, settings.sequence_length, settings.batch_size, settings.random_seed
        )
        record = training_record(self.options.model, self.settings, reasons, domains, self.windows)
        record["epochs"] = self.stream.epochs(settings.steps * settings.batch_size)
        if self.options.resume:
            with one_by_one(self.accelerator):
                if self.main:
                    check_same(self.options.out, self.run.record(), record)
        self._warn_of_epochs()
        torch.manual_seed(settings.random_seed)  # models draw from no other generator
        self._build()
        with one_by_one(self.accelerator):
            self._check_space()
            if self.main and not self.options.resume:
                self.run.begin(record | self.acceleration.record())
        if self.options.log_with:
            config = {**settings.plain(), "shares": str(dict(settings.shares))}
            self.accelerator.init_trackers("upcycle", config=config)
        self._resume()
        self._announce(domains, reasons)
        if self.step == 0:
            self._evaluate()
        while self.step < settings.steps:
            self._one_step()
            last = self.step == settings.steps
            if last and self.watchdog.skipped:
                raise TrainingError(
                    f"the last {self.watchdog.skipped} of {self.step} steps could not be taken, so there is nothing to "
                    "finish with; start again from the model that went in, with a lower --learning-rate"
                )
            if last or self.step % settings.eval_every == 0:
                self._evaluate()
            stopping = self._agreed(stop())
            if last or stopping or self.step % settings.save_every == 0:
                self._save()
            if stopping and not last:
                return self._result(began, finished=False)
        if self.main:
            self.run.finish(self.run.checkpoint(self.step))
            if (self.options.out / PROVENANCE).is_file():
                cards = read_card(self.options.out), read_card(self.options.model)
                write_card(self.options.out, next((card for card in cards if is_handwritten(card)), ""))
        self.accelerator.wait_for_everyone()
        return self._result(began, finished=True)

    def _result(self, began: float, finished: bool) -> TrainingResult:
        tokens = (self.step - self.first_step) * self.settings.batch_tokens
        return TrainingResult(
            out=self.options.out,
            steps=self.step,
            tokens=self.step * self.settings.batch_tokens,
            seconds=time.monotonic() - began,
            tokens_per_second=tokens / self.busy if self.busy else 0.0,
            heldout=self.heldout,
            first_heldout=self.first_heldout,
            finished=finished,
            warnings=self.warnings,
        )

    def tell(self, event: str, **values: Any) -> None:
        """Tell whoever watches, in the main process."""
        if self.main:
            self._watch({"event": event, **values})

    def _warn(self, message: str) -> None:
        self.warnings.append(message)
        self.tell("warning", message=message)

    # What is there before the first step

    def _warn_of_epochs(self) -> None:
        for name, epochs in self.stream.epochs(self.settings.steps * self.settings.batch_size).items():
            if epochs > MAX_EPOCHS:
                self._warn(
                    f"domain '{name}' will be seen {epochs:.1f} times; beyond {MAX_EPOCHS:.0f} repeating gives little "
                    "and later harms (arXiv:2305.16264, arXiv:2305.13230): give more text or fewer --steps"
                )

    def _build(self) -> None:
        options, settings, accelerator = self.options, self.settings, self.accelerator
        if self.sharded:
            mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
            model = load_sharded(options.model, mesh, accelerator.device, settings.precision)
        else:
            model = load_model(options.model)
        kind, _ = parse_trained(settings.trained)
        choose_trained(model, kind)
        if settings.activation_checkpointing:
            # The method's old name; transformers renames it.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        if not self.sharded:
            model.to(accelerator.device)
        former = self.run.record().get("experts_backend") if options.resume else None
        self.acceleration = speed_up(model, settings, self.facts, accelerator, options.experts_backend, former)
        if settings.lora:
            model = add_lora(model, settings.lora)
        self.model = model  # as it is written; `self.wrapped` is what computes
        model.train()
        if self.sharded:  # gathered and computed in bf16 where that was asked for
            self.wrapped = model
        else:
            self.wrapped = accelerator.prepare(model)
        self.optimizer = make_optimizer(model, settings.optimizer, settings.learning_rate, settings.weight_decay)
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def _check_space(self) -> None:
        if self.main:
            kept = self.model.parameters() if self.sharded else self.trained
            count = sum(parameter.numel() for parameter in kept)
            check_space(self.options.out, self.options.model, count, self.run.checkpoints())

    def _resume(self) -> None:
        if not self.options.resume:
            return
        found = self.run.checkpoints()
        if not found:
            if self.main:
                self.run.rewind(-1)
            self._warn(f"{self.options.out} holds no checkpoint yet, so the training begins anew")
            return
        rank = self.accelerator.process_index
        progress = load_state(found[-1], self.model, self.optimizer, rank, self.sharded)
        try:
            self.step = self.first_step = int(progress["step"])
            self.stream.load_state(progress["stream"])
            self.watchdog.load_state(progress["watchdog"])
            self.heldout, self.first_heldout = progress["heldout"], progress["first_heldout"]
        except (KeyError, TypeError, ValueError) as error:
            raise TrainingError(
                f"{found[-1]}: its {PROGRESS} is damaged ({error!r}); remove the folder to resume from the one before"
            ) from error
        if self.main:
            self.run.rewind(self.step)

    def _announce(self, domains: Sequence[Domain], reasons: Mapping[str, str]) -> None:
        settings = self.settings
        self.tell(
            "start",
            settings=settings.plain(),
            reasons=dict(reasons),
            step=self.step,
            data={domain.name: domain.tokens.size for domain in domains},
            epochs=self.stream.epochs(settings.steps * settings.batch_size),
            acceleration=list(self.acceleration.told),
            trained_parameters=sum(parameter.numel() for parameter in self.trained),
            parameters=sum(parameter.numel() for parameter in self.model.parameters()),
            training_flops_per_token=self.facts.training_flops(settings.sequence_length),
            peak_flops=settings.processes * matmul_rate(self.accelerator.device, settings.precision),
            experts=list(self.facts.experts),
            groups=list(self.facts.groups),
        )

    # The steps

    def _one_step(self) -> None:
        began = time.perf_counter()
        settings = self.settings
        batch = self.stream.next_batch()
        rate = schedule(
            settings.schedule,
            self.step,
            settings.steps,
            settings.warm_up,
            settings.learning_rate,
            settings.batch_tokens,
        )
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], torch.Tensor):  # torchao's
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        nll, routers = self._gradients(batch)
        if self.step < self.router_steps:
            forget_others(self.model.named_parameters())
        elif self.step == self.router_steps:
            self.watchdog.forget_norms()  # those of the routers alone say nothing of the whole
        norm = float(self.accelerator.clip_grad_norm_(self.trained, settings.max_grad_norm or math.inf))
        loss = nll + (float(routers.total(self.facts.load_balance, self.facts.z)) if routers else 0.0)
        objection = self.watchdog.objection(self.step + 1, loss, norm)
        if objection is None:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        seconds = time.perf_counter() - began
        self.busy += seconds
        values: dict[str, Any] = {
            "step": self.step,
            "tokens": self.step * settings.batch_tokens,
            "loss": loss,
            "nll": nll,
            **(router_metrics(routers) if routers else {}),
            "gradient_norm": norm,
            "learning_rate": rate,
            "skipped": objection,
            "seconds": round(seconds, 4),
            "tokens_per_second": round(settings.batch_tokens / seconds, 1),
        }
        self._log("step", values)
        if objection:
            self._warn(f"step {self.step} was not taken: {objection}")
        if routers:
            for message in self.watchdog.idle_experts(self.step, values["load"]):
                self._warn(message)

    def _gradients(self, batch: Batch) -> tuple[float, RouterLosses | None]:
        """Forward and backward of a batch; its mean NLL, and the routers' losses as means over all forwards.

        The NLL is a mean over all targets of the batch, whatever forward or process they fall to. The routers' losses
        are taken in each forward over its own tokens, and averaged.
        """
        settings, accelerator = self.settings, self.accelerator
        share = settings.batch_size // settings.processes
        first = accelerator.process_index * share
        targets = batch.tokens[:, 1:].size if batch.counted is None else int(batch.counted.sum())
        forwards = settings.accumulation * settings.processes
        total_nll = torch.zeros((), device=accelerator.device, dtype=torch.float32)
        measured: list[RouterLosses] = []
        for start in range(first, first + share, settings.micro_batch_size):
            rows = slice(start, start + settings.micro_batch_size)
            tokens = torch.from_numpy(batch.tokens[rows]).to(accelerator.device)
            counted = None if batch.counted is None else torch.from_numpy(batch.counted[rows]).to(accelerator.device)
            last = start + settings.micro_batch_size == first + share
            # A sharded model exchanges gradients in every forward, so that none is ever whole.
            with contextlib.nullcontext() if last else accelerator.no_sync(self.wrapped):
                head = self.acceleration.loss_head
                nll, routers = forward_losses(self.wrapped, tokens, counted, self.facts.top_k, head)
                # DDP and FSDP average the gradients of the processes, hence the factor.
                loss = nll * (settings.processes / max(1, targets))
                if routers:
                    loss = loss + routers.total(self.facts.load_balance, self.facts.z) / settings.accumulation
                accelerator.backward(loss)
            total_nll += nll.detach()
            if routers:
                measured.append(routers)
        total_nll = accelerator.reduce(total_nll, "sum")
        mean = mean_over_forwards(measured, forwards, accelerator) if measured else None
        return float(total_nll) / max(1, targets), mean

    def _evaluate(self) -> None:
        if not self.windows:
            return
        self.model.eval()
        head = self.acceleration.loss_head
        # Each window's length would be compiled anew, up to the compiler's limit, after which it compiles nothing.
        eager = torch.compiler.set_stance("force_eager") if self.settings.compile else contextlib.nullcontext()
        with eager, head.off() if head else contextlib.nullcontext():
            measured = measure(
                self.wrapped, self.windows, self.facts.top_k, self.settings.micro_batch_size, self.accelerator
            )
        self.model.train()
        self.heldout = {name: values["loss"] for name, values in measured.items()}
        self.first_heldout = self.first_heldout or self.heldout
        self._log("eval", {"step": self.step, "heldout": measured})

    def _log(self, event: str, values: dict[str, Any]) -> None:
        values = finite(values)
        if self.main:
            self.run.append(values)
        self.tell(event, **values)
        if self.options.log_with:
            self.accelerator.log(tracked(values), step=self.step)

    def _agreed(self, stop: bool) -> bool:
        """Whether any process was asked to stop: all must, at the same step."""
        if self.accelerator.num_processes == 1:
            return stop
        return bool(self.accelerator.reduce(torch.tensor(float(stop), device=self.accelerator.device), "sum").item())

    def _save(self) -> None:
        """Write a checkpoint and the state to go on from, in place only when whole.

        Raises:
            TrainingError: the weights are not finite; OutputError: they cannot be written.
        """
        if not all(bool(parameter.detach().isfinite().all()) for parameter in self.trained):
            raise TrainingError(
                f"step {self.step}: a weight is no finite number, so it is not saved; start again from the model that "
                "went in, with a lower --learning-rate"
            )
        try:
            self._write_checkpoint(self.run.checkpoint(self.step))
        except (OSError, RuntimeError) as error:  # torch.save's own error is the latter
            raise OutputError(
                f"the checkpoint of step {self.step} cannot be written to {self.options.out}: {error}; the one before "
                "is whole, --resume goes on from it"
            ) from error

    def _write_checkpoint(self, target: Path) -> None:
        accelerator = self.accelerator
        progress = {
            "step": self.step,
            "stream": self.stream.state(),
            "watchdog": self.watchdog.state(),
            "heldout": self.heldout,
            "first_heldout": self.first_heldout,
        }
        with staging(target) if self.main else contextlib.nullcontext(partial_folder(target)) as partial:
            accelerator.wait_for_everyone()
            if self.main:
                copy_companions(self.options.model, partial)
            written = write_weights(self.model, self.options.model, partial, writes=self.main)
            save_state(partial, self.model, self.optimizer, progress, accelerator.process_index, self.sharded)
            accelerator.wait_for_everyone()
        accelerator.wait_for_everyone()
        if self.main:
            self.run.prune()
        self.tell("checkpoint", step=self.step, folder=str(target), bytes=written)
