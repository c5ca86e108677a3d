"""The loss measured on held-out windows."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM

from tests.tiny import BY_NAME, VOCAB, dense_config
from upcycle.evaluate import measure, token_losses
from upcycle.heldout import Heldout

CPU = torch.device("cpu")


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(dense_config(BY_NAME["llama"]), dtype=torch.float32).eval()


@pytest.fixture
def tokens() -> Any:
    return np.random.default_rng(0).integers(VOCAB, size=(7, 12))


def test_each_token_loses_what_transformers_says(model: Any, tokens: Any) -> None:
    found = token_losses(model, Heldout("code", tokens), 3, CPU)
    for row, losses in zip(torch.from_numpy(tokens), found, strict=True):
        logits = model(input_ids=row[None]).logits[0].double()
        expected = torch.nn.functional.cross_entropy(logits[:-1], row[1:], reduction="none")
        np.testing.assert_allclose(losses, expected.detach().numpy(), atol=2e-6)


def test_neither_batch_size_nor_order_shows(model: Any, tokens: Any) -> None:
    whole = token_losses(model, Heldout("code", tokens), 7, CPU)
    order = np.random.default_rng(1).permutation(7)
    for batch_size in (1, 2, 4):
        found = token_losses(model, Heldout("code", tokens[order]), batch_size, CPU)
        np.testing.assert_allclose(found, whole[order], atol=2e-6)


def test_while_training_the_loss_is_the_mean_over_what_counts(model: Any, tokens: Any) -> None:
    counted = np.random.default_rng(2).random((7, 11)) < 0.5
    found = measure(model, [Heldout("code", tokens), Heldout("law", tokens, counted)], None, 2, Accelerator())
    whole = torch.from_numpy(tokens)
    expected = model(input_ids=whole, labels=whole).loss.item()  # all windows are as long, so means agree
    assert found["code"] == {"loss": pytest.approx(expected, abs=1e-6)}
    losses = token_losses(model, Heldout("code", tokens), 2, CPU)
    assert found["law"]["loss"] == pytest.approx(losses[counted].mean(), abs=1e-6)
    assert json.dumps(found)
