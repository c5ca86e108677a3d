"""The training on a real GPU; `pytest -m gpu` on a machine that has one."""

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from tests.conftest import run_cli
from tests.training import arguments, metrics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("optimizer", ["adamw", "adamw-8bit", "adamw-offload"])
def test_training_in_bf16_lowers_the_loss(
    optimizer: str,
    mixture: Path,
    data: Mapping[str, str],
    tmp_path: Path,
) -> None:
    if optimizer != "adamw" and importlib.util.find_spec("torchao") is None:
        pytest.skip("torchao is not installed")
    more = ("--steps", 40, "--optimizer", optimizer)
    done = run_cli(*arguments(mixture, data, tmp_path / "out", *more))
    assert done.returncode == 0, done.stderr
    losses = metrics(tmp_path / "out", "nll")
    assert losses[-1] < losses[0] - 1


def test_an_evaluation_agrees_with_the_hosts(mixture: Path, data: Mapping[str, str]) -> None:
    sources = [f"{name}={file}" for name, file in data.items()]
    found = []
    for more in (("--device", "cpu"), ("--device", "cuda", "--precision", "fp32"), ("--device", "cuda")):
        done = run_cli("eval", mixture, "--data", *sources, "--sequence-length", 32, "--json", *more)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout)["models"][str(mixture)]["mean_loss"])
    assert found[1] == pytest.approx(found[0], abs=1e-3)
    assert found[2] == pytest.approx(found[0], abs=2e-2)  # bf16


def test_fp32_on_the_gpu_is_fp32_on_the_host(
    mixture: Path,
    data: Mapping[str, str],
    tmp_path: Path,
) -> None:
    for name, devices in (("gpu", "0"), ("host", "")):
        more = ("--steps", 3, "--precision", "fp32")
        done = run_cli(*arguments(mixture, data, tmp_path / name, *more), CUDA_VISIBLE_DEVICES=devices)
        assert done.returncode == 0, done.stderr
    assert metrics(tmp_path / "gpu", "loss") == pytest.approx(metrics(tmp_path / "host", "loss"), rel=1e-4)
