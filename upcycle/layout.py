"""Where each tensor of a dense model lies in the mixture: the one mapping that merging, extracting and counting share.

A mixture's tensor is a row of groups laid end to end. A group is an array `[rows, copies, width]`: for each of its
rows (key/value heads, say) one stretch of `width` elements per expert. With `copies == 1` it is the dense layout
itself. The widened attention has the head order (key/value head, expert, query head in the group), so that
grouped-query attention pairs heads rightly by itself; stacked experts are the case `rows == 1`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Final

from upcycle.dense_config import DenseModel
from upcycle.recipe import Recipe

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

    def __post_init__(self) -> None:
        object.__setattr__(self, "stride", self.stride or self.block)


@dataclass(frozen=True)
class Group:
    """An array `[rows, copies, width]` in a mixture's tensor, its width made of the pieces' blocks."""

    pieces: tuple[Piece, ...]
    copies: int

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
    router: str = ""  # "ffn" or "attention"
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
    dense: Mapping[str, tuple[int, ...]]
    mixture: tuple[MixtureTensor, ...]


def make_layout(model: DenseModel, recipe: Recipe, num_experts: int) -> Layout:
    """The layout of a mixture of `num_experts` models; with a recipe without experts, of a dense model."""
    builder = _Builder(model, recipe, num_experts)
    mixture = tuple(builder.tensors())
    return Layout(model, builder.dense, mixture)


class _Builder:
    def __init__(self, model: DenseModel, recipe: Recipe, num_experts: int) -> None:
        self.model, self.family, self.sizes = model, model.family, model.sizes
        self.recipe = recipe
        self.experts = num_experts
        self.prefix = PREFIX if recipe.ffn_experts else ""
        self.dense: dict[str, tuple[int, ...]] = {}

    def tensors(self) -> Iterator[MixtureTensor]:
        family, sizes, tied = self.family, self.sizes, self.model.tied
        table = f"{family.base}.{family.embedding}.weight"
        # A tied embedding is the output head too, so it multiplies.
        yield self.mean(table, (sizes.vocab, sizes.hidden), "embedding", "whole" if tied else "lookup", multiplies=tied)
        for layer in range(sizes.layers):
            at = f"{family.base}.layers.{layer}."
            yield from self.attention(f"{at}{family.attention}.")
            yield from self.ffn(f"{at}mlp.")
            for norm in family.norms:
                yield from self.norm(at + norm)
        yield from self.norm(f"{family.base}.{family.final_norm}")
        if not tied:
            yield self.mean(f"{family.head}.weight", (sizes.vocab, sizes.hidden), "head", multiplies=True)

    def copies(self, role: str) -> int:
        return self.experts if self.recipe.mix[role] == "experts" else 1

    def piece(self, tensor: str, shape: tuple[int, ...], role: str, rows: int = 1) -> Piece:
        """A whole dense tensor as one piece of `rows` blocks."""
        self.dense[tensor] = shape
        return Piece(tensor, role, rows, prod(shape) // rows)

    def mean(
        self, name: str, shape: tuple[int, ...], role: str, active: str = "whole", multiplies: bool = False
    ) -> MixtureTensor:
        """A tensor of which the mixture has one, in the dense shape."""
        group = Group((self.piece(name, shape, role),), 1)
        return MixtureTensor(self.prefix + name, shape, (group,), active=active, multiplies=multiplies)

    def norm(self, name: str) -> Iterator[MixtureTensor]:
        for kind in ("weight", "bias") if self.family.norm_bias else ("weight",):
            yield self.mean(f"{name}.{kind}", (self.sizes.hidden,), "norm")

    def router(self, name: str, kind: str) -> MixtureTensor:
        shape = (self.experts, self.sizes.hidden)
        return MixtureTensor(self.prefix + name, shape, router=kind, multiplies=True)

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
        if self.family.qkv_by_head:
            groups = [Group(tuple(pieces), self.copies(pieces[0].role))]
        else:
            groups = [Group((piece,), self.copies(piece.role)) for piece in pieces]
        rows = sum(group.size for group in groups) // prod(columns)
        return MixtureTensor(self.prefix + name, (rows, *columns), tuple(groups), multiplies=bool(columns))

    def output(self, at: str) -> Iterator[MixtureTensor]:
        """The output projection; with attention experts wide, gated, and with the attention's router beside it."""
        family, sizes = self.family, self.sizes
        name, width = f"{at}{family.output}", sizes.heads * sizes.head_dim
        copies = self.copies("attention.output")
        wide = self.recipe.attention_experts
        # Each row of the matrix holds its key/value heads' shares of the input, one after another.
        weight = self.piece(
            f"{name}.weight", (sizes.hidden, width), "attention.output", sizes.hidden * sizes.key_value_heads
        )
        wide_name = f"{self.prefix}{name}.linear.weight" if wide else f"{self.prefix}{name}.weight"
        yield MixtureTensor(wide_name, (sizes.hidden, copies * width), (Group((weight,), copies),), multiplies=True)
        if self.model.flag(family.output_bias):
            bias = self.piece(f"{name}.bias", (sizes.hidden,), "attention.output")
            shape = (copies, sizes.hidden) if wide else (sizes.hidden,)
            yield MixtureTensor(f"{self.prefix}{name}.bias", shape, (Group((bias,), copies),))
        if wide:
            yield self.router(f"{name}.router.weight", "attention")

    def qk_norm(self, name: str, part: str) -> MixtureTensor:
        sizes, kind, role = self.sizes, self.family.qk_norm, f"attention.{part}"
        copies = self.copies(role)
        wide = self.recipe.mix[role] == "experts"
        heads = sizes.heads if part == "query" else sizes.key_value_heads
        if kind == "heads":
            piece = self.piece(f"{name}.weight", (heads, sizes.head_dim), role, sizes.key_value_heads)
            shape: tuple[int, ...] = (copies * heads, sizes.head_dim)
            return MixtureTensor(f"{self.prefix}{name}.weight", shape, (Group((piece,), copies),))
        width = sizes.head_dim * (heads if kind == "width" else 1)
        group = Group((self.piece(f"{name}.weight", (width,), role),), copies)
        if not wide:
            return MixtureTensor(f"{self.prefix}{name}.weight", (width,), (group,))
        between = {"head": (1,), "head_swapped": (1, 1), "width": ()}[kind or ""]
        return MixtureTensor(f"{self.prefix}{name}.norm.weight", (copies, *between, width), (group,))

    def ffn(self, at: str) -> Iterator[MixtureTensor]:
        family, sizes = self.family, self.sizes
        inner = 2 * sizes.inner if len(family.ffn_in) == 1 and family.gated else sizes.inner
        total = inner * len(family.ffn_in)
        wide_in = "gate_up_proj" if family.gated else "up_proj"
        projections = (
            (wide_in, total, sizes.hidden, family.ffn_in, inner),
            ("down_proj", sizes.hidden, sizes.inner, (family.ffn_out,), sizes.hidden),
        )
        kinds = ("weight", "bias") if self.model.flag(family.ffn_bias) else ("weight",)
        for wide, rows, columns, names, dense_rows in projections:
            for kind in kinds:
                shape = (dense_rows, columns) if kind == "weight" else (dense_rows,)
                if not self.recipe.ffn_experts:
                    for name in names:
                        yield self.mean(f"{at}{name}.{kind}", shape, "ffn", multiplies=kind == "weight")
                    continue
                pieces = tuple(self.piece(f"{at}{name}.{kind}", shape, "ffn") for name in names)
                full = (self.experts, rows, columns) if kind == "weight" else (self.experts, rows)
                name = f"{self.prefix}{at}experts.{wide}" + ("" if kind == "weight" else "_bias")
                yield MixtureTensor(
                    name, full, (Group(pieces, self.experts),), active="top_k", multiplies=kind == "weight"
                )
        if self.recipe.ffn_experts:
            yield self.router(f"{at}router.weight", "ffn")
