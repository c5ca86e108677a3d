"""Held-out windows, and the loss measured on them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM

from tests.tiny import BY_NAME, VOCAB, dense_config
from upcycle.errors import DataError
from upcycle.evaluate import heldout_windows, measure


def windows(source: Path, folder: Path, **changes: Any) -> Any:
    values = {"length": 8, "count": 4, **changes}
    return heldout_windows("code", str(source), folder, None, {"vocab_size": VOCAB}, **values)


def test_rows_of_an_array_are_windows_evenly_spaced(tmp_path: Path) -> None:
    array = np.arange(70, dtype=np.uint16).reshape(14, 5)
    np.save(tmp_path / "a.npy", array)
    found = windows(tmp_path / "a.npy", tmp_path, count=3)
    assert found.tokens.tolist() == array[[0, 6, 13]].tolist()
    assert windows(tmp_path / "a.npy", tmp_path, count=99, multiple=4).tokens.shape == (12, 5)


def test_a_flat_run_is_cut_without_overlap(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(35))
    assert windows(tmp_path / "a.npy", tmp_path).tokens.tolist() == np.arange(32).reshape(4, 8).tolist()
    with pytest.raises(DataError, match="holds 35 tokens, too few for 1 windows of 36"):
        windows(tmp_path / "a.npy", tmp_path, length=36)


def test_the_loss_is_the_mean_over_all_predicted_tokens(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(dense_config(BY_NAME["llama"]), dtype=torch.float32).eval()
    tokens = torch.randint(VOCAB, (5, 12))
    np.save(tmp_path / "a.npy", tokens.numpy())
    found = measure(model, [windows(tmp_path / "a.npy", tmp_path, count=5)], None, 2, Accelerator())
    expected = model(input_ids=tokens, labels=tokens).loss.item()  # all windows are as long, so means agree
    assert found["code"] == {"loss": pytest.approx(expected, abs=1e-6)}
    assert json.dumps(found)
