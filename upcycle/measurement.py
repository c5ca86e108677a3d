"""One model measured on held-out text: its losses by document, what its routers do, downstream tasks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from upcycle.backends import choose_backend, use_backend
from upcycle.data import load_tokenizer
from upcycle.errors import CheckpointError, UpcycleError
from upcycle.evaluate import token_losses
from upcycle.evaluation_inputs import EvaluationOptions
from upcycle.expert_modules import ffn_experts, selections_are_told
from upcycle.heldout import Heldout
from upcycle.mixture import own_experts
from upcycle.numeric import Array
from upcycle.routing import RoutingTally
from upcycle.similarity import MAX_TOKENS, expert_similarity
from upcycle.tasks import run_tasks
from upcycle.training_settings import ModelFacts
from upcycle.weights import load_model

BATCH_TOKENS: Final = {"cpu": 4096}  # a forward; elsewhere:
GPU_BATCH_TOKENS: Final = 32_768
MAX_LOGITS: Final = 2**28  # of a forward, unless --batch-tokens says otherwise: 1 GiB in fp32
DIGITS: Final = 6


@dataclass(frozen=True)
class DocumentSums:
    """Per document, `[documents]` each: summed NLL in nats, targets, bytes of their text (None where unknown)."""

    nll: Array
    tokens: Array
    text_bytes: Array | None


def find_device(name: str | None) -> torch.device:
    """The device of that name, or the accelerator there is, or the CPU.

    Raises:
        UpcycleError: it cannot be used.
    """
    if name is None:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return device or torch.device("cpu")
    try:
        torch.ones(1, device=name).item()
        return torch.device(name)
    except Exception as error:  # each backend raises its own
        raise UpcycleError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error


class Measurement:
    """A model in memory while it is measured."""

    def __init__(self, model: str, facts: ModelFacts, options: EvaluationOptions, device: torch.device) -> None:
        self.name, self.facts, self.options, self.device = model, facts, options, device
        precision = options.precision or ("bf16" if device.type == "cuda" else "fp32")
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.model = load_model(Path(model), dtype).eval()
        self._guarded(self.model.to, device)
        if facts.top_k:
            choose = partial(choose_backend, backward=False)
            wanted = options.experts_backend
            backend = self._guarded(choose, self.model, wanted, self._batch_tokens, facts.top_k, dtype)
            if backend:
                use_backend(self.model, backend)

    def run(
        self,
        heldout: Mapping[str, Heldout],
        windows_done: Callable[[str, str, int], None],
        tasks_done: Callable[[str, int, int], None],
    ) -> tuple[dict[str, Any], dict[str, DocumentSums]]:
        """The model's entry of the result (`routing` None where the model does not tell it), and sums by domain."""
        windows = [torch.from_numpy(part.tokens[:1, :MAX_TOKENS]).to(self.device) for part in heldout.values()]
        top_k = self.facts.top_k if windows else None
        if top_k is not None and self.facts.kind != "bam":
            top_k = top_k if self._guarded(selections_are_told, self.model, windows[0], top_k) else None
        sums: dict[str, DocumentSums] = {}
        routing: dict[str, Any] = {}
        for name, part in heldout.items():
            tally = None if top_k is None else RoutingTally(top_k, self._own_experts(name))
            done = partial(windows_done, self.name, name)
            losses = self._guarded(token_losses, self.model, part, self._batch(part), self.device, tally, done)
            sums[name] = document_sums(losses, part)
            if not np.isfinite(sums[name].nll).all():
                raise CheckpointError(
                    f"{self.name}: its loss on {name} is no finite number; its weights are damaged, or too large for "
                    "bf16 (--precision fp32)"
                )
            if tally:
                routing[name] = _rounded(tally.means()) | {"own_expert": name if tally.own_experts else None}
                routing[name].setdefault("own_share", None)
        result: dict[str, Any] = {}
        if self.facts.kind != "dense" and heldout:
            result["routing"] = self._routing(routing, windows) if routing else None
        if self.options.tasks:
            result["tasks"] = run_tasks(
                self.model,
                load_tokenizer(Path(self.name)),
                self.options.tasks,
                limit=self.options.task_limit,
                few_shot=self.options.few_shot,
                progress=partial(tasks_done, self.name),
            )
        self.model.to("meta")  # lets the memory go at once, whoever still holds the model
        return result, sums

    def _own_experts(self, domain: str) -> Sequence[int]:
        """The numbers of the experts that came from a domain, where experts have names: several if one was split."""
        named = not all(name.isdecimal() for name in self.facts.groups)
        return own_experts(self.facts.experts, self.facts.groups, domain) if named else ()

    def _routing(self, domains: Mapping[str, Any], windows: list[torch.Tensor]) -> dict[str, Any]:
        similarity = self._guarded(expert_similarity, self.model, windows)
        for kind, cosines in similarity.items():
            if not np.isfinite(cosines).all():
                what = kind.partition("_")[0]
                raise CheckpointError(f"{self.name}: a weight of its {what} experts is no finite number; it is damaged")
        return {
            "experts": list(self.facts.experts),
            "groups": list(self.facts.groups),
            "layers": list(ffn_experts(self.model)),
            "top_k": self.facts.top_k,
            "domains": domains,
            "similarity": _rounded(similarity),
        }

    @property
    def _batch_tokens(self) -> int:
        """Tokens a forward."""
        return self.options.batch_tokens or min(
            BATCH_TOKENS.get(self.device.type, GPU_BATCH_TOKENS), MAX_LOGITS // int(self.facts.dense["vocab_size"])
        )

    def _batch(self, part: Heldout) -> int:
        """Windows a forward."""
        return max(1, self._batch_tokens // int(part.tokens.shape[1]))

    def _guarded(self, work: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return work(*arguments)
        except (MemoryError, RuntimeError) as error:
            # A GPU's allocator has an error of its own, the CPU's says so in words.
            if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(error):
                raise
            raise UpcycleError(
                f"{self.name} does not fit into the memory of {self.device}; a smaller --batch-tokens, --precision "
                "bf16 or --device cpu may help"
            ) from error


def document_sums(losses: Array, part: Heldout) -> DocumentSums:
    """Token losses `[windows, length - 1]` summed by document; without documents each window is one."""
    windows = np.arange(len(losses), dtype=np.int64)[:, None]
    owners = np.broadcast_to(windows, losses.shape) if part.documents is None else part.documents
    counted = np.ones(losses.shape, np.bool_) if part.counted is None else part.counted
    owner, documents = owners[counted], int(owners.max()) + 1

    def total(values: Array) -> Array:
        summed: Array = np.bincount(owner, values, minlength=documents)
        return summed

    sizes = None if part.text_bytes is None else total(part.text_bytes[counted].astype(np.float64))
    return DocumentSums(total(losses[counted].astype(np.float64)), total(np.ones(len(owner))), sizes)


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return round(value, DIGITS) if isinstance(value, float) else value
