"""Which sources each tensor of a mixture is made of: a recipe's ways to mix, over a layout."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from upcycle.errors import RecipeError, SeedError
from upcycle.layout import Group, Layout, MixtureTensor, Piece
from upcycle.planned import Constant, Part, Perturbation, PlannedGroup, PlannedTensor, RandomInit, Source
from upcycle.recipe import ANCESTOR, EQUAL, FROM_TEXT, MEAN, SEED_PREFIX, USAGE, WEIGHTED, Recipe
from upcycle.seeds import Seed
from upcycle.vocabulary import TABLES, Alignment


class Planner:
    """Says of every tensor of the mixture which sources it is made of."""

    def __init__(
        self,
        recipe: Recipe,
        layout: Layout,
        seeds: Sequence[Seed],
        dtype: str | None,
        main_dtype: str,
        ancestor: str | None,
        alignment: Alignment | None,
    ) -> None:
        self.recipe, self.layout, self.seeds, self.ancestor = recipe, layout, seeds, ancestor
        self.dtype, self.main_dtype, self.alignment = dtype, main_dtype, alignment
        self.names = [seed.name for seed in seeds]
        self.experts = [0] * layout.experts if recipe.copies else list(range(layout.experts))

    def expert_names(self) -> list[str]:
        """One for each FFN expert: the seed's, with a number behind it where it has several."""
        names = [self.names[index] for index in self.experts]
        if self.recipe.copies:
            names = [f"{name}-{i}" for i, name in enumerate(names)]
        experts = self.recipe.experts
        origin = self.one(experts.extra_from) if experts.extra else MEAN
        names += [f"{origin}-extra-{number}" for number in range(experts.extra)]
        shards = experts.granularity
        return names if shards == 1 else [f"{name}.{shard}" for name in names for shard in range(shards)]

    def one(self, way: str) -> str:
        """The name of the seed that "ancestor" or "seed:NAME" means; "mean" stays.

        Raises:
            RecipeError: no seed is found to be the others' ancestor.
        """
        if way != ANCESTOR:
            return way.removeprefix(SEED_PREFIX)
        if self.ancestor is None and not all(seed.here for seed in self.seeds):
            return self.names[0]  # a plan to look at; what is here tells
        if self.ancestor is None:
            raise RecipeError(
                f"recipe '{self.recipe.name}' speaks of the seeds' ancestor, but none of {', '.join(self.names)} is "
                "found to be it (among fewer than four nobody can tell); name it, seed:NAME, in the recipe or by --set"
            )
        return self.ancestor

    def tensor(self, tensor: MixtureTensor) -> PlannedTensor:
        if tensor.router:
            return PlannedTensor(tensor.name, self.main_dtype, tensor.shape, init=self.init(tensor.router))
        groups = tuple(planned for group in tensor.groups for planned in self.groups(group))
        names = {piece.tensor for group in tensor.groups for piece in group.pieces}
        dtypes = {self.dtype or self.seeds[0].tensors[name].dtype for name in names}
        if len(dtypes) > 1:
            raise SeedError(
                f"{self.seeds[0].where}: {', '.join(sorted(names))} go into one tensor but have dtypes "
                f"{', '.join(sorted(dtypes))}; --dtype converts them"
            )
        return PlannedTensor(tensor.name, dtypes.pop(), tensor.shape, groups)

    def init(self, kind: str) -> RandomInit | Constant:
        """How a router, or its bias, starts."""
        recipe, shards = self.recipe, self.recipe.experts.granularity
        if kind == "none":
            return RandomInit(0.0)
        if kind == "ffn_bias":
            named = [*(self.names[index] for index in self.experts), *[""] * recipe.experts.extra]
            return Constant(tuple(recipe.ffn_router.bias.get(name, 0.0) for name in named for _ in range(shards)))
        router = recipe.ffn_router if kind == "ffn" else recipe.attention_router
        std = router.std if router.init == "random" else 0.0
        return RandomInit(std, router.init in FROM_TEXT, shards if kind == "ffn" else 1)

    def groups(self, group: Group) -> Iterator[PlannedGroup]:
        """A group, or of aligned tables one for each run of rows that the same seeds have."""
        if self.alignment is None or group.pieces[0].role not in TABLES:
            yield self.group(group)
            return
        (piece,) = group.pieces
        way = self.recipe.mix[piece.role]
        by_usage = way == USAGE
        indices, weights = self.mix(way)
        width = self.seeds[0].tensors[piece.tensor].shape[1]
        for run in self.alignment.runs:
            having, shares = run.mixed(indices, weights)
            # One block but where each row has weights of its own.
            rows, block = (run.rows, width) if by_usage else (1, run.rows * width)
            sources = tuple(Source(index, piece.tensor, (run.starts[index] or 0) * width, block) for index in having)
            part = Part(block, sources, (1.0,) if by_usage else shares, by_usage, equal=way == EQUAL)
            yield PlannedGroup(rows, (part,))

    def group(self, group: Group) -> PlannedGroup:
        role = group.pieces[0].role
        if group.expert is None and (group.mix or self.recipe.mix[role]) == USAGE:
            (piece,) = group.pieces
            rows, width = self.seeds[0].tensors[piece.tensor].shape
            sources = tuple(Source(index, piece.tensor, 0, width) for index in range(len(self.seeds)))
            return PlannedGroup(rows, (Part(width, sources, by_usage=True),))
        parts = []
        for copy in range(group.copies):
            for piece in group.pieces:
                if group.expert is None:
                    parts.append(self.part(piece, group.mix or self.recipe.mix[piece.role]))
                else:
                    parts.append(self.expert(piece, group.expert + copy))
        return PlannedGroup(group.rows, tuple(parts))

    def part(self, piece: Piece, way: str) -> Part:
        """A piece, mixed in this way."""
        indices, weights = self.mix(way)
        sources = tuple(Source(index, piece.tensor, piece.start, piece.stride) for index in indices)
        return Part(piece.block, sources, weights, equal=way == EQUAL, scale=piece.scale)

    def expert(self, piece: Piece, number: int) -> Part:
        """A piece of one expert."""
        experts = self.recipe.experts
        if number < len(self.experts):
            part = self.part(piece, f"{SEED_PREFIX}{self.names[self.experts[number]]}")
        else:
            part = self.part(piece, experts.extra_from)
        if piece.role != "ffn" or not piece.units or not (experts.noise or experts.drop):
            return part
        layer = piece.tensor.partition(".mlp.")[0]
        perturbation = Perturbation(
            key=f"{layer} {number}|{piece.tensor} {piece.start}",
            axis=0 if piece.units == "rows" else 1,
            inner=self.layout.model.sizes.inner,
            noise=experts.noise,
            drop=experts.drop,
        )
        return replace(part, perturbation=perturbation)

    def mix(self, way: str) -> tuple[list[int], tuple[float, ...]]:
        """Which seeds a way to mix takes, and with which weights."""
        if way == ANCESTOR or way.startswith(SEED_PREFIX):
            return [self.names.index(self.one(way))], (1.0,)
        count = len(self.seeds)
        if way == WEIGHTED:
            shares = [self.recipe.weights[name] for name in self.names]
            return list(range(count)), tuple(share / sum(shares) for share in shares)
        return list(range(count)), (1.0 / count,) * count
