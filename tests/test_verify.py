"""Checksums made while writing, and what a verification finds."""

import json
import random
import shutil

import numpy as np
import pytest
import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.conftest import run_cli
from tests.test_merge import make_plan
from tests.training import run as run_training
from upcycle import checksums
from upcycle.checkpoint import CARD
from upcycle.checksums import SUMS, sums_of
from upcycle.errors import CheckpointError
from upcycle.merge import merge
from upcycle.verify import verify

FLIPS = 200


@pytest.fixture
def merged(seeds, tmp_path):
    """A mixture in two shards."""
    merge(make_plan(seeds), tmp_path / "out", max_shard_size=60_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    return tmp_path / "out"


def flip(file, bit):
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


@pytest.mark.parametrize("stretch", [1 << 20, 5000, 64])
def test_sums_are_those_of_the_bytes(seeds, tmp_path, monkeypatch, stretch):
    """Against xxhash over what the safetensors library reads."""
    monkeypatch.setattr(checksums, "STRETCH", stretch)
    merge(make_plan(seeds), tmp_path / "out")
    sums = json.loads((tmp_path / "out" / SUMS).read_text())
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert sums["tensors"].keys() == tensors.keys()
    for name, tensor in tensors.items():
        data = tensor.contiguous().view(-1).view(dtype=torch.uint8).numpy().tobytes()
        parts = [data[start : start + stretch] for start in range(0, len(data), stretch)]
        assert sums["tensors"][name] == [xxhash.xxh3_64_hexdigest(part) for part in parts]
    for name, entry in sums["files"].items():
        data = (tmp_path / "out" / name).read_bytes()
        assert entry["size"] == len(data)
        if not name.endswith(".safetensors"):
            assert entry["sum"] == xxhash.xxh3_64_hexdigest(data)


def test_pieces_of_any_length_give_the_same_sums(monkeypatch):
    monkeypatch.setattr(checksums, "STRETCH", 100)
    data = np.random.default_rng(0).bytes(1234)
    whole = sums_of([memoryview(data)])
    assert len(whole) == 13
    draw = random.Random(0)
    for _ in range(50):
        cuts = sorted(draw.sample(range(1235), 9))
        pieces = [data[a:b] for a, b in zip([0, *cuts], [*cuts, 1234], strict=True)]
        assert sums_of(memoryview(piece) for piece in pieces) == whole
    assert len(sums_of([memoryview(data[:1200])])) == 12
    assert sums_of([memoryview(b"")]) == []


def test_all_is_well(merged, seeds):
    found = verify(merged, [str(seed) for seed in seeds], load=True)
    assert found.problems == []
    sums = json.loads((merged / SUMS).read_text())
    assert found.files == len(sums["files"]) == len([p for p in merged.iterdir() if p.name not in (SUMS, CARD)])
    assert found.tensors == found.finite == found.remade == len(sums["tensors"])
    assert found.loaded


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("bam-kv-shared", {}),
        ("average", {"dtype": "F32"}),
        ("btx", {"dtype": "F16", "random_seed": 7}),
    ],
)
def test_seeds_give_every_recipe_again(seeds, tmp_path, recipe, options):
    merge(make_plan(seeds, recipe, **options), tmp_path / "out")
    found = verify(tmp_path / "out", [str(seed) for seed in seeds])
    assert found.problems == []
    assert found.remade == found.tensors


def test_copies_of_one_seed_are_made_again(seeds, tmp_path):
    merge(make_plan(seeds[:1], "sparse-upcycling", num_experts=5), tmp_path / "out")
    found = verify(tmp_path / "out", [str(seeds[0])])
    assert found.problems == []
    assert found.remade == found.tensors


def test_a_flipped_bit_anywhere_is_found(merged):
    flipped(merged, FLIPS)


@pytest.mark.slow
def test_a_thousand_flipped_bits_are_found(merged):
    flipped(merged, 1000)


def flipped(folder, count):
    draw = random.Random(0)
    files = sorted(path for path in folder.iterdir() if path.name != CARD)  # people edit it
    sizes = [file.stat().st_size for file in files]
    seen = set()
    for number in range(count):
        # Every file in its turn, then by size, as a disk would.
        file = files[number] if number < len(files) else draw.choices(files, sizes)[0]
        bit = draw.randrange(8 * file.stat().st_size)
        flip(file, bit)
        assert verify(folder).problems, (file.name, bit)
        flip(file, bit)
        seen.add(file.name)
    assert verify(folder).problems == []
    assert len(seen) == len(files)


def test_a_damaged_tensor_is_named_with_its_place(merged):
    file = min(merged.glob("*.safetensors"))
    with safe_open(file, "pt") as handle:
        names = list(handle.keys())
    flip(file, 8 * (file.stat().st_size - 1))
    found = verify(merged)
    assert len(found.problems) == 1
    assert f"{file}: tensor '" in found.problems[0]
    assert any(f"'{name}'" in found.problems[0] for name in names)
    assert "bytes 0 to" in found.problems[0]


def test_what_is_missing_or_came_later_is_found(merged):
    moved = merged / "tokenizer.json"
    moved.rename(merged.parent / "tokenizer.json")
    assert "tokenizer.json is missing" in verify(merged).problems[0]
    (merged.parent / "tokenizer.json").rename(moved)
    (merged / "sitecustomize.py").write_text("print('hello')")
    assert "sitecustomize.py is not among the files" in verify(merged).problems[0]
    (merged / "sitecustomize.py").unlink()
    (merged / "README.md").write_text("a card that somebody wrote")
    assert verify(merged).problems == []
    shutil.copy(moved, merged / "link-target")
    moved.unlink()
    moved.symlink_to(merged / "link-target")
    assert verify(merged).problems


def test_numbers_that_are_not_finite_are_found_without_checksums(merged):
    (merged / SUMS).unlink()
    file = next(merged.glob("*.safetensors"))
    tensors = load_file(file)
    name = next(iter(tensors))
    tensors[name].view(-1)[0] = float("inf")
    save_file(tensors, file, metadata={"format": "pt"})
    found = verify(merged)
    assert found.unsummed
    assert found.problems == [f"{file}: tensor '{name}' holds numbers that are not finite"]


def test_other_seeds_are_told(merged, seeds):
    paths = [str(seed) for seed in seeds]
    assert "in that order" in verify(merged, paths[::-1]).problems[0]
    file = seeds[1] / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"] *= 2
    save_file(tensors, file, metadata={"format": "pt"})
    found = verify(merged, paths)
    assert len(found.problems) == 1
    assert "these seeds do not give the plan" in found.problems[0]


def test_a_targeted_edit_of_a_seed_is_seen_in_its_tensor(seeds, tmp_path, monkeypatch):
    """One number, in an element that no fingerprint samples."""
    monkeypatch.setattr("upcycle.ancestry.SAMPLE_ELEMENTS", 64)
    merged = tmp_path / "out"
    merge(make_plan(seeds), merged)
    file = seeds[1] / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"].view(-1)[0] *= 2
    save_file(tensors, file, metadata={"format": "pt"})
    problems = verify(merged, [str(seed) for seed in seeds]).problems
    assert len(problems) == 1
    assert "layers.1.mlp.experts.gate_up_proj' is not what the seeds give" in problems[0]


def test_damaged_sums_are_refused_by_their_own_digest(merged):
    sums = json.loads((merged / SUMS).read_text())
    sums["tensors"] = {name: [] for name in sums["tensors"]}
    (merged / SUMS).write_text(json.dumps(sums))
    assert "its own digest is" in verify(merged).problems[0]


def test_a_training_is_verified_too(mixture, data, tmp_path):
    run_training(mixture, data, tmp_path / "out", steps=2)
    found = verify(tmp_path / "out", load=True)
    assert found.problems == []
    assert not found.unsummed
    assert found.tensors == found.finite > 0


def test_the_command(merged, seeds, tmp_path):
    done = run_cli("verify", merged, "--seeds", *seeds, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["problems"] == []
    assert result["checksums"]
    assert result["remade"] == result["tensors"]
    flip(next(merged.glob("*.safetensors")), 8 * 5000)
    done = run_cli("verify", merged)
    assert done.returncode == 1
    assert "checksum" in done.stderr
    assert "1 problem" in done.stdout
    done = run_cli("verify", tmp_path / "nowhere")
    assert done.returncode == 1
    assert "holds no config.json" in done.stderr
    with pytest.raises(CheckpointError):
        verify(tmp_path / "nowhere")
