"""A seed given as base+adapter is the dense model that the two give, everywhere; what is not plain LoRA is refused."""

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.conftest import run_cli, write_tokenizer
from tests.hub_server import HubServer
from tests.tiny import BY_NAME, edit_json, make_seed
from upcycle import adapters
from upcycle.adapters import split_adapter
from upcycle.ancestry import fingerprint, sample
from upcycle.errors import SeedError
from upcycle.licenses import licensing
from upcycle.merge import merge
from upcycle.numeric import FLOATS, to_float32
from upcycle.plan import plan_merge
from upcycle.recipe_file import load_recipe
from upcycle.seeds import Seed, read_seed, read_seeds

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EVERY = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def make_adapter(base: Path, folder: Path, number: int = 0, dtype: Any = torch.float32, **config: Any) -> Path:
    """What PEFT saves after a training: every number that it may change is random."""
    torch.manual_seed(number)
    config = {"r": 4, "lora_alpha": 8, "target_modules": EVERY, "task_type": "CAUSAL_LM", **config}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), LoraConfig(**config))
    with torch.no_grad():
        for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def lora(base_seed: Path, tmp_path: Path) -> Path:
    """The folder that holds `base`, and the adapters `code` and `law` on it."""
    shutil.copytree(base_seed, tmp_path / "base")
    make_adapter(base_seed, tmp_path / "code", 1)
    make_adapter(base_seed, tmp_path / "law", 2, target_modules=ATTENTION)
    return tmp_path


def whole(seed: Seed) -> dict[str, np.ndarray]:
    """Every tensor of a seed as raw bytes."""
    return {name: np.frombuffer(seed.read(info, 0, info.nbytes), np.uint8) for name, info in seed.tensors.items()}


def rounded(values: np.ndarray, axis: int) -> np.ndarray:
    """To 24 bits of the largest number along an axis."""
    largest = np.abs(values).max(axis=axis, keepdims=True)
    unit = 2.0 ** (np.floor(np.log2(np.where(largest > 0, largest, 1))) + 1 - 24)
    return np.rint(values / unit) * unit


def formula(weight: np.ndarray, a: np.ndarray, b: np.ndarray, scale: float, dtype: str) -> np.ndarray:
    """W + scale · B A as it is defined: products of 32 ranks are exact, their sum is added in fp32 and cast once."""
    a, b, total = a.astype(np.float64), b.astype(np.float64), np.zeros(weight.shape)
    for k in range(0, len(a), 32):
        total += (rounded(b[:, k : k + 32], 1)[:, :, None] * rounded(a[k : k + 32], 0)[None]).sum(1)
    return (weight.astype(np.float32) + (scale * total).astype(np.float32)).astype(FLOATS[dtype])


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "phi3, fused": ("phi3", {"target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]}),
    "gpt_neox": ("gpt_neox", {"target_modules": ["query_key_value", "dense"]}),
    "gpt_neox's head": ("gpt_neox", {"target_modules": ["lm_head"], "alpha_pattern": {"lm_head": 3}}),
    "gpt_neox's whole head": ("gpt_neox", {"modules_to_save": ["lm_head"], "target_modules": ["dense"]}),
    "rank-stabilised": ("llama", {"use_rslora": True, "r": 9}),
    "more than 32 ranks": ("llama", {"r": 70}),
    "patterns": (
        "llama",
        {
            "rank_pattern": {r"layers\.1\.self_attn\.(q|k)_proj": 2, "q_proj": 6, "^model.layers.0.mlp.up_proj": 3},
            "alpha_pattern": {"self_attn.v_proj": 2.5, r".*\.(?:up|down)_proj": 16},
        },
    ),
    "some layers": ("llama", {"layers_to_transform": [1]}),
    "a regular expression": ("llama", {"target_modules": r".*layers\.0.*(q_proj|down_proj)"}),
    "head": ("llama", {"target_modules": ["lm_head", "q_proj"]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "whole modules": ("llama", {"modules_to_save": ["lm_head", "norm", "embed_tokens"]}),
    "with biases": ("llama-biases", {"modules_to_save": ["input_layernorm"]}),
    "start": ("llama", {"init_lora_weights": "gaussian", "exclude_modules": ["o_proj"]}),
}


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("case", CASES)
def test_a_seed_with_an_adapter_is_what_peft_merges(case: str, dtype: str, tmp_path: Path) -> None:
    family, config = CASES[case]
    base = make_seed(BY_NAME[family], tmp_path / "base", 0, TORCH[dtype])
    folder = make_adapter(base, tmp_path / "lora", dtype=TORCH[dtype], **config)
    seed, plain = read_seed("x", f"{base}+{folder}"), read_seed("x", str(base))
    assert fingerprint(seed, sample(seed)) != fingerprint(plain, sample(plain))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    expected = PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False).merge_and_unload().state_dict()
    expected["embed_out.weight"] = expected["lm_head.weight"]  # as GPT-NeoX's files call it
    changed = 0
    for name, data in whole(seed).items():
        info, before = seed.tensors[name], plain.read(plain.tensors[name], 0, plain.tensors[name].nbytes)
        assert (info.dtype, info.shape, info.nbytes) == (dtype, plain.tensors[name].shape, len(data))
        values = torch.from_numpy(to_float32(data.data, dtype)).reshape(info.shape)
        rtol = {"F32": 2e-6, "F16": 2**-10.9, "BF16": 2**-7.9}[dtype]
        assert torch.allclose(values, expected[name].float(), rtol=rtol, atol=2e-7), name
        changed += before != data.tobytes()
    assert changed == len({name for name, info in seed.tensors.items() if "lora" in str(info.file) or info.made})


@pytest.mark.parametrize("kept", ["F32", "BF16", "F16"])
def test_every_bit_is_that_of_the_formula(kept: str, tmp_path: Path) -> None:
    """Whatever is read of a tensor, in whichever stretches; the adapter's dtype is not the base's."""
    base = make_seed(BY_NAME["llama"], tmp_path / "base", 0, torch.bfloat16)
    folder = make_adapter(base, tmp_path / "lora", r=70, target_modules=[*EVERY, "embed_tokens"], use_rslora=True)
    state = load_file(folder / "adapter_model.safetensors")
    prefix = "base_model.model."
    state = {key: value.to(TORCH[kept]) for key, value in state.items() if "base_layer" not in key}
    save_file(state, folder / "adapter_model.safetensors")
    seed, dense = read_seed("x", f"{base}+{folder}"), load_file(base / "model.safetensors")
    for name, data in whole(seed).items():
        module, weight = prefix + name.removesuffix(".weight"), dense[name].float().numpy()
        expected = weight.astype(FLOATS["BF16"])
        if f"{module}.lora_A.weight" in state:
            a, b = (state[f"{module}.lora_{side}.weight"].float().numpy() for side in "AB")
            expected = formula(weight, a, b, 8 / math.sqrt(70), "BF16")
        elif f"{module}.lora_embedding_A" in state:
            a, b = (state[f"{module}.lora_embedding_{side}"].float().numpy() for side in "AB")
            expected = formula(weight, b.T, a.T, 8 / math.sqrt(70), "BF16")
        assert data.tobytes() == expected.tobytes(), name
        items, info = len(data) // 2, seed.tensors[name]
        for start, count in ((0, 1), (items - 3, 3), (items // 3, min(items // 2, 111)), (7, 20)):
            assert seed.read(info, 2 * start, 2 * count) == data[2 * start : 2 * (start + count)].tobytes()


def test_products_do_not_depend_on_the_order_of_sums() -> None:
    """Of factors whose sums would round in fp32 and in fp64; large and small ones, to the bit."""
    random = np.random.default_rng(0)
    left = random.standard_normal((8, 32)) * 10.0 ** random.integers(-8, 8, (8, 32))
    right = random.standard_normal((32, 8)) * 10.0 ** random.integers(-8, 8, (32, 8))
    left, right = (factor.astype(np.float32).astype(np.float64) for factor in (left, right))
    order = random.permutation(32)

    def product(left: np.ndarray, right: np.ndarray) -> bytes:
        return bytes((left[:, order] @ right[order]).data), bytes((left @ right).data)

    one, other = product(adapters._rounded(left, 1), adapters._rounded(right, 0))
    assert one == other
    one, other = product(left, right)
    assert one != other


def materialised(seed: Seed, base: Path, folder: Path) -> Path:
    """The dense checkpoint that a seed is, in a folder."""
    shutil.copytree(base, folder)
    state = {
        name: torch.from_numpy(data.copy()).view(TORCH[seed.tensors[name].dtype]).reshape(seed.tensors[name].shape)
        for name, data in whole(seed).items()
    }
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("recipe", ["average", "bam", "bam-kv-shared"])
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_a_merge_is_that_of_the_merged_seeds(
    recipe: str, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_seed(BY_NAME[family], tmp_path / "base", 0, torch.bfloat16)
    write_tokenizer(base)
    modules = {"llama": EVERY, "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]}[family]
    make_adapter(base, tmp_path / "code", 1, target_modules=modules, modules_to_save=["lm_head"])
    make_adapter(base, tmp_path / "law", 2, target_modules=[*modules, "embed_tokens"], r=3)
    specs = [f"{base}", f"{base}+{tmp_path / 'code'}", f"law={base}+{tmp_path / 'law'}"]
    seeds = read_seeds(specs)
    assert [seed.name for seed in seeds] == ["base", "code", "law"]
    dense = [base, *(materialised(seed, base, tmp_path / "dense" / seed.name) for seed in seeds[1:])]
    plans = [
        plan_merge(load_recipe(recipe), read)
        for read in (seeds, read_seeds([f"{name}={at}" for name, at in zip(("base", "code", "law"), dense)]))  # noqa: B905
    ]
    assert plans[0].digest() == plans[1].digest()
    monkeypatch.setattr(adapters, "CACHE", 1000)  # factors are let go of and read again
    for plan, name in zip(plans, ("lora", "dense-merge"), strict=True):
        merge(plan, tmp_path / name)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "lora" / file).read_bytes() == (tmp_path / "dense-merge" / file).read_bytes()


def test_it_goes_everywhere_a_seed_does(lora: Path) -> None:
    (lora / "law" / "README.md").write_text("---\nlicense: mit\n---\n")
    seeds = ["base", "base+code", "jus=base+law"]
    assert run_cli("plan", "--seeds", *seeds, "--recipe", "bam", cwd=lora).returncode == 0
    dry = run_cli("merge", "--seeds", *seeds, "--recipe", "bam", "--dry-run", "--json", cwd=lora)
    assert json.loads(dry.stdout)["seeds"] == ["base", "code", "jus"]
    done = run_cli("merge", "--seeds", *seeds, "--recipe", "bam", "--out", "mixture", cwd=lora)
    assert done.returncode == 0, done.stderr
    text = (lora / "mixture" / "upcycle.json").read_text()
    assert str(lora) not in text
    records = json.loads(text)["seeds"]
    assert [record.get("adapter") for record in records] == [
        None,
        {"name": "code", "repository": None, "revision": None, "license": None},
        {"name": "law", "repository": None, "revision": None, "license": "mit"},
    ]
    assert "with the adapter law" in (lora / "mixture" / "README.md").read_text()
    verified = run_cli("verify", "mixture", "--seeds", *seeds, cwd=lora)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    edit_json(lora / "code" / "adapter_config.json", lora_alpha=9)
    assert run_cli("verify", "mixture", "--seeds", *seeds, cwd=lora).returncode == 1
    for out in ("code/mixture", "law"):  # never into an adapter's folder
        refused = run_cli("merge", "--seeds", *seeds, "--recipe", "bam", "--out", out, "--yes", cwd=lora)
        assert "lie within one another" in refused.stderr


def test_an_adapter_that_changes_meanwhile_is_noticed(lora: Path) -> None:
    plan = plan_merge(load_recipe("average"), read_seeds([str(lora / "base"), f"{lora / 'base'}+{lora / 'code'}"]))
    file = lora / "code" / "adapter_model.safetensors"

    def touch(_: int) -> None:
        os.utime(file)

    with pytest.raises(SeedError, match=r"'code'.*adapter_model.safetensors was changed"):
        merge(plan, lora / "out", progress=touch)
    assert not (lora / "out").exists()


def test_a_plus_may_stand_in_a_path(lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(lora / "base", lora / "c++" / "base+code")
    shutil.copytree(lora / "code", lora / "c++" / "code")
    shutil.copytree(lora / "code", lora / "a+b")
    monkeypatch.chdir(lora)
    monkeypatch.setattr(adapters.hub, "is_offline", lambda: True)
    assert read_seeds(["c++/base+code"])[0].adapter is None
    (both,) = read_seeds(["c++/base+code+c++/code"])
    assert (both.name, both.folder, both.adapter and both.adapter.folder) == (
        "code",
        Path("c++/base+code"),
        Path("c++/code"),
    )
    assert read_seeds(["x=base+a+b"])[0].name == "x"
    assert read_seeds(["base+a+b"])[0].name == "a+b"
    assert split_adapter("org/base@v1+org/lora@main") == ("org/base@v1", "org/lora@main")
    assert split_adapter("./c++/typo") == ("./c++/typo", None)
    for spec, words in {
        "base+": "names no folder",
        "+code": "names no folder",
        "./c++/typo": r"no folder \./c\+\+/typo",
        "base+./typo": r"no folder './typo'.*adapter",
        "base+org/typo": "no adapter of that name",
        "code": r"adapter alone; give it with its base: BASE\+code",
        "base+code/adapter_config.json": "is a file",
    }.items():
        with pytest.raises(SeedError, match=words):
            read_seeds([f"x={spec}"])


def edit(folder: Path, change: Any) -> None:
    state = load_file(folder / "adapter_model.safetensors")
    change(state)
    save_file(state, folder / "adapter_model.safetensors")


Q, UP = (f"base_model.model.model.layers.0.{name}" for name in ("self_attn.q_proj", "mlp.up_proj"))


def setting(**changes: Any) -> Any:
    return lambda f: edit_json(f / "adapter_config.json", **changes)


def tensor(key: str, value: Any) -> Any:
    return lambda f: edit(f, lambda state: state.update({key: value}))


def without(key: str) -> Any:
    return lambda f: edit(f, lambda state: state.pop(key))


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def truncate(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def poison(key: str, value: float) -> Any:
    return lambda f: edit(f, lambda state: state[key].view(-1).__setitem__(len(state[key].view(-1)) // 2, value))


# How the adapter `code` is damaged, and what the message names beside seed and folder.
BAD = {
    "other kind": (setting(peft_type="LOHA"), ["peft_type", "LOHA", "LORA", "merge_and_unload"]),
    "biases": (setting(bias="lora_only"), ["bias", "lora_only", "none"]),
    "DoRA": (setting(use_dora=True), ["use_dora", "plain LoRA", "merge_and_unload"]),
    "transposed": (setting(fan_in_fan_out=True), ["fan_in_fan_out", "plain LoRA"]),
    "repeated layers": (setting(layer_replication=[[0, 2]]), ["layer_replication"]),
    "trained tokens": (setting(trainable_token_indices=[1, 2]), ["trainable_token_indices"]),
    "of a PEFT to come": (setting(use_marvel=True), ["use_marvel", "plain LoRA"]),
    "changed base": (setting(init_lora_weights="pissa_niter_4"), ["init_lora_weights", "pissa_niter_4", "base"]),
    "no rank": (setting(r=0), ["adapter_config.json says r = 0", "whole number"]),
    "no alpha": (setting(lora_alpha="much"), ["lora_alpha", "much", "number"]),
    "alpha that is no number": (setting(lora_alpha=float("nan")), ["lora_alpha", "NaN"]),
    "no switch": (setting(use_rslora="yes"), ["use_rslora", "true or false"]),
    "no pattern": (setting(rank_pattern={"(": 4}), ["rank_pattern", "patterns"]),
    "slow pattern": (setting(alpha_pattern={"(a+)+$": 4}), ["alpha_pattern", "simple patterns"]),
    "pattern's rank": (setting(rank_pattern={"q_proj": 5}), ["q_proj.lora_A", "[4, 32]", "[5, 32]", "rank 5"]),
    "other rank": (setting(r=8), ["lora_", "[4, ", "[8, ", "rank 8"]),
    "whole module missing": (setting(modules_to_save=["lm_head"]), ["lm_head", "modules_to_save", "no tensor"]),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), ["adapter_config.json", "missing"]),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), ["adapter_model.safetensors", "missing"]),
    "pickle": (pickled, ["pickle", "save_pretrained"]),
    "truncated": (truncate, ["adapter_model.safetensors", "truncated"]),
    "nothing in it": (lambda f: edit(f, dict.clear), ["no tensor"]),
    "half of a product": (without(f"{Q}.lora_B.weight"), [f"{Q}.lora_A.weight", "stands alone"]),
    "other sides": (tensor(f"{Q}.lora_embedding_A", torch.ones(4, 32)), [Q, "stands alone"]),
    "other width": (tensor(f"{UP}.lora_A.weight", torch.ones(4, 33)), [f"{UP}.lora_A.weight", "[4, 33]", "[4, 32]"]),
    "other height": (tensor(f"{UP}.lora_B.weight", torch.ones(47, 4)), [f"{UP}.lora_B.weight", "[47, 4]", "[48, 4]"]),
    "emptied": (tensor(f"{UP}.lora_B.weight", torch.ones(0)), [f"{UP}.lora_B.weight", "[0]", "[48, 4]"]),
    "unknown module": (
        tensor(f"{Q}x.lora_A.weight", torch.ones(4, 32)),
        [f"{Q}x.lora_A.weight", "layers.0.self_attn.q_projx.weight", "another model"],
    ),
    "unknown tensor": (
        tensor(f"{Q}.lora_magnitude_vector", torch.ones(32)),
        [f"{Q}.lora_magnitude_vector", "no place"],
    ),
    "bias of a product": (tensor(f"{Q}.lora_B.bias", torch.ones(32)), [f"{Q}.lora_B.bias", "no place"]),
    "another head": (tensor("base_model.model.score.weight", torch.ones(2, 32)), ["score.weight", "no place"]),
    "no prefix": (tensor("lm_head.weight", torch.ones(96, 32)), ["'lm_head.weight'", "base_model.model."]),
    "larger vocabulary": (
        tensor("base_model.model.lm_head.weight", torch.ones(97, 32)),
        ["lm_head.weight", "[97, 32]", "[96, 32]"],
    ),
    "a norm's product": (
        lambda f: edit(
            f,
            lambda state: state.update(
                {f"base_model.model.model.norm.lora_{side}.weight": torch.ones(4, 4) for side in "AB"}
            ),
        ),
        ["model.norm.lora_A.weight", "no matrix"],
    ),
    "twice": (
        tensor(f"{Q}.lora_A.default.weight", torch.ones(4, 32)),
        [f"{Q}.lora_A.weight", f"{Q}.lora_A.default.weight", "same"],
    ),
    "no float": (tensor(f"{Q}.lora_A.weight", torch.ones(4, 32, dtype=torch.int8)), [f"{Q}.lora_A.weight", "I8"]),
    "NaN": (poison(f"{Q}.lora_A.weight", float("nan")), [f"{Q}.lora_A.weight", "nan", "finite"]),
    "infinity": (poison(f"{UP}.lora_B.weight", float("inf")), [f"{UP}.lora_B.weight", "inf", "finite"]),
}


@pytest.mark.parametrize("row", BAD)
def test_what_is_not_plain_lora_is_refused(row: str, lora: Path) -> None:
    damage, named = BAD[row]
    damage(lora / "code")
    with pytest.raises(SeedError) as refusal:
        plan_merge(load_recipe("bam"), read_seeds([f"{lora / 'base'}", f"{lora / 'base'}+{lora / 'code'}"]))
    message = str(refusal.value)
    assert message.startswith("seed 'code': ")
    assert len(message) < 700
    for word in (str(lora / "code"), *named):
        assert word in message, message


def test_a_nan_that_only_the_data_shows_leaves_nothing(lora: Path) -> None:
    edit(lora / "code", lambda state: state[f"{UP}.lora_B.weight"].__setitem__((0, 0), float("nan")))
    result = run_cli("merge", "--seeds", "base", "base+code", "--recipe", "bam", "--out", "out", cwd=lora)
    assert result.returncode == 1
    for word in ("error: seed 'code'", f"{UP}.lora_B.weight", "holds nan"):
        assert word in result.stderr
    assert {path.name for path in lora.iterdir()} == {"base", "code", "law"}


@pytest.mark.parametrize("config", [{"target_modules": ["embed_tokens"]}, {"modules_to_save": ["lm_head"]}])
def test_an_adapter_on_tied_embeddings_is_refused(config: dict[str, Any], tmp_path: Path) -> None:
    base = make_seed(BY_NAME["llama-biases"], tmp_path / "base", 0)
    with pytest.raises(SeedError, match=r"'lora'.*ties its output head"):
        read_seeds([f"{base}+{make_adapter(base, tmp_path / 'lora', **config)}"])


def test_names_of_older_versions_are_taken(lora: Path) -> None:
    base = str(lora / "base")
    make_adapter(lora / "base", lora / "head", modules_to_save=["lm_head"])
    before = whole(read_seed("x", f"{base}+{lora / 'head'}"))
    state = load_file(lora / "head" / "adapter_model.safetensors")
    renamed = {
        key.replace(".lora_A.", ".lora_A.default.").replace("lm_head.", "lm_head.modules_to_save.default."): value
        for key, value in state.items()
    }
    assert {*renamed} != {*state}
    save_file(renamed, lora / "head" / "adapter_model.safetensors")
    after = whole(read_seed("x", f"{base}+{lora / 'head'}"))
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_adapters_on_the_hub(lora: Path, hub: HubServer) -> None:
    """Planned from headers, then downloaded: a base that several seeds share once."""
    for name in ("base", "code", "law"):
        card = {"README.md": "---\nlicense: apache-2.0\n---\n"}
        hub.add_model(f"org/{name}", {**{file.name: file.read_bytes() for file in (lora / name).iterdir()}, **card})
    environment = hub.environment(lora / "home")
    remote = ["org/base", "org/base+org/code", "jus=org/base+org/law@main"]
    planned = run_cli("plan", "--seeds", *remote, "--recipe", "bam", "--json", cwd=lora, **environment)
    assert planned.returncode == 0, planned.stderr
    sizes = [(lora / "base" / "model.safetensors").stat().st_size]
    sizes += [(lora / name / "adapter_model.safetensors").stat().st_size for name in ("code", "law")]
    assert sum(sizes) <= json.loads(planned.stdout)["download_bytes"] < sum(sizes) + 10_000
    done = run_cli("merge", "--seeds", *remote, "--recipe", "bam", "--out", "remote", cwd=lora, **environment)
    assert done.returncode == 0, done.stderr
    local = ["base", "base+code", "jus=base+law"]
    assert run_cli("merge", "--seeds", *local, "--recipe", "bam", "--out", "local", cwd=lora).returncode == 0
    assert (lora / "local/model.safetensors").read_bytes() == (lora / "remote/model.safetensors").read_bytes()
    record = json.loads((lora / "remote" / "upcycle.json").read_text())
    assert record["plan"] == json.loads((lora / "local" / "upcycle.json").read_text())["plan"]
    assert record["seeds"][1]["adapter"] == {
        "name": "code",
        "repository": "org/code",
        "revision": hub.repo("org/code").find().oid,
        "license": "apache-2.0",
    }
    offline = {**environment, "HF_HUB_OFFLINE": "1"}
    verified = run_cli("verify", "remote", "--seeds", *remote, cwd=lora, **offline)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    alone = run_cli("plan", "--seeds", "org/base", "org/code", "--recipe", "bam", cwd=lora, **environment)
    assert "adapter alone; give it with its base" in alone.stderr


def test_an_adapters_licence_counts() -> None:
    seed = {"name": "code", "license": "mit", "adapter": {"license": "mit"}}
    assert licensing({"seeds": [seed]}).license == "mit"
    other = licensing({"seeds": [{**seed, "adapter": {"license": "cc-by-nc-4.0"}}]})
    assert other.license is None
    assert "adapter of code" in other.problems[0]
    assert licensing({"seeds": [{**seed, "adapter": {}}]}).license is None
