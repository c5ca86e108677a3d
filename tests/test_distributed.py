"""Two processes on the CPU: the same training as one, sharded or not, and resumed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import run_cli
from tests.tiny import BY_NAME, make_seeds
from tests.training import arguments, metrics

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
SIZES = ("--micro-batch-size", 1, "--steps", 6, "--save-every", 3)


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}


def launch(command: list[str]) -> None:
    done = subprocess.run(
        [*LAUNCH, "-m", "upcycle", *command],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def kill_after(checkpoint: Path, command: list[str]) -> None:
    """Start the training and kill every process of it as soon as a checkpoint is there."""
    process = subprocess.Popen([*LAUNCH, "-m", "upcycle", *command], env=environment(), start_new_session=True)
    while not checkpoint.exists() and process.poll() is None:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    children = subprocess.run(["pkill", "-9", "-f", f"upcycle train .*{checkpoint.parents[1]}"], check=False)
    assert children.returncode in (0, 1)
    process.wait()
    time.sleep(0.3)


def losses(folder: Path) -> list[float]:
    return [float(value) for value in metrics(folder, "loss")]


@pytest.fixture
def one(mixture: Path, data: Mapping[str, str], tmp_path: Path) -> Path:
    """One process that accumulates two forwards for each of two processes' two."""
    done = run_cli(*arguments(mixture, data, tmp_path / "one", *SIZES), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    return tmp_path / "one"


@pytest.mark.parametrize("more", [(), ("--shard",)], ids=["ddp", "sharded"])
def test_two_processes_train_like_one_also_when_killed(
    more: tuple[str, ...],
    one: Path,
    mixture: Path,
    data: Mapping[str, str],
    tmp_path: Path,
) -> None:
    command = arguments(mixture, data, tmp_path / "two", *SIZES, *more)
    launch(command)
    assert losses(tmp_path / "two") == pytest.approx(losses(one), abs=1e-5)
    straight = load_file(tmp_path / "two" / "model.safetensors")
    for name, value in load_file(one / "model.safetensors").items():
        torch.testing.assert_close(straight[name], value, atol=1e-2, rtol=1e-2, msg=name)
    if more:
        folder = tmp_path / "two" / "checkpoints" / "step-000006" / "training_state" / "sharded"
        sizes = [file.stat().st_size for file in folder.glob("*.distcp")]
        assert len(sizes) == 2
        assert min(sizes) > 0.6 * max(sizes)

    broken = arguments(mixture, data, tmp_path / "broken", *SIZES, *more)
    kill_after(tmp_path / "broken" / "checkpoints" / "step-000003", broken)
    assert not (tmp_path / "broken" / "config.json").exists(), "the kill came too late to show anything"
    launch([*broken, "--resume"])
    assert losses(tmp_path / "broken") == pytest.approx(losses(tmp_path / "two"), abs=1e-6)
    for name, value in load_file(tmp_path / "broken" / "model.safetensors").items():
        torch.testing.assert_close(straight[name], value, atol=1e-6, rtol=0, msg=name)


def make_mixture(case: str, recipe: str, format: str, folder: Path) -> Path:
    seeds = make_seeds(BY_NAME[case], folder / "unrelated", dtype=torch.bfloat16)
    options = ["--recipe", recipe, "--format", format, "--allow-unrelated", "--out", str(folder / "made")]
    done = run_cli("merge", "--seeds", *map(str, seeds), *options)
    assert done.returncode == 0, done.stderr
    return folder / "made"


def test_a_native_mixture_trains_sharded_like_on_one_process(data: Mapping[str, str], tmp_path: Path) -> None:
    mixtral = make_mixture("llama", "btx", "native", tmp_path)
    done = run_cli(*arguments(mixtral, data, tmp_path / "one", *SIZES), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    launch(arguments(mixtral, data, tmp_path / "two", *SIZES, "--shard"))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    two = load_file(tmp_path / "two" / "model.safetensors")
    before = load_file(mixtral / "model.safetensors")
    assert two.keys() == before.keys()
    for name, value in load_file(tmp_path / "one" / "model.safetensors").items():
        torch.testing.assert_close(two[name], value, atol=1e-2, rtol=1e-2, msg=name)
        assert not torch.equal(two[name], before[name]), name


WORKER = """
import json, sys, torch
from pathlib import Path
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from upcycle.sharding import load_sharded
from upcycle.weights import load_model, write_weights

folder, out = Path(sys.argv[1]), Path(sys.argv[2])
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
model = load_sharded(folder, init_device_mesh("cpu", (2,)), torch.device("cpu"), "fp32")
whole = load_model(folder)
parameters = dict(model.named_parameters())
assert all(isinstance(value, DTensor) for value in parameters.values())
for name, value in whole.named_parameters():
    assert torch.equal(parameters[name].full_tensor(), value), name
for name, value in whole.named_buffers():
    assert torch.equal(dict(model.named_buffers())[name], value), name
write_weights(model, folder, out, writes=rank == 0)
local = sum(value.to_local().numel() for value in parameters.values())
tokens = torch.arange(20)[None] + 3
with torch.no_grad():
    difference = (model(tokens).logits - whole(tokens).logits).abs().max().item()
(out / f"{rank}.json").write_text(json.dumps([local, sum(v.numel() for v in parameters.values()), difference]))
"""


@pytest.mark.parametrize(
    ("case", "recipe", "format"),
    [
        ("llama", "bam", "bam"),
        ("llama-biases", "bam", "bam"),  # tied
        ("llama", "btx", "native"),
        ("qwen2-full", "shared-expert", "native"),
        ("granite", "btx", "native"),  # stores its experts stacked
        ("olmo2", "btx", "native"),
    ],
)
def test_a_sharded_model_holds_its_share_and_is_written_byte_for_byte(
    case: str, recipe: str, format: str, tmp_path: Path
) -> None:
    folder = make_mixture(case, recipe, format, tmp_path)
    (tmp_path / "worker.py").write_text(WORKER)
    (tmp_path / "out").mkdir()
    command = [*LAUNCH, str(tmp_path / "worker.py"), str(folder), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found: list[Any] = [json.loads((tmp_path / "out" / f"{rank}.json").read_text()) for rank in range(2)]
    assert sum(local for local, _, _ in found) == found[0][1]
    assert max(local for local, _, _ in found) < 0.55 * found[0][1]
    assert max(difference for _, _, difference in found) < 1e-6
    written = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert written == (folder / "model.safetensors").read_bytes()
