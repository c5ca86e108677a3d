"""The BAM model against the dense model it must equal, and against BAM.md's equations written as a loop."""

import pytest
import torch
from torch.func import functional_call
from transformers import AutoModelForCausalLM

import upcycle
from tests import reference
from tests.conftest import merge_and_load
from tests.tiny import CASES, VOCAB, make_seed, make_seeds
from upcycle.recipe_file import load_recipe

upcycle.register()

RECIPES = ("bam", "bam-kv-shared", "btx-top1")
GRID = [
    pytest.param(case, recipe, id=f"{case.name}-{recipe}")
    for case in CASES
    for recipe in RECIPES
    if case.grouped or recipe != "bam-kv-shared"
]


def tokens(*shape, random_seed=0):
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(random_seed))


@pytest.mark.parametrize(("case", "recipe"), GRID)
def test_identical_seeds_give_the_dense_model(case, recipe, tmp_path):
    seed = make_seed(case, tmp_path / "a", 0)
    out = tmp_path / "out"
    model = merge_and_load([f"x={seed}", f"y={seed}", f"z={seed}"], out, recipe, "router.ffn.normalize=true").eval()
    dense = AutoModelForCausalLM.from_pretrained(seed, dtype=torch.float32).eval()
    x = tokens(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(model(x).logits, dense(x).logits, atol=1e-5, rtol=0)
    options = {"max_new_tokens": 32, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(x[:1], **options), dense.generate(x[:1], **options))


@pytest.mark.parametrize(("case", "recipe"), GRID)
def test_different_seeds_give_the_loop_over_experts(case, recipe, tmp_path):
    """Logits, and the gradient of every weight of every seed and of every router, in float64."""
    resolved = load_recipe(recipe)
    wide = {"attention_experts": resolved.attention_experts, "shared_key_value": resolved.shared_key_value}
    paths = make_seeds(case, tmp_path)
    model = merge_and_load(
        paths,
        tmp_path / "out",
        recipe,
        "router.ffn.std=0.5",
        *(["router.attention.std=0.5"] * wide["attention_experts"]),
    )
    seeds = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in paths]
    config = seeds[0].config

    state = dict(model.named_parameters())
    routers = {}
    for name, parameter in state.items():
        if "router" in name:
            layer = name.split("layers.")[1].split(".")[0]
            routers[f"{layer}.{'ffn' if '.mlp.' in name else 'attention'}"] = parameter.detach().clone()
    leaves = [{name: p.detach().clone() for name, p in seed.named_parameters()} for seed in seeds]
    expected = reference.widened(leaves, routers, config, **wide)
    assert set(expected) == set(state)
    for name, tensor in expected.items():
        assert torch.equal(tensor, state[name]), name  # the merged file, bit for bit

    x = tokens(2, 18)
    leaves = [{name: leaf.double().requires_grad_() for name, leaf in seed.items()} for seed in leaves]
    wide_routers = {key: router.double().requires_grad_() for key, router in routers.items()}
    model.double().set_experts_implementation("eager")
    # Eager attention rounds its softmax to fp32; sdpa is float64 throughout, where a family has it.
    attention = "sdpa" if model._supports_sdpa else "eager"
    model.set_attn_implementation(attention)
    parameters = reference.widened(leaves, wide_routers, config, **wide)
    # The mean in the file was rounded to fp32; compare at that very point, through the same gradient.
    parameters = {name: p + (state[name].double() - p).detach() for name, p in parameters.items()}
    result = functional_call(model, parameters, (x,), {"labels": x, "use_cache": False})
    result.loss.backward()

    loop = reference.build(seeds, routers, **wide, top_k=resolved.ffn_router.top_k, normalize=False)
    loop.set_attn_implementation(attention)
    target = loop(x, labels=x, use_cache=False)
    target.loss.backward()

    torch.testing.assert_close(result.logits, target.logits, atol=case.exact, rtol=0)
    compare_gradients(loop, leaves, wide_routers, config, case.exact, **wide)


def compare_gradients(loop, leaves, routers, config, exact, *, attention_experts, shared_key_value):
    def check(found, expected, name):
        assert found is not None, f"no gradient reaches {name}"
        assert expected.abs().max() > 0, name
        torch.testing.assert_close(found, expected, atol=exact, rtol=exact, msg=lambda text: f"{name}: {text}")

    count, place = len(leaves), reference.attention_name(loop)
    for name, parameter in loop.named_parameters():
        if name.endswith(".router"):
            layer = name.split("layers.")[1].split(".")[0]
            check(routers[f"{layer}.{'ffn' if '.mlp.' in name else 'attention'}"].grad, parameter.grad, name)
        elif ".experts." in name:
            before, after = name.split(".experts.")
            number, inner = after.split(".", 1)
            grad, found = parameter.grad, leaves[int(number)][f"{before}.{inner}"].grad
            grad = torch.zeros_like(parameter) if grad is None else grad  # an expert that no token chose
            if not (place in name and shared_key_value):
                if grad.abs().max() > 0 or found.abs().max() > 0:
                    check(found, grad, name)
                continue
            of_experts = [dict(loop.named_parameters())[f"{before}.experts.{i}.{inner}"].grad for i in range(count)]
            if reference.is_key_value(inner):
                check(found, sum(of_experts) / count, name)
            elif "qkv_proj" in inner:
                rows = config.num_attention_heads * (config.hidden_size // config.num_attention_heads)
                check(found[:rows], grad[:rows], name)
                check(found[rows:], sum(of_experts)[rows:] / count, name)
            else:
                check(found, grad, name)
        else:
            for leaf in leaves:
                check(leaf[name].grad, parameter.grad / count, name)
