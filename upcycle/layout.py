"""Where each tensor of a dense model lies in the mixture: the one mapping that merging, extracting and counting share.

A mixture's tensor is a row of groups laid end to end. A group is an array `[rows, copies, width]`: for each of its
rows (key/value heads, say) one stretch of `width` elements per expert. With `copies == 1` it is the dense layout
itself. The widened attention has the head order (key/value head, expert, query head in the group), so that
grouped-query attention pairs heads rightly by itself; stacked experts are the case `rows == 1`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Final

from upcycle.dense_config import DenseModel
from upcycle.native import IDLE_UNITS, NativeClass
from upcycle.recipe import EXPERTS, Recipe, mixed_layers

GROUPED_BYTES: Final = 16
PREFIX: Final = "dense."  # the BAM model holds the seed's own model as its child `dense`


@dataclass(frozen=True)
class Piece:
    """One role's share of one dense tensor: `rows` blocks of `block` elements, `stride` apart, from element `start`."""

    tensor: str
    role: str
    rows: int
    block: int
    start: int = 0
    stride: int = 0
    scale: float = 1.0  # by which the mixture holds it multiplied
    units: str = ""  # an FFN's inner units are its tensor's "rows" or "columns", where it has some

    def __post_init__(self) -> None:
        object.__setattr__(self, "stride", self.stride or self.block)


@dataclass(frozen=True)
class Group:
    """An array `[rows, copies, width]` in a mixture's tensor, its width made of the pieces' blocks.

    The copies are those of experts `expert`, `expert` + 1, …; without a number there is one, mixed by `mix`, or by what
    the recipe says of the pieces' role.
    """

    pieces: tuple[Piece, ...]
    copies: int = 1
    expert: int | None = None
    mix: str = ""

    @property
    def rows(self) -> int:
        """Rows of the array; all pieces have as many."""
        return self.pieces[0].rows

    @property
    def width(self) -> int:
        """Elements of one expert in one row."""
        return sum(piece.block for piece in self.pieces)

    @property
    def size(self) -> int:
        """Elements in all."""
        return self.rows * self.copies * self.width


@dataclass(frozen=True)
class MixtureTensor:
    """One tensor of the mixture: filled from dense tensors, or a router (no groups), initialised."""

    name: str
    shape: tuple[int, ...]
    groups: tuple[Group, ...] = ()
    router: str = ""  # "ffn", "ffn_bias", "attention" or, of a shared expert that a class must have, "none"
    shared: bool = False  # of a shared expert, which is no seed's
    active: str = "whole"  # "whole", "top_k" (routed experts) or "lookup" (an embedding that multiplies nothing)
    multiplies: bool = False  # whether its weights enter a matrix product

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True)
class Layout:
    """All tensors of a dense model, and of the mixture that a recipe makes of `num_experts` such models."""

    model: DenseModel
    experts: int  # as many as dense models are mixed
    dense: Mapping[str, tuple[int, ...]]
    mixture: tuple[MixtureTensor, ...]
    mixed: tuple[int, ...]
    native: NativeClass | None = None


def make_layout(model: DenseModel, recipe: Recipe, num_experts: int, native: NativeClass | None = None) -> Layout:
    """The layout of a mixture of `num_experts` models, BAM's or a native class's; with a recipe without experts, of a
    dense model.
    """
    builder = _Builder(model, recipe, num_experts, native)
    mixture = tuple(builder.tensors())
    return Layout(model, num_experts, builder.dense, mixture, builder.mixed, native)


def takes_grouped_product(layout: Layout, recipe: Recipe, itemsize: int) -> bool:
    """Whether torch's grouped product, by which transformers computes experts unless it is told otherwise, takes these:
    the rows of its matrices must be whole multiples of 16 bytes.
    """
    sizes = layout.model.sizes
    widths = (sizes.hidden, sizes.inner // recipe.experts.granularity)
    return not recipe.ffn_experts or all(width * itemsize % GROUPED_BYTES == 0 for width in widths)


class _Builder:
    def __init__(self, model: DenseModel, recipe: Recipe, num_experts: int, native: NativeClass | None) -> None:
        self.model, self.family, self.sizes = model, model.family, model.sizes
        self.recipe, self.native = recipe, native
        self.experts = num_experts
        self.mixed = mixed_layers(recipe.layers, model.sizes.layers) if recipe.ffn_experts else ()
        self.mixes = False  # whether the layer that is built is one of these
        self.prefix = PREFIX if recipe.ffn_experts and native is None else ""
        self.dense: dict[str, tuple[int, ...]] = {}

    def tensors(self) -> Iterator[MixtureTensor]:
        family, sizes, tied = self.family, self.sizes, self.model.tied
        table = f"{family.base}.{family.embedding}.weight"
        # A tied embedding is the output head too, so it multiplies.
        yield self.mean(table, (sizes.vocab, sizes.hidden), "embedding", "whole" if tied else "lookup", multiplies=tied)
        for layer in range(sizes.layers):
            at = f"{family.base}.layers.{layer}."
            self.mixes = layer in self.mixed
            yield from self.attention(f"{at}{family.attention}.")
            if self.mixes:
                yield from self.mixture(at)
            else:
                yield from self.ffn(f"{at}mlp.")
            for norm in family.norms:
                yield from self.norm(at + norm)
        yield from self.norm(f"{family.base}.{family.final_norm}")
        if not tied:
            yield self.mean(f"{family.head}.weight", (sizes.vocab, sizes.hidden), "head", multiplies=True)

    def wide(self, role: str) -> bool:
        """Whether a role's tensors hold all experts', in the layer that is built."""
        return self.mixes and self.recipe.mix[role] == EXPERTS

    def group(self, *pieces: Piece) -> Group:
        """All experts' copies of some pieces, or the one that all have."""
        if self.wide(pieces[0].role):
            return Group(pieces, self.experts, 0)
        # What would be experts in another layer is mixed like this one's norms.
        mix = self.recipe.mix["norm"] if self.recipe.mix[pieces[0].role] == EXPERTS else ""
        return Group(pieces, mix=mix)

    def piece(self, tensor: str, shape: tuple[int, ...], role: str, rows: int = 1) -> Piece:
        """A whole dense tensor as one piece of `rows` blocks."""
        self.dense[tensor] = shape
        return Piece(tensor, role, rows, prod(shape) // rows)

    def mean(
        self, name: str, shape: tuple[int, ...], role: str, active: str = "whole", multiplies: bool = False
    ) -> MixtureTensor:
        """A tensor of which the mixture has one, in the dense shape."""
        group = self.group(self.piece(name, shape, role))
        return MixtureTensor(self.prefix + name, shape, (group,), active=active, multiplies=multiplies)

    def norm(self, name: str) -> Iterator[MixtureTensor]:
        for kind in ("weight", "bias") if self.family.norm_bias else ("weight",):
            yield self.mean(f"{name}.{kind}", (self.sizes.hidden,), "norm")

    def router(self, name: str, kind: str, experts: int) -> MixtureTensor:
        return MixtureTensor(self.prefix + name, (experts, self.sizes.hidden), router=kind, multiplies=True)

    def attention(self, at: str) -> Iterator[MixtureTensor]:
        family, sizes = self.family, self.sizes
        for projection, parts in family.qkv.items():
            yield self.projection(f"{at}{projection}.weight", parts, (sizes.hidden,))
            if self.model.flag(family.qkv_bias):
                yield self.projection(f"{at}{projection}.bias", parts, ())
        if family.qk_norm and self.model.flag(family.qk_norm_key or True):
            yield self.qk_norm(f"{at}q_norm", "query")
            yield self.qk_norm(f"{at}k_norm", "key")
        yield from self.output(at)

    def projection(self, name: str, parts: tuple[str, ...], columns: tuple[int, ...]) -> MixtureTensor:
        """Queries, keys or values, or several of them in one matrix; `columns` is empty for a bias."""
        sizes = self.sizes
        heads = sizes.key_value_heads
        block = {part: (sizes.group if part == "query" else 1) * sizes.head_dim * prod(columns) for part in parts}
        shape = (sum(block.values()) * heads // prod(columns), *columns)
        self.dense[name] = shape
        pieces, start = [], 0
        for part in parts:
            if self.family.qkv_by_head:
                pieces.append(Piece(name, f"attention.{part}", heads, block[part], start, sum(block.values())))
                start += block[part]
            else:
                pieces.append(Piece(name, f"attention.{part}", heads, block[part], start))
                start += block[part] * heads
        groups = [self.group(*pieces)] if self.family.qkv_by_head else [self.group(piece) for piece in pieces]
        rows = sum(group.size for group in groups) // prod(columns)
        return MixtureTensor(self.prefix + name, (rows, *columns), tuple(groups), multiplies=bool(columns))

    def output(self, at: str) -> Iterator[MixtureTensor]:
        """The output projection; with attention experts wide, gated, and with the attention's router beside it."""
        family, sizes = self.family, self.sizes
        name, width = f"{at}{family.output}", sizes.heads * sizes.head_dim
        wide = self.wide("attention.output")
        copies = self.experts if wide else 1
        # Each row of the matrix holds its key/value heads' shares of the input, one after another.
        weight = self.piece(
            f"{name}.weight", (sizes.hidden, width), "attention.output", sizes.hidden * sizes.key_value_heads
        )
        wide_name = f"{self.prefix}{name}.linear.weight" if wide else f"{self.prefix}{name}.weight"
        yield MixtureTensor(wide_name, (sizes.hidden, copies * width), (self.group(weight),), multiplies=True)
        if self.model.flag(family.output_bias):
            bias = self.piece(f"{name}.bias", (sizes.hidden,), "attention.output")
            shape = (copies, sizes.hidden) if wide else (sizes.hidden,)
            yield MixtureTensor(f"{self.prefix}{name}.bias", shape, (self.group(bias),))
        if wide:
            yield self.router(f"{name}.router.weight", "attention", self.experts)

    def qk_norm(self, name: str, part: str) -> MixtureTensor:
        sizes, kind, role = self.sizes, self.family.qk_norm, f"attention.{part}"
        wide = self.wide(role)
        copies = self.experts if wide else 1
        heads = sizes.heads if part == "query" else sizes.key_value_heads
        if kind == "heads":
            piece = self.piece(f"{name}.weight", (heads, sizes.head_dim), role, sizes.key_value_heads)
            shape: tuple[int, ...] = (copies * heads, sizes.head_dim)
            return MixtureTensor(f"{self.prefix}{name}.weight", shape, (self.group(piece),))
        width = sizes.head_dim * (heads if kind == "width" else 1)
        group = self.group(self.piece(f"{name}.weight", (width,), role))
        if not wide:
            return MixtureTensor(f"{self.prefix}{name}.weight", (width,), (group,))
        between = {"head": (1,), "head_swapped": (1, 1), "width": ()}[kind or ""]
        return MixtureTensor(f"{self.prefix}{name}.norm.weight", (copies, *between, width), (group,))

    def ffn(self, at: str, name: str = "", mix: str = "", scale: float = 1.0) -> Iterator[MixtureTensor]:
        """A dense FFN: the layer's own, or a shared expert, mixed by `mix`, whose output is scaled."""
        family, sizes = self.family, self.sizes
        inner = 2 * sizes.inner if self.fused else sizes.inner
        for projection, rows, columns in (
            *((projection, inner, sizes.hidden) for projection in family.ffn_in),
            (family.ffn_out, sizes.hidden, sizes.inner),
        ):
            for kind in self.ffn_kinds:
                shape = (rows, columns) if kind == "weight" else (rows,)
                piece = self.piece(f"{at}{projection}.{kind}", shape, "ffn")
                if projection == family.ffn_out:
                    piece = replace(piece, scale=scale)
                group = Group((piece,), mix=mix) if mix else self.group(piece)
                yield MixtureTensor(
                    f"{self.prefix}{at}{name}{projection}.{kind}",
                    shape,
                    (group,),
                    shared=bool(mix),
                    multiplies=kind == "weight",
                )

    @property
    def fused(self) -> bool:
        """Whether the FFN's gate and up are one projection."""
        return self.family.gated and len(self.family.ffn_in) == 1

    @property
    def ffn_kinds(self) -> tuple[str, ...]:
        return ("weight", "bias") if self.model.flag(self.family.ffn_bias) else ("weight",)

    def mixture(self, at: str) -> Iterator[MixtureTensor]:
        """Routed experts, their router, and shared experts, in the place of the FFN."""
        recipe, native = self.recipe, self.native
        count = recipe.ffn_count(self.experts)
        dense, block = f"{at}mlp.", f"{at}{native.block}." if native else f"{at}mlp."
        for kind in self.ffn_kinds:
            if native and len(native.experts) == 3:
                for expert in range(count):
                    yield from self.separate(dense, block, expert, kind)
            else:
                yield from self.stacked(dense, block, kind)
        yield self.router(f"{block}{native.router if native else 'router.weight'}", "ffn", count)
        if recipe.ffn_router.bias:
            yield MixtureTensor(f"{self.prefix}{block}router.bias", (count,), router="ffn_bias")
        if native:
            if native.gated_shared:
                yield from self.gated_shared(dense, block)
            return
        for number, mix in enumerate(recipe.experts.shared):
            scale = recipe.experts.shared_weight / len(recipe.experts.shared)
            yield from self.ffn(dense, f"shared.{number}.", mix, scale)

    def gated_shared(self, dense: str, block: str) -> Iterator[MixtureTensor]:
        """The shared expert of a class that must have one: the recipe's, or all zero, so that it adds nothing.

        It stands behind a sigmoid of its own, whose zero weights give 1/2 for every token.
        """
        hidden, experts = self.sizes.hidden, self.recipe.experts
        for mix in experts.shared:
            yield from self.ffn(dense, "shared_expert.", mix, 2 * experts.shared_weight)
        idle = {"gate_proj": (IDLE_UNITS, hidden), "up_proj": (IDLE_UNITS, hidden), "down_proj": (hidden, IDLE_UNITS)}
        for name, shape in () if experts.shared else idle.items():
            yield MixtureTensor(f"{block}shared_expert.{name}.weight", shape, router="none", multiplies=True)
        yield MixtureTensor(f"{block}shared_expert_gate.weight", (1, hidden), router="none", multiplies=True)

    def into(self, at: str, kind: str, shard: int) -> list[Piece]:
        """A shard's share of the projections into the FFN, gate before up."""
        family, sizes = self.family, self.sizes
        columns = sizes.hidden if kind == "weight" else 1
        share = sizes.inner // self.recipe.experts.granularity * columns
        pieces = []
        for projection in family.ffn_in:
            name, rows = f"{at}{projection}.{kind}", 2 * sizes.inner if self.fused else sizes.inner
            self.dense[name] = (rows, columns) if kind == "weight" else (rows,)
            starts = (0, sizes.inner * columns) if self.fused else (0,)
            pieces += [Piece(name, "ffn", 1, share, start + shard * share, units="rows") for start in starts]
        return pieces

    def out_of(self, at: str, kind: str, shard: int) -> Piece:
        """A shard's share of the projection out of the FFN.

        Of G shards each has 1 / G of their FFN's gate, so its output is G times as large. Each has the whole bias.
        """
        experts, sizes, name = self.recipe.experts, self.sizes, f"{at}{self.family.ffn_out}.{kind}"
        routed = 1 - experts.shared_weight if experts.shared else 1.0
        if kind == "bias":
            return replace(self.piece(name, (sizes.hidden,), "ffn"), scale=routed)
        self.dense[name] = (sizes.hidden, sizes.inner)
        share, shards = sizes.inner // experts.granularity, experts.granularity
        rows, block = (1, sizes.hidden * sizes.inner) if shards == 1 else (sizes.hidden, share)
        stride = 0 if shards == 1 else sizes.inner
        return Piece(name, "ffn", rows, block, shard * share, stride, routed * shards, "columns")

    def stacked(self, dense: str, block: str, kind: str) -> Iterator[MixtureTensor]:
        """All experts in one tensor `[E, 2I, D]` and one `[E, D, I]`."""
        sizes, shards = self.sizes, self.recipe.experts.granularity
        groups, count = self.recipe.ffn_groups(self.experts), self.recipe.ffn_count(self.experts)
        inner = sizes.inner // shards
        names = self.native.experts if self.native else _bam_experts(self.family.gated, kind)
        pieces = [piece for shard in range(shards) for piece in self.into(dense, kind, shard)]
        width = 2 * inner if self.family.gated else inner
        whole = (count, width, sizes.hidden) if kind == "weight" else (count, width)
        yield self.routed(block + names[0], whole, Group(tuple(pieces), groups, 0))
        last = [self.out_of(dense, kind, shard) for shard in range(shards)]
        whole = (count, sizes.hidden, inner) if kind == "weight" else (count, sizes.hidden)
        if last[0].rows == 1:
            yield self.routed(block + names[1], whole, Group(tuple(last), groups, 0))
        else:
            each = [Group((piece,), 1, group) for group in range(groups) for piece in last]
            yield self.routed(block + names[1], whole, *each)

    def separate(self, dense: str, block: str, expert: int, kind: str) -> Iterator[MixtureTensor]:
        """One expert's gate and up `[I, D]` and down `[D, I]`, each a tensor of its own."""
        assert self.native is not None
        group, shard = divmod(expert, self.recipe.experts.granularity)
        inner, hidden = self.sizes.inner // self.recipe.experts.granularity, self.sizes.hidden
        gate, up = self.into(dense, kind, shard)
        shapes = ((inner, hidden), (inner, hidden), (hidden, inner))
        for name, shape, piece in zip(
            self.native.experts, shapes, (gate, up, self.out_of(dense, kind, shard)), strict=True
        ):
            yield self.routed(block + name.format(expert), shape, Group((piece,), 1, group))

    def routed(self, name: str, shape: tuple[int, ...], *groups: Group) -> MixtureTensor:
        return MixtureTensor(self.prefix + name, shape, groups, active="top_k", multiplies=not name.endswith("bias"))


def _bam_experts(gated: bool, kind: str) -> tuple[str, str]:
    suffix = "" if kind == "weight" else "_bias"
    return f"experts.{'gate_up_proj' if gated else 'up_proj'}{suffix}", f"experts.down_proj{suffix}"
