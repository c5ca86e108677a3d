"""Every family by every recipe in every format: each cell is exact, loaded by the class it names, or refused with why.

What a cell must compute is written down once more here, of the seeds' own modules, and shares no code with upcycle.
"""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import upcycle
from tests import reference
from tests.tiny import BY_NAME, CASES, VOCAB, make_seeds
from upcycle.errors import RecipeError
from upcycle.merge import merge
from upcycle.mixture import plan_extract, read_mixture
from upcycle.native import NATIVE
from upcycle.plan import plan_merge
from upcycle.recipe_file import builtin_recipes, load_recipe
from upcycle.seeds import read_seeds

upcycle.register()

# One of each family, and those whose formats differ from it.
MODELS = [*{case.model_type: case for case in reversed(CASES)}.values(), BY_NAME["llama-biases"], BY_NAME["qwen2-full"]]
CELLS = [
    pytest.param(case, recipe, format, id=f"{case.name}-{name}-{format}")
    for case in MODELS
    for name, recipe in builtin_recipes().items()
    for format in (("bam", "native") if recipe.ffn_experts else ("auto",))
]
# Which class fits, and whether it can leave gates as they are.
NATIVE_OF = {
    "llama": ("mixtral", False),
    "mistral": ("mixtral", False),
    "qwen2": ("qwen2_moe", True),
    "qwen3": ("qwen3_moe", True),
    "olmo2": ("flex_olmo", True),
    "granite": ("granitemoe", False),
    "cohere2": ("cohere2_moe", False),
}
# What a test of tiny, unrelated seeds without text must change.
OVERRIDES = {
    "flex": ("router.ffn.init=random",),
    "btx-extra": ("experts.extra_from=seed:a",),
    "virtual-groups": ("experts.granularity=2",),
    "bam-virtual-groups": ("experts.granularity=2",),
}
DOWN = ("down_proj", "c_proj", "dense_4h_to_h")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three random seeds of every family, and three that differ in their FFNs alone; made when they are asked for."""
    made = {}

    def of(case, ffn_only):
        key = (case.name, ffn_only)
        if key not in made:
            made[key] = make_seeds(case, tmp_path_factory.mktemp(case.name))
            if ffn_only:
                first = load_file(made[key][0] / "model.safetensors")
                for path in made[key][1:]:
                    own = {name: t for name, t in load_file(path / "model.safetensors").items() if ".mlp." in name}
                    save_file({**first, **own}, path / "model.safetensors", metadata={"format": "pt"})
        return made[key]

    return of


class Mixture(nn.Module):
    """Routed experts with a bias on the logits, and shared ones."""

    def __init__(self, experts, router, bias, top_k, normalize, shared):
        super().__init__()
        self.experts, self.shared = nn.ModuleList(experts), nn.ModuleList(shared)
        self.router, self.bias, self.top_k, self.normalize = router.double(), bias, top_k, normalize

    def forward(self, x):
        p = (x @ self.router.T + self.bias).softmax(-1)
        p = p * (p >= p.sort(-1, descending=True).values[..., self.top_k - 1 : self.top_k])
        if self.normalize:
            p = p / p.sum(-1, keepdim=True)
        routed = sum(p[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts))
        return routed + sum(expert(x) for expert in self.shared)


class TopKAttention(reference.AttentionLoop):
    """Attention experts of which the gates of all but the largest are 0."""

    top_k = 2

    def forward(self, hidden_states, *args, **kwargs):
        gates = (hidden_states @ self.router.T).softmax(-1)
        gates = gates * (gates >= gates.sort(-1, descending=True).values[..., self.top_k - 1 : self.top_k])
        outputs = [expert(hidden_states, *args, **kwargs)[0] for expert in self.experts]
        return sum(gates[..., i : i + 1] * output for i, output in enumerate(outputs)), None


def shard_of(mlp, shard, shards, scale):
    """One of several shares of an MLP's inner units, its output so many times as large; the bias whole."""
    part = copy.deepcopy(mlp)
    down = next(getattr(part, name) for name in DOWN if hasattr(part, name))
    width = down.weight.shape[1] // shards
    with torch.no_grad():
        keep = torch.zeros(down.weight.shape[1])
        keep[shard * width : (shard + 1) * width] = shards * scale
        down.weight *= keep
        if down.bias is not None:
            down.bias *= scale
    return part


def mean_mlp(mlps):
    average = copy.deepcopy(mlps[0])
    with torch.no_grad():
        for name, parameter in average.named_parameters():
            parameter.copy_(reference.mean([dict(mlp.named_parameters())[name] for mlp in mlps]))
    return average


def build(seeds, recipe, routers):
    """The mixture in float64; with one seed, of three copies of it."""
    model = reference.build(
        seeds,
        routers,
        attention_experts=recipe.attention_experts,
        shared_key_value=recipe.shared_key_value,
        top_k=1,
        normalize=False,
    )
    place, settings, ffn = reference.attention_name(model), recipe.experts, recipe.ffn_router
    for index, layer in enumerate(model.base_model.layers):
        mlps = [seed.base_model.layers[index].mlp for seed in seeds]
        routed, shards = 1 - settings.shared_weight if settings.shared else 1.0, settings.granularity
        groups = [*mlps, *[mlps[0]] * settings.extra]
        experts = [shard_of(mlp, shard, shards, routed) for mlp in groups for shard in range(shards)]
        shared = [shard_of(mean_mlp(mlps), 0, 1, settings.shared_weight) for _ in settings.shared]
        router = routers[f"{index}.ffn"]
        assert router.shape == (len(experts), router.shape[1])
        layer.mlp = Mixture(experts, router, torch.zeros(()), ffn.top_k * shards, ffn.normalize, shared)
        if recipe.attention_experts and recipe.attention_router.routing == "top-k":
            loop = getattr(layer, place)
            setattr(layer, place, TopKAttention(list(loop.experts), loop.router.detach()))
    return model.double()


def stored_routers(out, plan):
    tensors = {}
    for file in out.glob("*.safetensors"):
        tensors |= load_file(file)
    found = {}
    for tensor in plan.layout.mixture:
        if tensor.router in ("ffn", "attention"):
            layer = tensor.name.split("layers.")[1].split(".")[0]
            found[f"{layer}.{tensor.router}"] = tensors[tensor.name].float()
    return found


def extracted(out, number, folder):
    merge(plan_extract(read_mixture(out), number), folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def load(out, format):
    model, info = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    if format == "native":
        config = json.loads((out / "config.json").read_text())
        assert type(model).__name__ == NATIVE[config["model_type"]].architecture
        assert type(model).__module__.startswith("transformers.")
    return model.eval()


def logits(model, x):
    return model(x, use_cache=False).logits  # the loop's attention modules would share one cache


def why_refused(case, recipe, format):
    """What a refusal must speak of; nothing where the cell must be exact."""
    if recipe.shared_key_value and not case.grouped:
        return "grouped queries"
    if format != "native":
        return ""
    if recipe.attention_experts:
        return "attention is mixed too"
    known = {"qwen2": "sliding_window = 6", "llama-biases": "attention_bias = True"}  # and the class does not
    if case.name in known:
        return known[case.name]
    if case.model_type not in NATIVE_OF:
        return "no mixture class"
    if not recipe.ffn_router.normalize and not NATIVE_OF[case.model_type][1]:
        return "rescales the selected gates"
    return "shared expert" if recipe.experts.shared and case.model_type != "qwen2" else ""


@pytest.mark.parametrize(("case", "recipe", "format"), CELLS)
def test_every_cell_is_exact_or_refused(case, recipe, format, folders, tmp_path):
    recipe = load_recipe(recipe.name, OVERRIDES.get(recipe.name, ()))
    paths = folders(case, ffn_only=recipe.name == "flex")[: 1 if recipe.copies else 3]
    seeds = read_seeds([str(path) for path in paths])

    def plan():
        copies = 3 if recipe.copies else None
        return plan_merge(recipe, seeds, num_experts=copies, allow_unrelated=True, format=format)

    reason = why_refused(case, recipe, format)
    if reason:
        with pytest.raises(RecipeError, match=reason):
            plan()
        return
    planned, out = plan(), tmp_path / "out"
    merge(planned, out)
    model = load(out, format).double()
    dense = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in paths]
    if recipe.ffn_experts:
        model.set_experts_implementation("eager")
        if recipe.copies:
            same = not (recipe.experts.noise or recipe.experts.drop)
            dense = dense * 3 if same else [extracted(out, i, tmp_path / str(i)) for i in range(3)]
        target = build(dense, recipe, stored_routers(out, planned))
    else:
        target = reference.averaged(dense).double()
    for one in (model, target):
        one.set_attn_implementation("sdpa" if planned.layout.model.model_type != "gemma2" else "eager")
    x = torch.randint(3, VOCAB, (2, 18), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(logits(model, x), logits(target, x), atol=1e-5, rtol=0)
