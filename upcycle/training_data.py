"""What goes into a training, and whether a resumed one gets the same."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from upcycle.data import Domain, fingerprint, load_tokenizer, prepare_domain
from upcycle.errors import TrainingError
from upcycle.heldout import Heldout, heldout_windows
from upcycle.processes import one_by_one
from upcycle.training_settings import ModelFacts, Settings, TrainingOptions
from upcycle.version import __version__
from upcycle.weights import checkpoint_fingerprint


def prepare_data(
    options: TrainingOptions,
    settings: Settings,
    facts: ModelFacts,
    folder: Path,
    accelerator: Accelerator,
    progress: Callable[[str, int], None],
) -> tuple[list[Domain], list[Heldout]]:
    """Training and held-out tokens, tokenised into `folder` by the main process.

    Args:
        progress: called with a domain's name and the number of its tokens so far.

    Raises:
        DataError, OutputError: data that cannot be read, a folder that cannot be written.
    """
    tokenizer = load_tokenizer(options.model)
    enough = settings.steps * settings.batch_tokens + settings.sequence_length + 1
    domains, windows = [], []
    with one_by_one(accelerator):
        for name, source in options.data.items():
            count = 0

            def added(tokens: int, name: str = name) -> None:
                nonlocal count
                count += tokens
                progress(name, count)

            domains.append(
                prepare_domain(
                    "--data",
                    name,
                    source,
                    folder,
                    tokenizer,
                    facts.dense,
                    random_seed=settings.random_seed,
                    enough=int(enough * settings.shares[name]) + 1,
                    progress=added,
                    writes=accelerator.is_main_process,
                )
            )
        for name, source in options.heldout.items():
            windows.append(
                heldout_windows(
                    name,
                    source,
                    folder / "heldout",
                    tokenizer,
                    facts.dense,
                    length=settings.sequence_length,
                    count=settings.eval_windows,
                    longest=facts.positions,
                    multiple=accelerator.num_processes,
                    writes=accelerator.is_main_process,
                )
            )
    return domains, windows


def training_record(
    model: Path, settings: Settings, reasons: Mapping[str, str], domains: Sequence[Domain], heldout: Sequence[Heldout]
) -> dict[str, Any]:
    """What this training is, as `train.json` holds it."""
    held = [Domain(part.name, part.name, part.tokens.reshape(-1), None, None) for part in heldout]
    return {
        "upcycle_version": __version__,
        "model": model.resolve().name,
        "model_fingerprint": checkpoint_fingerprint(model),
        "settings": settings.plain(),
        "reasons": dict(reasons),
        "data": {domain.name: {"tokens": domain.tokens.size, "documents": domain.documents} for domain in domains},
        "data_fingerprint": fingerprint(domains),
        "heldout_fingerprint": fingerprint(held),
    }


def check_same(out: Path, former: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """Refuse to resume another training than this one.

    Args:
        out: its folder, for the message.
        former: its record.
        record: that of what was asked for now.

    Raises:
        TrainingError: what differs.
    """
    before, now = former.get("settings"), record["settings"]
    if isinstance(before, dict):
        before = {"liger": False, "side_by_side": False, "compile": False} | before  # trainings that knew none of it
    prints = [key for key in record if key.endswith("_fingerprint")]
    pairs = {key: (former.get(key), record[key]) for key in prints}
    pairs |= {key: (before.get(key) if isinstance(before, dict) else None, now[key]) for key in now}
    for key, (found, value) in pairs.items():
        if found != value:
            raise TrainingError(
                f"--resume: {key} was {found!r} in {out} and is {value!r} now; give the same model, "
                "options and data as before, or start a new training with another --out"
            )
