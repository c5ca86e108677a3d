"""The BAM model in use: generation, saving, switches, losses, compilation, adapters, transformers alone."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from tests.conftest import merge_and_load
from tests.test_modeling import RECIPES, tokens
from tests.tiny import BY_NAME, CASES, VOCAB, Case, make_seed, make_seeds
from upcycle.merge import merge
from upcycle.plan import plan_merge
from upcycle.recipe_file import load_recipe
from upcycle.seeds import read_seeds

SHOWN = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("layer_types", "sliding_window", "max_position_embeddings", "tie_word_embeddings", "bos_token_id"),
)
ALL_RECIPES = ("bam", "bam-kv-shared", "btx")
SOME_CASES = [BY_NAME[name] for name in ("llama", "qwen3", "gemma3_text", "cohere2", "phi3", "gpt_neox")]


@pytest.mark.parametrize("case", SOME_CASES, ids=lambda case: case.name)
def test_generation_with_cache_is_that_without(case, made):
    """The cache's shape follows the widened config: greedy tokens equal those of full forwards, static cache too."""
    model = made(case.name, "bam")
    x = y = tokens(1, 9)
    with torch.no_grad():
        for _ in range(16):
            y = torch.cat([y, model(y, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    options = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(x, **options), y)
    assert torch.equal(model.generate(x, cache_implementation="static", disable_compile=True, **options), y)


@pytest.mark.parametrize("recipe", ALL_RECIPES)
def test_left_padding_changes_nothing(recipe, made):
    model = made("llama", recipe)
    x = tokens(1, 8)
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), x], 1)
    batch = torch.cat([padded, tokens(1, 13, random_seed=1)])
    mask = (torch.arange(13)[None] >= torch.tensor([[5], [0]])).long()
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    alone = model.generate(x, **options)[0, 8:]
    assert torch.equal(model.generate(batch, attention_mask=mask, **options)[0, 13:], alone)


@pytest.mark.parametrize("case", SOME_CASES, ids=lambda case: case.name)
def test_save_and_load_round_trip(case, made, tmp_path):
    model = made(case.name, "bam")
    x = tokens(2, 10)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    # Equal weights at other addresses: the matrix library may sum in another order.
    torch.testing.assert_close(again(x).logits, model(x).logits, atol=1e-6, rtol=0)
    assert again.config.to_dict() == {
        **model.config.to_dict(),
        "_name_or_path": again.config.to_dict()["_name_or_path"],
    }
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert {"configuration_bam.py", "modeling_bam.py"} <= names
    assert set(again.config.auto_map) >= {"AutoConfig", "AutoModelForCausalLM"}


def test_the_config_shows_what_engines_read(tmp_path):
    """What plan writes without transformers is what BamConfig derives from the dense config."""
    for case in CASES:
        for recipe in RECIPES:
            if not case.grouped and recipe == "bam-kv-shared":
                continue
            paths = make_seeds(case, tmp_path / f"{case.name}-{recipe}")
            out = tmp_path / f"{case.name}-{recipe}-out"
            seeds = read_seeds([str(p) for p in paths])
            merge(plan_merge(load_recipe(recipe), seeds, allow_unrelated=True, format="bam"), out)
            written = json.loads((out / "config.json").read_text())
            config = AutoConfig.from_pretrained(out)
            assert config.get_text_config() is config
            fresh = type(config)(
                dense_config=written["dense_config"],
                **{key: written[key] for key in ("num_experts", "attention_experts", "shared_key_value")},
            )
            for key in SHOWN:
                value = written.get(key)
                assert getattr(config, key, None) == value or key not in written, key
                assert getattr(fresh, key, None) == getattr(config, key, None), (case.name, key)
                if key in ("layer_types", "sliding_window"):
                    assert getattr(config.dense_config, key, None) == getattr(config, key, None), (case.name, key)


def test_both_auto_classes_load_the_same_weights(made, tmp_path):
    for name in ("llama", "gpt_neox", "cohere2"):
        model = made(name, "bam")
        model.save_pretrained(tmp_path / "saved")
        base, loading = AutoModel.from_pretrained(tmp_path / "saved", output_loading_info=True)
        assert not loading["missing_keys"]
        x = tokens(1, 7)
        hidden = model(x, output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(base.eval()(x).last_hidden_state, hidden, atol=1e-5, rtol=0)


def test_losses_are_those_of_the_equations(made):
    """NLL + sum over layers (alpha L_LB + beta L_z), in float64 from the router's logits; each returned apart."""
    model = made("cohere2", "bam", "router.ffn.top_k=2", "router.ffn.std=0.5", "router.attention.std=0.5").double()
    model.set_experts_implementation("eager")
    x = tokens(2, 11)
    plain = model(x, labels=x)
    assert "router_logits" not in plain
    out = model(x, labels=x, output_router_logits=True)
    experts, balance, z = 3, 0.0, 0.0
    assert len(out.router_logits) == len(out.attention_router_logits) == 2
    for logits in out.router_logits:
        p = torch.exp(logits) / torch.exp(logits).sum(-1, keepdim=True)
        chosen = p.argsort(-1, descending=True)[:, :2]
        fraction = torch.stack([(chosen == i).any(-1).double().mean() for i in range(experts)])
        balance = balance + experts * (fraction * p.mean(0)).sum()
    for logits in (*out.router_logits, *out.attention_router_logits):
        assert logits.shape == (22, experts)
        z = z + (torch.log(torch.exp(logits).sum(-1)) ** 2).mean()
    exact = {"atol": 1e-12, "rtol": 0}
    torch.testing.assert_close(out.load_balance_loss, balance, **exact)
    torch.testing.assert_close(out.z_loss, z, **exact)
    torch.testing.assert_close(out.loss, plain.loss + 0.01 * balance + 0.001 * z, **exact)
    out.loss.backward()
    for name, parameter in model.named_parameters():
        if "router" in name:
            assert parameter.grad.abs().max() > 0, name
    assert model(x, labels=x, output_router_logits=True, return_dict=False)[0] == out.loss


def test_padding_enters_no_router_loss(made):
    model = made("llama", "bam")
    x = tokens(1, 8)
    alone = model(x, output_router_logits=True)
    padded = torch.cat([x, torch.zeros(1, 4, dtype=torch.long)], 1)
    mask = (torch.arange(12)[None] < 8).long()
    batch = model(padded, attention_mask=mask, output_router_logits=True)
    torch.testing.assert_close(batch.load_balance_loss, alone.load_balance_loss)
    torch.testing.assert_close(batch.z_loss, alone.z_loss)


@pytest.mark.parametrize("recipe", ALL_RECIPES)
def test_gradient_checkpointing_gives_the_same_gradients(recipe, made):
    model = made("llama", recipe).train()
    x = tokens(2, 10)

    def gradients():
        model.zero_grad()
        model(x, labels=x, output_router_logits=True, use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.gradient_checkpointing_enable()
    checkpointed = gradients()
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=name)


@pytest.mark.parametrize("case", SOME_CASES, ids=lambda case: case.name)
def test_switches_reach_every_layer(case, made):
    model = made(case.name, "bam")
    x = tokens(2, 12)
    results = {}
    for attention in ("eager", "sdpa"):
        for experts in ("eager", "grouped_mm", "batched_mm"):
            model.set_attn_implementation(attention)
            model.set_experts_implementation(experts)
            results[attention, experts] = model(x).logits
            for module in model.modules():
                config = getattr(module, "config", None)
                if config is not None:
                    assert config._attn_implementation == attention, type(module)
                if hasattr(module, "gate_up_proj") or hasattr(module, "up_proj"):
                    assert module.config._experts_implementation == experts
    for logits in results.values():
        torch.testing.assert_close(logits, results["eager", "eager"], atol=1e-5, rtol=0)


def test_an_experts_implementation_can_be_chosen_while_loading(made, tmp_path):
    made("llama", "bam")
    for name in ("eager", "grouped_mm"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "llama-bam", experts_implementation=name)
        assert model.dense.model.layers[0].mlp.experts.config._experts_implementation == name


def test_switches_call_what_they_name(made, monkeypatch):
    from transformers import AttentionInterface
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    calls = []
    AttentionInterface.register(
        "counted", lambda *a, **k: (calls.append("attention"), sdpa_attention_forward(*a, **k))[1]
    )
    grouped = ALL_EXPERTS_FUNCTIONS["grouped_mm"]
    ALL_EXPERTS_FUNCTIONS.register("counted", lambda *a, **k: (calls.append("experts"), grouped(*a, **k))[1])
    model = made("phi3", "bam")
    model.set_attn_implementation("counted")
    model.set_experts_implementation("counted")
    model(tokens(1, 6))
    assert calls.count("attention") == calls.count("experts") == 2  # one call a layer serves all experts


@pytest.mark.parametrize("name", ["llama", "cohere2"])
def test_the_forward_compiles_whole(name, made):
    model = made(name, "bam").bfloat16()
    x = tokens(2, 16)
    expected = model(x, use_cache=False).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, use_cache=False).logits, expected, atol=3e-2, rtol=3e-2)
    out = compiled(x, use_cache=False, labels=x, output_router_logits=True)
    assert torch.isfinite(out.loss)
    out.loss.backward()


@pytest.mark.parametrize("name", ["llama-biases", "phi3", "starcoder2", "cohere2"])
def test_lora_on_every_linear_layer_merges(name, made):
    from peft import LoraConfig, get_peft_model

    model = made(name, "bam")
    x = tokens(2, 9)
    before = model(x).logits.detach().clone()
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False)).eval()
    assert any("o_proj.linear" in key for key, _ in adapted.named_modules())
    unmerged = adapted(x).logits.detach()
    assert (unmerged - before).abs().max() > 1e-3
    torch.testing.assert_close(adapted.merge_and_unload()(x).logits, unmerged, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_model_made_from_a_config_is_initialised(case, made):
    """Experts, biases and widened norms too, which the family's own code does not know."""
    config = made(case.name, "bam").config
    torch.manual_seed(0)
    fresh = AutoModelForCausalLM.from_config(config)
    for name, parameter in fresh.named_parameters():
        assert torch.isfinite(parameter).all(), name
        if "norm" in name:
            assert parameter.unique().tolist() in ([0.0], [1.0]), name
        elif "experts" in name:
            assert (parameter == 0).all() if name.endswith("bias") else 0.01 < parameter.std() < 0.03, name
    x = tokens(1, 6)
    assert torch.isfinite(fresh(x, labels=x).loss)


def test_a_copy_routes_by_its_own_routers(made):
    fresh = made("llama", "bam").train()
    fresh.gradient_checkpointing_enable()
    x = tokens(1, 6)
    fresh(x, labels=x, output_router_logits=True, use_cache=False).loss.backward()
    twin = copy.deepcopy(fresh)  # nothing of the step may cling to the modules
    assert torch.equal(twin(x).logits, fresh(x).logits)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert fresh(x).logits.abs().max() > 0


def test_reentrant_checkpointing_cannot_carry_router_losses(made):
    model = made("llama", "bam").train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    x = tokens(1, 6)
    model(x, labels=x, use_cache=False).loss.backward()
    with pytest.raises(ValueError, match="use_reentrant"):
        model(x, labels=x, use_cache=False, output_router_logits=True)


def test_router_losses_in_generation_and_with_kept_logits(made):
    model = made("gemma3_text", "bam")
    x, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    whole = model(x, attention_mask=mask, output_router_logits=True)
    for keep in (1, torch.tensor([2, 8])):
        part = model(x, attention_mask=mask, output_router_logits=True, logits_to_keep=keep)
        assert torch.equal(part.z_loss, whole.z_loss)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "attention_mask": mask}
    plain = model.generate(x, **options)
    static = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(model.generate(x, output_router_logits=True, **options, **static), plain)


@pytest.mark.parametrize("recipe", ["bam", "btx"])
def test_long_positions_switch_as_in_the_family(recipe, tmp_path):
    """Phi3 drops the cache where its positions switch from short to long factors; identical seeds do the same."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0]}
    longrope = {"rope_type": "longrope", "rope_theta": 1e4, **factors}
    case = Case("phi3-long", "phi3", {"rope_parameters": longrope, "original_max_position_embeddings": 16})
    seed = make_seed(case, tmp_path / "a", 0)
    mixed = merge_and_load([f"x={seed}", f"y={seed}"], tmp_path / "out", recipe, "router.ffn.normalize=true").eval()
    dense = AutoModelForCausalLM.from_pretrained(seed, dtype=torch.float32).eval()
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    found, expected = mixed.generate(tokens(1, 12), **options), dense.generate(tokens(1, 12), **options)
    for step, (one, other) in enumerate(zip(found.logits, expected.logits, strict=True)):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0, msg=f"step {step}")


def test_switches_of_the_config_are_heard(made):
    model = made("llama", "bam")
    model.config.output_hidden_states = True
    model.config.use_cache = False
    out = model(tokens(1, 5))
    assert len(out.hidden_states) == 3
    assert out.get("cache", out.get("past_key_values")) is None


def test_embeddings_can_be_resized(made, tmp_path):
    model = made("llama", "bam")
    model.resize_token_embeddings(VOCAB + 7)
    model.save_pretrained(tmp_path / "resized")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "resized")
    assert again.get_input_embeddings().weight.shape[0] == again.config.vocab_size == VOCAB + 7
    x = torch.full((1, 4), VOCAB + 3)
    assert torch.isfinite(again(x, labels=x).loss)


@pytest.mark.parametrize("name", ["llama", "cohere2"])
def test_transformers_alone_loads_it(name, made, tmp_path):
    """In a process where `upcycle` cannot be imported: remote code, no missing key, generation."""
    model = made(name, "bam-kv-shared")
    x = tokens(1, 6)
    expected = model.generate(x, max_new_tokens=8, do_sample=False, eos_token_id=None)[0].tolist()
    script = (
        "import sys; sys.modules['upcycle'] = None\n"
        "import torch\nfrom transformers import AutoConfig, AutoModel, AutoModelForCausalLM\n"
        f"path = {str(tmp_path / f'{name}-bam-kv-shared')!r}\n"
        "model, info = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, output_loading_info=True)\n"
        "assert not any(info[key] for key in ('missing_keys', 'unexpected_keys', 'mismatched_keys')), info\n"
        "assert AutoConfig.from_pretrained(path, trust_remote_code=True).model_type == 'bam'\n"
        "AutoModel.from_pretrained(path, trust_remote_code=True)\n"
        f"x = torch.tensor({x.tolist()})\n"
        "print(model.generate(x, max_new_tokens=8, do_sample=False, eos_token_id=None)[0].tolist())\n"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n")[-2] == str(expected)
