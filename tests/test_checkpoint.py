"""Headers, shards and the staging folder."""

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from upcycle.checkpoint import (
    check_target,
    partial_folder,
    plan_shards,
    read_header,
    read_json,
    read_tensors,
    staging,
)
from upcycle.errors import CheckpointError, OutputError


def write(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(begin, end, shape=None, dtype="F32"):
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


def test_a_header_says_where_each_tensor_lies(tmp_path):
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float16)}
    save_file(arrays, tmp_path / "x.safetensors")
    raw = (tmp_path / "x.safetensors").read_bytes()
    for name, info in read_header(tmp_path / "x.safetensors").items():
        assert info.shape == arrays[name].shape
        assert raw[info.offset : info.offset + info.nbytes] == arrays[name].tobytes()


@pytest.mark.parametrize(
    ("header", "data", "length", "message"),
    [
        ({"a": entry(0, 8)}, b"1234", None, "truncated"),
        ({"a": entry(0, 8)}, b"123456789", None, "truncated or damaged"),
        ({"a": entry(0, 4)}, b"1234", 10**12, "truncated or no safetensors"),
        (b"", b"", 0, "cannot be read"),
        (b"[]", b"", None, "no JSON object"),
        (b"{not json", b"", None, "cannot be read"),
        (b'{"a": 1, "a": 2}', b"", None, "twice"),
        (b"[" * 100_000, b"", None, "cannot be read"),
        ({"a": entry(0, 4), "b": entry(0, 4)}, b"1234", None, "expected"),
        ({"a": entry(4, 8)}, b"12345678", None, "expected"),
        ({"a": entry(0, 8, [3])}, b"12345678", None, "not the 8 bytes"),
        ({"a": entry(0, 4, [-1])}, b"1234", None, "damaged"),
        ({"a": {"dtype": "F32", "shape": [1]}}, b"1234", None, "damaged"),
        ({"a": entry(0, 4, [1], "F31")}, b"1234", None, "not known"),
    ],
)
def test_a_damaged_file_is_refused(header, data, length, message, tmp_path):
    with pytest.raises(CheckpointError) as caught:
        read_header(write(tmp_path / "x.safetensors", header, data, length))
    assert message in str(caught.value)
    assert "x.safetensors" in str(caught.value)


def test_shards_are_laid_out_and_read_back(tmp_path):
    tensors = [(f"t{i}", "F32", (10, 10)) for i in range(5)]
    shards = plan_shards(tensors, 1000)
    assert [shard.name for shard in shards] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    for shard in shards:
        (tmp_path / shard.name).write_bytes(shard.header + bytes(shard.size - len(shard.header)))
        with safe_open(tmp_path / shard.name, "np") as file:
            assert set(file.keys()) == set(shard.offsets)
    assert [shard.name for shard in plan_shards(tensors, 10**6)] == ["model.safetensors"]
    assert len(plan_shards(tensors, 1)) == 5  # a tensor is never split


@pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", 3, "x.bin"])
def test_an_index_never_leads_out_of_its_folder(shard, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(CheckpointError, match="same folder"):
        read_tensors(tmp_path)


def test_an_index_and_its_shards_must_agree(tmp_path):
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "x.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "x.safetensors", "b": "x.safetensors"}}))
    with pytest.raises(CheckpointError, match="does not hold it"):
        read_tensors(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "y.safetensors"}}))
    with pytest.raises(CheckpointError, match="missing"):
        read_tensors(tmp_path)


def test_pickle_is_refused_with_the_way_to_convert(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="save_pretrained"):
        read_tensors(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", "\xff", "[" * 100_000])
def test_bad_json_is_refused(text, tmp_path):
    (tmp_path / "x.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"x\.json"):
        read_json(tmp_path / "x.json")


def test_staging_shows_all_or_nothing(tmp_path):
    out = tmp_path / "out"
    with staging(out) as partial:
        (partial / "a").write_text("1")
        assert not out.exists()
    assert (out / "a").read_text() == "1"

    def interrupted():
        with staging(out) as partial:
            (partial / "a").write_text("2")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (out / "a").read_text() == "1"
    with staging(out):
        pass
    assert list(tmp_path.iterdir()) == [out]
    assert not list(out.iterdir())


def test_two_processes_never_write_one_output(tmp_path):
    with staging(tmp_path / "out"), pytest.raises(OutputError, match="another process"), staging(tmp_path / "out"):
        pass
    assert (tmp_path / "out").exists()


def test_a_lock_on_a_folder_that_was_put_in_its_place_is_none(tmp_path, monkeypatch):
    """Opened just before its holder renamed it: by then another process may hold a new one of that name."""
    out, real = tmp_path / "out", fcntl.flock
    partial = partial_folder(out)

    def late(lock, how):
        monkeypatch.setattr(fcntl, "flock", real)
        partial.rename(tmp_path / "finished")
        partial.mkdir()
        (partial / "theirs").touch()
        late.holder = os.open(partial, os.O_RDONLY)
        real(late.holder, how)
        real(lock, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(OutputError, match="another process"), staging(out):
        pass
    assert (partial / "theirs").exists()
    os.close(late.holder)
    with staging(out) as free:
        assert not list(free.iterdir())


def test_a_former_result_that_a_killed_overwrite_left_aside_is_put_back_first(tmp_path):
    out = tmp_path / "out"
    with staging(out) as partial:
        (partial / "upcycle.json").write_text("{}")
    out.rename(tmp_path / ".out.upcycle-old")
    with pytest.raises(OutputError, match="exists; --yes overwrites it"):
        check_target(out, False, [])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    check_target(out, True, [])
    out.rename(tmp_path / ".out.upcycle-old")
    out.mkdir()
    with staging(out):
        assert (out / "upcycle.json").exists()  # an empty folder is no result


def test_tables_in_tables_are_refused_at_any_depth(tmp_path):
    for depth, fine in ((40, True), (60, False), (900, False)):
        (tmp_path / "x.json").write_text('{"a":' * depth + "1" + "}" * depth)
        if fine:
            read_json(tmp_path / "x.json")
        else:
            with pytest.raises(CheckpointError, match="deep"):
                read_json(tmp_path / "x.json")


def test_remains_of_a_killed_run_do_not_enter_the_next(tmp_path):
    with staging(tmp_path / "other") as partial:
        stale = tmp_path / partial.name.replace("other", "out")
    stale.mkdir()
    (stale / "half.safetensors").write_text("half")
    with staging(tmp_path / "out"):
        pass
    assert not list((tmp_path / "out").iterdir())


def test_a_former_result_comes_back_when_replacing_fails(tmp_path, monkeypatch):
    out = tmp_path / "out"
    with staging(out) as partial:
        (partial / "a").write_text("1")
    real, calls = Path.rename, []

    def failing(self, target):
        calls.append(target)
        if len(calls) == 2:
            raise PermissionError("no")
        return real(self, target)

    def replace():
        with staging(out) as partial:
            (partial / "a").write_text("2")

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(PermissionError):
        replace()
    monkeypatch.undo()
    assert (out / "a").read_text() == "1"
    # A kill between the two renames leaves the former result beside; the next run brings it back or replaces it.
    out.rename(tmp_path / ".out.upcycle-old")
    replace()
    assert (out / "a").read_text() == "2"
    assert list(tmp_path.iterdir()) == [out]


def test_only_a_former_result_is_overwritten(tmp_path):
    out, seed = tmp_path / "out", tmp_path / "seed"
    seed.mkdir()
    check_target(out, False, [seed])
    out.mkdir()
    check_target(out, False, [seed])  # empty
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="never overwritten"):
        check_target(out, True, [seed])
    (out / "upcycle.json").write_text("{}")
    with pytest.raises(OutputError, match=r"holds 'thesis\.txt'"):
        check_target(out, True, [seed])
    (out / "thesis.txt").unlink()
    with pytest.raises(OutputError, match="--yes"):
        check_target(out, False, [seed])
    check_target(out, True, [seed])
    for within in (seed, seed / "sub", tmp_path):
        with pytest.raises(OutputError, match="within one another"):
            check_target(within, True, [seed])


def test_merges_to_one_output_at_once_show_whole_results_alone(tmp_path):
    command = [sys.executable, "-m", "tests.fuzz.at_once", str(tmp_path / "x"), "3"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
    seen = json.loads(done.stdout)
    assert seen.keys() == {"seen", "refused", "merged", "whole at the end", "left beside it"}
    assert min(seen["seen"], seen["refused"], seen["merged"]) > 0
    assert seen["whole at the end"]
    assert not seen["left beside it"]
