"""The fused kernels on one CUDA card against what else computes the same, in one run of about two minutes.

    python benchmarks/fused_kernels.py --out kernels.json
    python benchmarks/fused_kernels.py --smoke             # tiny, on a CPU: shows that the script runs

Routed FFN experts by every backend of `upcycle train --experts-backend`, by ScatterMoE and by a sorted loop of cuBLAS
products; the attention mixture's gates, fused and plain; the widened attention against a loop over its experts. All
forward, and forward with backward, in bf16 with random weights and tokens. A time is the median of rounds in each of
which all sides run, in drawn order, with the L2 flushed before every call; ratios are medians of the rounds' ratios.
Each side's output and gradients of its inputs are compared with the loop's, so that none is fast by being wrong.

The sorted loop is given its split sizes: reading them would make the host wait, as the mixture's own loop ("eager")
does. That is its best case.
"""

from collections.abc import Callable, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import card
import torch
from card import Side
from torch import nn
from torch.nn import functional

from upcycle.backends import BACKENDS, choose_backend, use_backend
from upcycle.kernels import reference
from upcycle.modeling.modeling_bam import BamExperts

SECONDS = 165.0
TOP_K = 2
BF16 = torch.bfloat16
Inputs = Mapping[str, torch.Tensor]
# Hidden, query heads, key/value heads, head_dim of the paper's two models (arXiv:2408.08274), of which four are mixed.
FULL = SimpleNamespace(
    experts=(4, 8),
    ffn=(2048, 8192),
    tokens=(8192, 16384, 32768),
    attentions={"small": (1024, 8, 8, 128), "large": (2304, 18, 6, 128)},
    sequences=(4, 2048),
    plan=SimpleNamespace(rounds=5, repeat=5, limit=30.0),
)
SMOKE = SimpleNamespace(
    experts=(4,),
    ffn=(64, 96),
    tokens=(32, 64),
    attentions={"small": (64, 4, 4, 16), "large": (96, 6, 2, 16)},
    sequences=(2, 16),
    plan=SimpleNamespace(rounds=2, repeat=2, limit=75.0),
)


class Mixture(nn.Module):
    """One layer of experts, as much of a model as the choice of a backend needs."""

    def __init__(self, experts: int, hidden: int, inner: int, device: torch.device) -> None:
        super().__init__()
        dense = SimpleNamespace(hidden_size=hidden, intermediate_size=inner, hidden_act="silu")
        config: Any = SimpleNamespace(
            num_experts=experts, granularity=1, dense_config=dense, _experts_implementation="eager"
        )
        with torch.device(device):
            self.stack: Any = BamExperts(config, gated=True, bias=False).to(BF16)
        self.stack.has_gate, self.stack.has_bias = True, False
        for parameter in self.stack.parameters():
            nn.init.normal_(parameter, std=0.02)
        self.layers = nn.ModuleList([self.stack])

    def set_experts_implementation(self, name: str) -> None:
        self.stack.config._experts_implementation = name


def backend_side(mixture: Mixture, name: str, inputs: Inputs) -> Side:
    """One of `upcycle.backends`."""
    backend = choose_backend(mixture, name, len(inputs["hidden"]), TOP_K, BF16, True)
    assert backend is not None
    use_backend(mixture, backend)
    stack, implementation = mixture.stack, mixture.stack.config._experts_implementation

    def call() -> torch.Tensor:
        stack.config._experts_implementation = implementation
        return stack(inputs["hidden"], inputs["index"], inputs["gates"])

    return Side(call, [inputs["hidden"], inputs["gates"], *stack.parameters()])


class _ByExpert(torch.autograd.Function):
    """Tokens `[T, D]` to slots sorted by expert `[M, D]`; the gradient is gathered, not added by atomics."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, order: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(place)
        return hidden.index_select(0, order // TOP_K)

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return outer[0].index_select(0, ctx.saved_tensors[0]).unflatten(0, (-1, TOP_K)).sum(1), None, None


class _ByToken(torch.autograd.Function):
    """Sorted slots `[M, D]` back into the order of tokens."""

    @staticmethod
    def forward(ctx: Any, slots: torch.Tensor, order: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(order)
        return slots.index_select(0, place)

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return outer[0].index_select(0, ctx.saved_tensors[0]), None, None


def sorted_loop(mixture: Mixture, inputs: Inputs) -> Side:
    """Sort once, then a cuBLAS product for each expert and matrix; the host knows how many rows each has."""
    stack, index = mixture.stack, inputs["index"]
    sizes = index.flatten().bincount(minlength=stack.num_experts).tolist()

    def call() -> torch.Tensor:
        order = index.flatten().to(torch.int16).sort(stable=True).indices
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        slots = []
        rows = _ByExpert.apply(inputs["hidden"], order, place).split(sizes)
        # Unbound, not indexed: the gradient of an index is as large as the whole stack.
        for part, wide_in, down in zip(rows, stack.gate_up_proj.unbind(), stack.down_proj.unbind(), strict=True):
            gate, up = functional.linear(part, wide_in).chunk(2, dim=-1)
            slots.append(functional.linear(functional.silu(gate) * up, down))
        by_token = _ByToken.apply(torch.cat(slots), order, place).unflatten(0, index.shape)
        return (by_token * inputs["gates"][..., None]).sum(1)

    return Side(call, [inputs["hidden"], inputs["gates"], *stack.parameters()])


def scattermoe(mixture: Mixture, inputs: Inputs) -> Side:
    """ScatterMoE's gated experts with the same weights; it has the gate's rows last."""
    from scattermoe.mlp import GLUMLP

    experts, hidden, inner = mixture.stack.down_proj.shape
    with torch.device(mixture.stack.down_proj.device):
        own = GLUMLP(hidden, inner, experts, TOP_K).to(BF16)
    with torch.no_grad():
        own.experts.weight.copy_(torch.cat(mixture.stack.gate_up_proj.chunk(2, dim=1)[::-1], dim=1))
        own.output_experts.weight.copy_(mixture.stack.down_proj)
    call = partial(own, inputs["hidden"], inputs["gates"], inputs["index"])
    return Side(call, [inputs["hidden"], inputs["gates"], *own.parameters()])


def ffn(clock: card.Clock, sizes: SimpleNamespace, experts: int, tokens: int) -> list[dict[str, Any]]:
    """Every backend for one shape. The routing is uneven: random logits, of which some experts' are larger."""
    hidden, inner = sizes.ffn
    mixture, draw = Mixture(experts, hidden, inner, clock.device), partial(torch.randn, device=clock.device)
    logits = draw(tokens, experts) + torch.linspace(-0.5, 0.5, experts, device=clock.device)
    gates, index = logits.softmax(-1).topk(TOP_K, dim=-1)
    inputs = {"hidden": draw(tokens, hidden).to(BF16).requires_grad_(), "index": index}
    inputs["gates"] = gates.to(BF16).requires_grad_()
    makers: dict[str, Callable[[], Side]] = {"sorted_loop": partial(sorted_loop, mixture, inputs)}
    makers |= {name: partial(backend_side, mixture, name, inputs) for name in BACKENDS if name != "auto"}
    makers["scattermoe"] = partial(scattermoe, mixture, inputs)
    rows = card.compare(clock, makers, draw(tokens, hidden).to(BF16), sizes.plan)
    load = float(index.flatten().bincount().max()) / index.numel()
    flops = 6 * hidden * inner * TOP_K * tokens
    return [{"experts": experts, "tokens": tokens, "largest_load": load, "flops": flops, **row} for row in rows]


def gates(clock: card.Clock, sizes: SimpleNamespace, model: str) -> list[dict[str, Any]]:
    """The gates of four attention experts on their heads."""
    _, heads, key_value_heads, head_dim = sizes.attentions[model]
    draw = partial(torch.randn, *sizes.sequences, device=clock.device)
    values, gradient = (draw(4 * heads * head_dim).to(BF16) for _ in range(2))
    leaves = [values.requires_grad_(), draw(4).softmax(-1).to(BF16).requires_grad_()]

    def fused() -> Side:
        from upcycle.kernels.heads import gate_heads

        return Side(lambda: gate_heads(*leaves, key_value_heads), leaves)

    makers = {"plain": lambda: Side(lambda: reference.gate_heads(*leaves, key_value_heads), leaves), "fused": fused}
    rows = card.compare(clock, makers, gradient, sizes.plan)
    size = values.numel() * values.itemsize  # read and written; in the backward two are read and one is written
    return [{"model": model, "bytes": (2 if row["what"] == "forward" else 5) * size, **row} for row in rows]


class Attentions:
    """Four attention experts: wide, as in `BamForCausalLM`, and one by one. Without positions, the same in both."""

    def __init__(self, clock: card.Clock, sizes: SimpleNamespace, model: str, shared: bool) -> None:
        hidden, heads, self.kv, self.dim = sizes.attentions[model]
        self.group, copies = heads // self.kv, 1 if shared else 4
        draw = partial(torch.randn, device=clock.device)
        self.tokens = draw(*sizes.sequences, hidden).to(BF16).requires_grad_()
        self.gates = draw(*sizes.sequences, 4).softmax(-1).to(BF16).requires_grad_()
        self.gradient = draw(*sizes.sequences, hidden).to(BF16)
        # (key/value head, expert, rows of a head or of its group, hidden); the output's axes likewise.
        query = 0.02 * draw(self.kv, 4, self.group * self.dim, hidden)
        key, value = (0.02 * draw(self.kv, copies, self.dim, hidden) for _ in range(2))
        output = 0.02 * draw(self.kv, 4, self.group * self.dim, hidden)
        self.matrices = [matrix.to(BF16) for matrix in (query, key, value, output)]
        multiplied = 2 * query.numel() + 2 * key.numel()
        batch, length = sizes.sequences
        self.flops = 2 * batch * length * (multiplied + 4 * heads * self.dim * length)

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        states = [x.unflatten(-1, (-1, self.dim)).transpose(1, 2) for x in (query, key, value)]
        grouped = states[0].shape[1] != states[1].shape[1]
        heads = functional.scaled_dot_product_attention(*states, is_causal=True, enable_gqa=grouped)
        return heads.transpose(1, 2).flatten(-2)

    def wide(self, fused: bool) -> Side:
        scale = reference.gate_heads
        if fused:
            from upcycle.kernels.heads import gate_heads as scale

        *inward, output = (matrix.flatten(0, 2).detach() for matrix in self.matrices)
        weights = [weight.requires_grad_() for weight in (*inward, output.T.contiguous())]

        def call() -> torch.Tensor:
            mixed = self.attend(*(functional.linear(self.tokens, weight) for weight in weights[:3]))
            return functional.linear(scale(mixed, self.gates, self.kv), weights[3])

        return Side(call, [self.tokens, self.gates, *weights])

    def loop(self) -> Side:
        weights = [
            [matrix[:, expert].flatten(0, 1).clone().requires_grad_() for expert in range(matrix.shape[1])]
            for matrix in self.matrices
        ]

        def call() -> torch.Tensor:
            keys, values = ([functional.linear(self.tokens, weight) for weight in each] for each in weights[1:3])
            total: Any = 0
            for expert, (query, output) in enumerate(zip(weights[0], weights[3], strict=True)):
                chosen = expert % len(keys)
                heads = self.attend(functional.linear(self.tokens, query), keys[chosen], values[chosen])
                total = total + self.gates[..., expert, None] * (heads @ output)
            return total

        return Side(call, [self.tokens, self.gates, *(weight for each in weights for weight in each)])


def attention(clock: card.Clock, sizes: SimpleNamespace, model: str, shared: bool) -> list[dict[str, Any]]:
    """The widened attention and a loop over its experts."""
    experts = Attentions(clock, sizes, model, shared)
    makers = {"loop": experts.loop, "plain": partial(experts.wide, False), "fused": partial(experts.wide, True)}
    rows = card.compare(clock, makers, experts.gradient, sizes.plan)
    name = f"{model}, shared K/V" if shared else model
    return [{"model": name, "flops": experts.flops, **row} for row in rows]


def goals(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the kernels aim at on one H100, forward and backward, and what was measured."""
    rows = [row for row in results["ffn"] if row["what"] == "forward+backward"]
    peaks = {(row["experts"], row["tokens"]): row for row in rows if row["backend"] == "grouped_mm"}

    def of(backend: str, key: str) -> dict[str, float | None]:
        return {f"{r['experts']} × {r['tokens']}": r.get(key) for r in rows if r["backend"] == backend}

    found = [card.goal("FFN experts by the fused kernels ≥ 500 TFLOP/s", of("fused", "tflops"), least=500)]
    for backend, least in (("grouped_mm", 1.15), ("liger", 1.3), ("scattermoe", 1.3), ("sorted_loop", 1.0)):
        found.append(card.goal(f"fused ≥ {least} × {backend}", of(backend, "fused_is_faster_by"), least=least))
    ratios = {}
    for row in rows:
        peak = peaks.get((row["experts"], row["tokens"]), {}).get("peak_mib")
        if row["backend"] == "fused" and peak and row.get("peak_mib"):
            ratios[f"{row['experts']} × {row['tokens']}"] = row["peak_mib"] / peak
    found.append(card.goal("peak memory of fused ≤ 0.7 × grouped_mm's", ratios, most=0.7))
    wide = [row for row in results["attention"] if (row["what"], row["backend"]) == ("forward+backward", "loop")]
    over = {row["model"]: row.get("fused_is_faster_by") for row in wide}
    return [*found, card.goal("widened attention ≥ 1.3 × the loop over experts", over, least=1.3)]


def main() -> None:
    options, device = card.options(__doc__, SECONDS)
    sizes, clock, budget = SMOKE if options.smoke else FULL, card.Clock(device), card.Budget(options.seconds)
    torch.manual_seed(0)
    results: dict[str, Any] = {"facts": card.facts(device), "ceilings": card.ceilings(clock)}
    results |= {"ffn": [], "gates": [], "attention": [], "goals": [], "dropped": budget.dropped}
    parts: list[tuple[str, str, float, Callable[[], Any]]] = []
    for model in sizes.attentions:
        parts.append(("gates", model, 10, partial(gates, clock, sizes, model)))
        parts += [("attention", model, 15, partial(attention, clock, sizes, model, shared)) for shared in (False, True)]
    for tokens in sizes.tokens:  # the largest last: they are what the budget may drop
        for experts in sizes.experts:
            what, seconds = f"{experts} experts, {tokens} tokens", 10 + tokens / 1024
            parts.append(("ffn", what, seconds, partial(ffn, clock, sizes, experts, tokens)))
    for section, what, seconds, part in parts:
        if budget.allows(f"{section} {what}", seconds):
            print(f"{budget.left():.0f} s left: {section} {what}", flush=True)
            rows, failure = card.attempt(part, budget.left())
            results[section] += card.rated(
                rows or [{"what": what, "backend": "all", "failure": failure}], results["ceilings"]
            )
            results["goals"] = goals(results)
            card.write(options.out, results)
            card.release()
    card.write(options.out, results)
    print(card.tables(results))


if __name__ == "__main__":
    main()
