"""The state that a training goes on from: weights in fp32, the optimizer's moments, positions, random numbers."""

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Final

import torch
from torch.distributed.checkpoint.api import CheckpointException

from upcycle.checkpoint import read_json, write_json
from upcycle.errors import TrainingError, UpcycleError
from upcycle.run_folder import PROGRESS, STATE

_WHOLE: Final = "state.pt"
_SHARDED: Final = "sharded"


def save_state(
    folder: Path, model: Any, optimizer: torch.optim.Optimizer, progress: Mapping[str, Any], rank: int, sharded: bool
) -> None:
    """Write the state into `folder/training_state`; every process calls this, in a folder that exists.

    A sharded model's state is written by every process its share (torch.distributed.checkpoint).
    """
    target = folder / STATE
    target.mkdir(exist_ok=True)
    torch.save(_random_state(), target / f"random-{rank}.pt")
    if sharded:
        from torch.distributed.checkpoint.state_dict_saver import save

        save(_sharded_state(model, optimizer), checkpoint_id=target / _SHARDED)
    elif rank == 0:
        trained = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
        torch.save({"model": trained, "optimizer": optimizer.state_dict()}, target / _WHOLE)
    if rank == 0:
        write_json(target / PROGRESS, progress)


def load_state(folder: Path, model: Any, optimizer: torch.optim.Optimizer, rank: int, sharded: bool) -> dict[str, Any]:
    """Take up what `save_state` wrote, in place; returns the progress.

    Raises:
        TrainingError: files that are missing or damaged.
    """
    target = folder / STATE
    try:
        if sharded:
            from torch.distributed.checkpoint.state_dict import set_state_dict
            from torch.distributed.checkpoint.state_dict_loader import load

            state = _sharded_state(model, optimizer)
            load(state, checkpoint_id=target / _SHARDED)
            set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        else:
            state = torch.load(target / _WHOLE, map_location="cpu", weights_only=True, mmap=True)
            parameters = dict(model.named_parameters())
            with torch.no_grad():
                for name, value in state["model"].items():
                    parameters[name].copy_(value)
            optimizer.load_state_dict(state["optimizer"])
        _set_random_state(torch.load(target / f"random-{rank}.pt", weights_only=True))
        return read_json(target / PROGRESS)
    except (
        OSError,
        RuntimeError,
        KeyError,
        ValueError,
        EOFError,
        UnpicklingError,
        UpcycleError,
        CheckpointException,
    ) as error:
        raise TrainingError(
            f"{target} cannot be taken up: {error}; remove {folder} to resume from the one before"
        ) from error


def _sharded_state(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import get_state_dict

    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments}


def _random_state() -> dict[str, Any]:
    """Of torch on the host and the device; models draw from no other (dropout)."""
    state: dict[str, Any] = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
