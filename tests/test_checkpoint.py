"""Headers, shards and the staging folder."""

import json

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from upcycle.checkpoint import plan_shards, read_header, read_json, read_tensors
from upcycle.errors import CheckpointError


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


def test_tables_in_tables_are_refused_at_any_depth(tmp_path):
    for depth, fine in ((40, True), (60, False), (900, False)):
        (tmp_path / "x.json").write_text('{"a":' * depth + "1" + "}" * depth)
        if fine:
            read_json(tmp_path / "x.json")
        else:
            with pytest.raises(CheckpointError, match="deep"):
                read_json(tmp_path / "x.json")
