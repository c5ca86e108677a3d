"""Attention and FFN of a parallel block at the same time, on stand-ins for CUDA's streams."""

from contextlib import contextmanager

import pytest
import torch

from upcycle.side_by_side import run_side_by_side


class Recorded:
    """Streams that only write down what is asked of them."""

    def __init__(self):
        self.seen = []

    @contextmanager
    def begin(self, given):
        self.seen.append("begin")
        yield
        self.seen.append("begun")

    def end(self, made):
        self.seen.append("end")


def outcome(model, x):
    model.zero_grad()
    out = model(x, labels=x, output_router_logits=True)
    out.loss.backward()
    return [out.logits, *out.router_logits, *(parameter.grad for parameter in model.parameters())]


def test_a_parallel_block_computes_the_same(made):
    model = made("cohere2", "bam").train()
    x = torch.randint(0, model.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    expected = outcome(model, x)
    streams = Recorded()
    layers = run_side_by_side(model, streams)
    assert layers == len(model.dense.base_model.layers)
    for found, wanted in zip(outcome(model, x), expected, strict=True):  # gradients are added in another order
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)
    order = ["begin", "begun", "end"] * layers
    assert streams.seen == order
    # The FFN alone, as measures of similarity call it, is the FFN.
    hidden = torch.randn(1, 3, model.config.hidden_size)
    mlp = model.dense.base_model.layers[0].mlp
    assert torch.equal(mlp(hidden), type(mlp).forward(mlp, hidden))
    assert streams.seen == order


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_blocks_whose_halves_read_different_inputs_are_left_alone(made, name):
    model = made(name, "bam")
    assert run_side_by_side(model, Recorded()) == 0
    assert "forward" not in vars(model.dense.base_model.layers[0].mlp)
