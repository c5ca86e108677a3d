"""What several test files share: tiny related seeds with a tokenizer, and the command line as a process."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import upcycle
from tests.hub_server import HubServer
from tests.tiny import BY_NAME, VOCAB, make_seed, make_seeds
from upcycle.merge import merge
from upcycle.plan import plan_merge
from upcycle.recipe_file import load_recipe
from upcycle.seeds import read_seeds

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def tokenizer_json(swap: tuple[int, int] | None = None) -> str:
    """A word-level tokenizer of `VOCAB` words; `swap` exchanges two ids."""
    ids = list(range(VOCAB))
    if swap:
        ids[swap[0]], ids[swap[1]] = ids[swap[1]], ids[swap[0]]
    vocabulary = {f"word{i}": ids[i] for i in range(VOCAB)}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "word0"}
    split = {"type": "WhitespaceSplit"}
    return json.dumps({"version": "1.0", "added_tokens": [], "pre_tokenizer": split, "model": model})


def write_tokenizer(folder: Path, swap: tuple[int, int] | None = None) -> None:
    (folder / "tokenizer.json").write_text(tokenizer_json(swap))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def branch(base: Path, folder: Path, random_seed: int, scale: float = 0.02) -> Path:
    """A related seed: the base with noise on every weight, as a short training leaves it."""
    shutil.copytree(base, folder)
    generator = torch.Generator().manual_seed(random_seed)
    state = load_file(folder / "model.safetensors")
    noisy = {
        name: (w.float() + scale * w.float().std() * torch.randn(w.shape, generator=generator)).to(w.dtype)
        for name, w in state.items()
    }
    save_file(noisy, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """A Hub of this test's own."""
    with HubServer() as server:
        yield server


@pytest.fixture
def base_seed(made_seed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in bf16 with a tokenizer, named `base`; a test may change it."""
    return shutil.copytree(made_seed, tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="session")
def made_seed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The one that every test's own is a copy of."""
    folder = make_seed(BY_NAME["llama"], tmp_path_factory.mktemp("base") / "base", 0, torch.bfloat16)
    write_tokenizer(folder)
    return folder


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., Any]:
    """A function that merges three random seeds of a case and loads the result in fp32."""

    def make(name: str, recipe: str, *overrides: str, **options: Any) -> Any:
        paths = make_seeds(BY_NAME[name], tmp_path / name)
        return merge_and_load(paths, tmp_path / f"{name}-{recipe}", recipe, *overrides, **options).eval()

    return make


@pytest.fixture
def seeds(base_seed: Path, tmp_path: Path) -> list[Path]:
    """Three specialists of one ancestor, `code`, `law` and `math`; a test may damage them."""
    return [branch(base_seed, tmp_path / name, index + 1) for index, name in enumerate(("code", "law", "math"))]


@pytest.fixture
def mixture(tmp_path: Path) -> Path:
    merge_and_load(make_seeds(BY_NAME["llama"], tmp_path / "seeds", dtype=torch.bfloat16), tmp_path / "mixture", "bam")
    return tmp_path / "mixture"


@pytest.fixture
def data(tmp_path: Path) -> dict[str, str]:
    """Two domains whose tokens follow one another by a rule, so that there is something to learn."""
    sources = {}
    for name, step in (("code", 3), ("law", 7)):
        random = np.random.default_rng(step)
        tokens = (random.integers(VOCAB) + step * np.arange(3000)) % (VOCAB - 3) + 3
        np.save(tmp_path / f"{name}.npy", tokens.astype(np.uint16))
        sources[name] = str(tmp_path / f"{name}.npy")
    return sources


def run_cli(*arguments: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `upcycle` as a process of its own."""
    command = [sys.executable, "-m", "upcycle", *map(str, arguments)]
    variables = {**os.environ, "NO_COLOR": "1", "COLUMNS": "200", **environment}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=variables, timeout=120, check=False)


def merge_and_load(
    paths: Sequence[Path | str],
    out: Path,
    recipe: str,
    *overrides: str,
    dtype: torch.dtype = torch.float32,
    format: str = "bam",
) -> Any:
    """Merge seeds, related or not, and load the mixture."""
    upcycle.register()
    loaded = load_recipe(recipe, overrides)
    wanted = format if loaded.ffn_experts else "auto"
    plan = plan_merge(loaded, read_seeds([str(path) for path in paths]), allow_unrelated=True, format=wanted)
    merge(plan, out)
    return AutoModelForCausalLM.from_pretrained(out, dtype=dtype)


def words(path: Path) -> dict[str, np.ndarray]:
    """A checkpoint's tensors as raw bits, to compare exactly."""
    return {name: tensor.view(torch.int16).numpy() for name, tensor in load_file(path / "model.safetensors").items()}
