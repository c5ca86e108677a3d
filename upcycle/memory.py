"""What training takes of one device's memory, told before it starts. Counted from layouts, so no weights are needed.

What autograd keeps is counted product by product, from modeling_bam.py, the families' own code and transformers' `sdpa`
attention and `grouped_mm` experts; the tests compare it with what autograd and whole processes really take. Weights and
loss are fp32; "bf16" is torch.autocast (norms and the stream between blocks stay fp32), or under FSDP2 everything. Not
counted: the framework itself, fragmentation, communication buffers, adapters' activations, unfused attention's scores
but Gemma 2's.
"""

from collections import defaultdict
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from math import ceil, prod
from typing import Final

from upcycle.layout import Layout, MixtureTensor
from upcycle.recipe import MEAN, Recipe

FP32: Final = 4  # bytes
BF16: Final = 2
OUT_OF_EXPERTS: Final = ("down_proj", ".w2.", "output_linear")  # the classes' names
INDEX: Final = 8
# Bytes on the device of one parameter's two moments; 8-bit ones have an fp32 scale a block of 256 (arXiv:2110.02861).
MOMENTS: Final = {"adamw": Fraction(8), "adamw-8bit": 2 * (1 + Fraction(FP32, 256)), "adamw-offload": Fraction(0)}
LAYER: Final = ("projections", "output", "ffn_in", "ffn_out")
Pair = tuple[int, int]  # bytes a token: what the forward keeps, and what the backward needs besides


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes that a training step takes on one device.

    `overlap` is how much of gradients and activations is never there at once, since a layer's activations go as its
    gradients come; it is 0 where gradients outlive a step, as in accumulation.
    """

    weights: int  # in fp32, adapters included
    gradients: int  # all of them, in fp32
    optimizer: int  # the moments
    activations: int  # at their most: what the forward keeps and what the backward needs besides
    overlap: int = 0

    @property
    def total(self) -> int:
        """The peak."""
        return self.weights + self.gradients + self.optimizer + self.activations - self.overlap


@dataclass(frozen=True)
class Stage:
    """A stretch of the forward, in bytes: what autograd keeps of it, what its backward needs besides, its gradients."""

    saved: int
    transient: int = 0
    gradients: int = 0


def training_memory(
    layout: Layout,
    recipe: Recipe,
    *,
    sequences: int,
    sequence_length: int,
    precision: str,
    optimizer: str = "adamw",
    trained: str = "all",
    lora_rank: int = 0,
    activation_checkpointing: bool = False,
    loss_head: bool = False,
    shards: int = 1,
) -> TrainingMemory:
    """Memory of training a mixture, or with a recipe without experts a dense model.

    Args:
        sequences: in one forward, each of `sequence_length` tokens.
        precision: "fp32" or "bf16".
        optimizer: "adamw"; "adamw-8bit": 8-bit moments; "adamw-offload": moments and the update on the host.
        trained: "all", "experts" (FFN experts, shared ones too, attention where it is a mixture, routers) or "routers".
        lora_rank: of adapters on all matrices of the layers; beside them the routers alone are trained. Those of
            stacked experts are added to a copy of the weights, which counts as an activation.
        activation_checkpointing: a layer keeps its input alone and runs again in the backward.
        loss_head: the loss makes its logits piece by piece (`liger.LossHead`), and its gradients in the forward.
        shards: devices over which FSDP2 shards all but activations. One layer at a time is whole, in weights and
            gradients; prefetching would add another's weights.
    """
    if precision not in ("fp32", "bf16") or optimizer not in MOMENTS or trained not in ("all", "experts", "routers"):
        raise ValueError(f"precision {precision!r}, optimizer {optimizer!r} or trained {trained!r} is unknown")
    width = BF16 if precision == "bf16" else FP32
    wide = width if shards > 1 else FP32
    counter = Counter(layout, recipe, sequence_length, width, wide, trained, lora_rank, shards)
    stages = counter.stages(sequences * sequence_length, activation_checkpointing, loss_head)
    weights = sum(held(tensor, tensor.size + counter.adapters(tensor), shards) for tensor in layout.mixture)
    parameters = sum(held(tensor, counter.trained(tensor), shards) for tensor in layout.mixture)
    whole, whole_trained = counter.largest_group() if shards > 1 else (0, 0)
    activations = _peak(stages, count_gradients=False)
    return TrainingMemory(
        weights=FP32 * weights + width * whole,
        gradients=FP32 * parameters + width * whole_trained,
        optimizer=ceil(parameters * MOMENTS[optimizer]),
        activations=activations,
        overlap=FP32 * parameters + activations - _peak(stages, count_gradients=True),
    )


def held(tensor: MixtureTensor, count: int, shards: int) -> int:
    """What one device has of so many numbers of a tensor: stacks are cut by rows where that is even, else axis 0."""
    length = tensor.shape[1] if len(tensor.shape) == 3 and tensor.shape[1] % shards == 0 else tensor.shape[0]
    return ceil(Fraction(count * ceil(length / shards), length))


def is_router(tensor: MixtureTensor) -> bool:
    """Whether it chooses experts; a shared expert that a class must have starts as a router does, but chooses none."""
    return tensor.router not in ("", "none")


def _peak(stages: list[Stage], count_gradients: bool) -> int:
    """Most bytes in the backward: what is kept up to a stage, its needs, and the gradients so far, where counted."""
    saved, gradients, peak = sum(stage.saved for stage in stages), 0, 0
    for stage in reversed(stages):
        gradients += stage.gradients * count_gradients
        peak = max(peak, saved + stage.transient + gradients)
        saved -= stage.saved
    return peak


@dataclass(frozen=True)
class Counter:
    """Counts stages. A product keeps its input for the gradient of its weight alone, so not where that is frozen."""

    layout: Layout
    recipe: Recipe
    length: int
    width: int  # bytes of a number that a product computes
    wide: int  # of one that autocast leaves in fp32: in the stream between blocks and in norms
    choice: str
    rank: int
    shards: int
    shown: int | None = None  # the layer whose tensors are counted, not the first with experts

    @cached_property
    def tensors(self) -> dict[str, list[MixtureTensor]]:
        """The tensors of each stage; of the layers those of one."""
        family, places = self.layout.model.family, defaultdict(list)
        layer = next(iter(self.layout.mixed), 0) if self.shown is None else self.shown
        block = self.layout.native.block if self.layout.native else "mlp"
        for tensor in self.layout.mixture:
            _, inside, at = tensor.name.partition(f"{family.base}.layers.")
            if not inside:  # a tied embedding is the output head
                places["embedding" if tensor.active == "lookup" else "head"].append(tensor)
            elif at.startswith(f"{layer}.{family.attention}."):
                places["output" if f"{family.attention}.{family.output}." in at else "projections"].append(tensor)
            elif at.startswith((f"{layer}.mlp.", f"{layer}.{block}.")):
                last = any(name in at for name in (family.ffn_out, *OUT_OF_EXPERTS))
                places["ffn_out" if last else "ffn_in"].append(tensor)
            elif at.startswith(f"{layer}."):
                places["norms"].append(tensor)
        return places

    def adapters(self, tensor: MixtureTensor) -> int:
        """Parameters of two thin matrices for each matrix of a layer."""
        if is_router(tensor) or not tensor.multiplies or ".layers." not in tensor.name:
            return 0
        return self.rank * sum(tensor.shape[-2:]) * (tensor.size // prod(tensor.shape[-2:]))

    def trained(self, tensor: MixtureTensor) -> int:
        """Trained parameters of a tensor, or of its adapters."""
        if self.rank and not is_router(tensor):
            return self.adapters(tensor)
        chosen = self.choice == "all" or (self.choice == "experts" and self.of_experts(tensor))
        return tensor.size if is_router(tensor) or chosen else 0

    def of_experts(self, tensor: MixtureTensor) -> bool:
        """Whether it is a routed or shared expert's, or of the attention of a layer whose attention is a mixture."""
        if tensor.active == "top_k" or tensor.shared or tensor.router:
            return True
        _, inside, at = tensor.name.partition(f"{self.layout.model.family.base}.layers.")
        mixed = inside and int(at.partition(".")[0]) in self.layout.mixed
        return bool(mixed and self.recipe.attention_experts and f".{self.layout.model.family.attention}." in at)

    def largest_group(self) -> tuple[int, int]:
        """Parameters and trained ones of the largest group that FSDP2 has whole at once: a layer, or all the rest."""
        places = ("norms", *LAYER), ("embedding", "head")
        groups = [[tensor for place in group for tensor in self.tensors[place]] for group in places]
        sizes = (sum(tensor.size + self.adapters(tensor) for tensor in group) for group in groups)
        return max(sizes), max(sum(self.trained(tensor) for tensor in group) for group in groups)

    def learns(self, place: str) -> bool:
        return any(self.trained(tensor) for tensor in self.tensors[place] if not is_router(tensor))

    @cached_property
    def unmixed(self) -> "Counter":
        """The counter of the layers without experts, where there are some beside those with experts."""
        layers = sorted({*range(self.layout.model.sizes.layers)} - {*self.layout.mixed})
        dense = replace(self.recipe, mix=dict.fromkeys(self.recipe.mix, MEAN))
        return replace(self, recipe=dense, shown=layers[0])

    def stage(self, place: str, tokens: int, saved: int, transient: int) -> Stage:
        """A stage from its bytes a token, and of weights where copies are kept: cast, or with adapters added."""
        tensors, autocast = self.tensors[place], self.wide > self.width
        copies = sum(self.width * t.size for t in tensors if t.multiplies and autocast)
        added = sum(FP32 * t.size for t in tensors if t.active == "top_k" and self.adapters(t))
        gradients = FP32 * sum(held(tensor, self.trained(tensor), self.shards) for tensor in tensors)
        return Stage(tokens * saved + copies + added, tokens * transient + added, gradients)

    def stages(self, tokens: int, checkpointing: bool, loss_head: bool = False) -> list[Stage]:
        """The forward's stages in their order; the last is the loss, which makes the logits' gradient beside them."""
        sizes, values = self.layout.model.sizes, self.layout.model.values
        vocab, tied = FP32 * sizes.vocab, self.layout.model.tied and self.learns("head")  # tied: two gradients, added
        stages = [replace(self.stage("embedding", tokens, INDEX, 0), transient=tied * vocab * sizes.hidden)]
        kinds = (values.get("layer_types") or ["sliding_attention"] * sizes.layers)[: sizes.layers]
        for number, kind in enumerate(kinds):
            masked = kind == "sliding_attention" and self.length > (values.get("sliding_window") or self.length)
            counter = self if number in self.layout.mixed or not self.layout.mixed else self.unmixed
            pairs = (*counter.attention(masked), *counter.ffn())
            layer = [counter.stage(place, tokens, *pair) for place, pair in zip(LAYER, pairs, strict=True)]
            if checkpointing:
                gradients = sum(stage.gradients for stage in layer)
                layer = [Stage(tokens * self.wide * sizes.hidden, _peak(layer, True) - gradients, gradients)]
            stages += layer
        capped = self.width * sizes.vocab * bool(values.get("final_logit_softcapping"))
        head = self.norm(self.learns("norms")) + self.read(self.learns("head")) + capped
        if loss_head and not capped:
            made = self.width * sizes.hidden
            last = self.stage("head", tokens, head + made, made)
            return [*stages, replace(last, saved=last.saved + vocab * sizes.hidden * self.learns("head"))]
        stages.append(self.stage("head", tokens, head, vocab + self.width % FP32 * sizes.vocab))  # % FP32: of a cast
        return [*stages, Stage(tokens * vocab, tokens * vocab)]

    def norm(self, learns: bool) -> int:
        """Torch's layer norm keeps its input; the families' own norms compute in fp32 and keep what they scale, too."""
        family, name = self.layout.model.family, self.layout.model.family.architecture
        inputs = FP32 * (2 if name.startswith("Cohere") else 1)  # Cohere's centres twice
        late = name.startswith(("Cohere", "Gemma", "Olmo2"))  # cast after the weight, others before
        kept = self.wide if family.norm_bias else inputs + (FP32 if late else self.wide) * learns
        return kept * self.layout.model.sizes.hidden

    def read(self, readers: int) -> int:
        """A hidden state that so many products keep: one for all, under autocast a copy for each."""
        return self.width * self.layout.model.sizes.hidden * min(readers, readers if self.wide > self.width else 1)

    def attention(self, masked: bool) -> tuple[Pair, Pair]:
        """Norms and projections; the attention itself with its output. `masked`: by a window shorter than the text."""
        model, family, sizes, recipe = self.layout.model, self.layout.model.family, self.layout.model.sizes, self.recipe
        experts, width = self.layout.experts if recipe.attention_experts else 1, self.width
        heads, query = experts * sizes.heads, experts * sizes.heads * sizes.head_dim
        key_value = (1 if recipe.shared_key_value else experts) * sizes.key_value_heads * sizes.head_dim
        norms = 1 if model.values.get("use_parallel_residual") else len(family.norms)  # there both read the same
        first = norms * self.norm(self.learns("norms"))
        first += self.read(len(family.qkv) * self.learns("projections") + recipe.attention_experts)
        if family.qk_norm and model.flag(family.qk_norm_key or True):
            first += self.norm(self.learns("projections")) // sizes.hidden * (query + key_value)
        rotation = self.wide * 4 * query + width * 2 * key_value  # keeps nothing, but copies queries in its backward
        capped = bool(model.values.get("attn_logit_softcapping"))
        scores = capped * heads * self.length * (width + FP32 + width % FP32)  # tanh, softmax and its cast
        fused = (len(family.qkv) == 1) * width * (query + key_value)  # the values are a view of all three
        if (scores or masked) and key_value < query:
            key_value, fused = query, 0  # repeated for every query head
        second = width * (2 * query + 2 * key_value) + fused + scores + FP32 * heads  # with the output and its sums
        partial = model.values["rope"].get("partial_rotary_factor", 1) != 1  # then the output is kept in two orders
        second += width * query * (partial and (experts > 1 or self.learns("output")))
        needs = 2 * width * (query + key_value)
        if experts > 1:  # gated output and gates; the former is free before the gates' and the attention's gradients
            second += self.learns("output") * width * query + 3 * FP32 * experts
            needs = width * max(2 * query, query + 2 * key_value)
        return (first, rotation), (second, needs + scores)

    def ffn(self) -> tuple[Pair, Pair]:
        """What the first products read, and routing and gather; activation and second product, and what is gated."""
        sizes, family, routed = self.layout.model.sizes, self.layout.model.family, self.recipe.ffn_experts
        first = self.read(1 if routed else len(family.ffn_in) * self.learns("ffn_in"))
        if len(family.norms) == 1 and self.wide == self.width:  # side by side, both halves of a block read the same
            first *= not (self.recipe.attention_experts or self.learns("projections"))
        inner, gathered, top_k = self.width * sizes.inner, 0, self.recipe.ffn_active
        if routed:
            whole = self.recipe.ffn_router.top_k + len(self.recipe.experts.shared)  # FFNs that a token uses
            inner, gathered = self.width * whole * sizes.inner, self.width * top_k * sizes.hidden
            first += 3 * FP32 * self.recipe.ffn_count(self.layout.experts)
            first += top_k * (4 * INDEX + FP32) + self.learns("ffn_in") * gathered
        # The second product's input is free before the activation makes one gradient, or with a gate two.
        kept, made = (3, 2) if family.gated else (1, 1)
        second = (kept + self.learns("ffn_out")) * inner + gathered
        return (first, made * inner + gathered), (second, made * inner)
