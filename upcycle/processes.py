"""How the processes of a training are set up and talk: in what order, and with what means."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Final

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast_object_list,
)

from upcycle.errors import TrainingError
from upcycle.losses import RouterLosses
from upcycle.run_folder import TRACKERS
from upcycle.training_settings import TrainingOptions

MAX_WAIT: Final = timedelta(hours=12)  # of other processes for the main one, which tokenises


def make_accelerator(options: TrainingOptions) -> Accelerator:
    """Accelerate's view of this process: its device, precision, trackers.

    Raises:
        TrainingError: an unknown tracker or one that is not installed, a precision that the device has not.
    """
    # Left alone, accelerate takes several processes without a GPU for strangers to one another.
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    timeout = InitProcessGroupKwargs(timeout=MAX_WAIT)
    shards = os.environ.pop("ACCELERATE_USE_FSDP", None)
    try:
        device = PartialState(cpu=several and not torch.accelerator.is_available(), **timeout.to_kwargs()).device
        precision = options.precision or ("bf16" if device.type == "cuda" else "fp32")
        accelerator = Accelerator(
            mixed_precision="bf16" if precision == "bf16" else "no",
            log_with=options.log_with,
            project_config=ProjectConfiguration(str(options.out), str(options.out / TRACKERS)),
            # Without it DDP holds every gradient twice.
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        )
    except ValueError as error:  # an unknown tracker, or a precision that the device has not
        raise TrainingError(f"accelerate refuses these options: {error}") from error
    finally:
        if shards is not None:
            os.environ["ACCELERATE_USE_FSDP"] = shards
    accelerator.gradient_accumulation_steps = 1  # this loop's own; a launcher's would scale the gradients once more
    if options.log_with and not accelerator.log_with:
        raise TrainingError(f"--log-with {options.log_with}: that tracker is not installed (pip install it)")
    return accelerator


@contextmanager
def one_by_one(accelerator: Accelerator) -> Iterator[None]:
    """The main process first; the others follow, or stop as it did."""
    failed = torch.zeros(1, device=accelerator.device)
    if accelerator.is_main_process:
        try:
            yield
        except BaseException:
            failed += 1
            raise
        finally:
            if accelerator.num_processes > 1:
                torch.distributed.broadcast(failed, 0)
    else:
        torch.distributed.broadcast(failed, 0)
        if failed.item():
            raise TrainingError("the main process could not go on; its message says why")
        yield


def from_main(value: Any, accelerator: Accelerator) -> Any:
    """The main process's value, in all of them."""
    return broadcast_object_list([value])[0] if accelerator.num_processes > 1 else value


def mean_over_forwards(measured: Sequence[RouterLosses], forwards: int, accelerator: Accelerator) -> RouterLosses:
    """Means over the forwards of all processes, in one exchange."""
    names = list(RouterLosses.__dataclass_fields__)
    parts = [torch.stack([getattr(one, name).detach().float() for one in measured]).sum(0) for name in names]
    flat = accelerator.reduce(torch.cat([part.flatten() for part in parts]), "sum") / forwards
    pieces = torch.split(flat.cpu(), [part.numel() for part in parts])
    return RouterLosses(*(piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True)))
