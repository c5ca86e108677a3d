"""Hostile and damaged inputs: mutated checkpoints, files as large as they may be, no network, no secrets."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import run_cli
from tests.fuzz.checkpoints import as_json, checkpoint, config, write
from upcycle.checkpoint import INDEX, MAX_HEADER, MAX_INDEX, MAX_JSON, MAX_VALUES, WEIGHTS

ROOT = Path(__file__).parents[1]
SECONDS, MEGABYTES = 5, 300  # what one command may take to refuse a file
TOKEN = "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"


def fuzz(count, random_seed, seconds):
    command = [sys.executable, "-m", "tests.fuzz", "--count", str(count), "--random-seed", str(random_seed)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False)
    print(done.stdout)  # shown with pytest -rP
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_mutated_checkpoints_end_in_words(tmp_path):
    said = fuzz(300, 1, 60)
    assert "300 inputs" in said
    for result in ("merged and verified", "mixture read", "SeedError", "CheckpointError"):
        assert result in said


@pytest.mark.slow
def test_very_many_mutated_checkpoints_end_in_words():
    fuzz(20_000, 0, 1500)


@pytest.fixture
def pair(tmp_path):
    """Two seeds to spoil, `a` and `b`."""
    for index, name in enumerate("ab"):
        write(tmp_path / name, checkpoint(config(), index, max_shard_size=10**9))
    return tmp_path


def with_header(text):
    return len(text).to_bytes(8, "little") + text


def filled(before, unit, after, size, joint=b","):
    """JSON of just below `size` bytes that repeats one unit."""
    count = (size - len(before) - len(after)) // (len(unit) + len(joint))
    text = before + joint.join([unit] * count) + after
    assert size - 200 < len(text) <= size
    return text


WIDE = "😀".encode()  # one such character makes Python take four bytes for each of a text
ENTRY = b'{"dtype":"BF16","shape":[0],"data_offsets":[0,0]}'
NUMBERED = b"%07d"


def most(before, unit, after, values, size=MAX_HEADER):
    """JSON that repeats a unit of so many values as often as is allowed, with spaces up to `size`."""
    size -= len(before) + len(after)
    count = min(MAX_VALUES // values - 40, size // (len(unit.replace(NUMBERED, b"0" * 7)) + 1))
    units = [unit.replace(NUMBERED, NUMBERED % i) for i in range(count)] if NUMBERED in unit else [unit] * count
    space = b" " * ((size - count * (len(units[0]) + 1)) // count - 1)
    return before + (b"," + space).join(units) + after


HEADERS = {
    "values": filled(b'{"a":[', b"1", b"]}", MAX_HEADER),
    "floats": filled(b'{"a":[', b"0.1234567890123456", b"]}", MAX_HEADER),
    "tables": filled(b'{"a":[', b'{"b":1,"c":{}}', b"]}", MAX_HEADER),
    "as many lists as may be": most(b'{"a":[', b"[]", b"]}", 2),
    "as many tables as may be": most(b'{"a":[', b'{"b":1}', b"]}", 3),
    "as many pairs as may be": most(b'{"a":[', b'{"b":1,"c":1,"d":1,"e":1,"f":1,"g":1}', b"]}", 13),
    "as many numbers as may be": most(b'{"a":[', b"1234567890.5", b"]}", 1),
    "as many tensors as may be": most(b"{", b'"t%07d":' + ENTRY, b"}", 11),
    "as many tensors of nothing": most(b"{", b'"t%07d":3', b"}", 2),
    "as many wide names as may be": most(b"{", b'"' + WIDE + b'%07d":3', b"}", 2),
    "nested": b"[" * (MAX_HEADER - 1),
    "nested tables": filled(b"", b'{"a":', b"", MAX_HEADER, b""),
    "nested and few": b'{"a":' * 1400 + b"1" + b"}" * 1400 + b" " * (MAX_HEADER - 9000),
    "a long name": b'{"' + b"x" * (MAX_HEADER - 50) + b'":3}',
    "a long wide name": b'{"' + b"x" * (MAX_HEADER - 50) + WIDE + b'":3}',
    "a long dtype": b'{"a":{"shape":[0],"data_offsets":[0,0],"dtype":"'
    + b"\\n" * (MAX_HEADER // 2 - 60)
    + WIDE
    + b'"}}',
    "a long shape": filled(b'{"a":{"dtype":"F32","data_offsets":[0,0],"shape":[', b"1" + b" " * 20, b"]}}", MAX_HEADER),
    "escapes": filled(b'{"', b"\\ud83d\\ude00", b'":3}', MAX_HEADER, b""),
    "a long number": b'{"a":' + b"9" * (MAX_HEADER - 10) + b"}",
    "not UTF-8": b'{"a":"' + b"\xff" * (MAX_HEADER - 10) + b'"}',
    "not closed": b'{"' + b"x" * (MAX_HEADER - 10) + WIDE,
    "spaces": b" " * MAX_HEADER,
}
SIZELESS = as_json({key: value for key, value in config().items() if key != "hidden_size"})[1:]
CONFIGS = {
    "values": most(b'{"a":[', b"1", b"]," + as_json(config())[1:], 1, MAX_JSON),
    "lists": most(b'{"a":[', b"[]", b"]," + as_json(config())[1:], 2, MAX_JSON),
    "tables": most(b'{"a":[', b'{"b":1}', b"]," + as_json(config())[1:], 3, MAX_JSON),
    "pairs": most(b'{"a":{', b'"%07d":1', b"}," + as_json(config())[1:], 2, MAX_JSON),
    "a long type": b'{"model_type":"' + b"x" * (MAX_JSON - 30) + WIDE + b'"}',
    "nested": filled(b"", b'{"a":', b"", MAX_JSON, b""),
    "layers": most(b'{"layer_types":[', b"1", b"]," + as_json(config("qwen3"))[1:], 1, MAX_JSON),
    "a long size": b'{"hidden_size":"' + b"x" * (MAX_JSON - 500) + WIDE + b'",' + SIZELESS,
    "a long list for a number": most(b'{"rope_theta":[', b"1", b"]," + as_json(config())[1:], 1, MAX_JSON),
    "a long rope": most(b'{"rope_scaling":{"x":[', b"1", b"]}," + as_json(config(vocab_size=25))[1:], 1, MAX_JSON),
    "many layers": as_json(config(num_hidden_layers=4096, vocab_size=2**24, hidden_size=2**20)),
}
INDEXES = {
    "shards": most(b'{"weight_map":{', b'"t%07d":"%07d.safetensors"', b"}}", 2, MAX_INDEX),
    "one shard": most(b'{"weight_map":{', b'"t%07d":"shard.safetensors"', b"}}", 2, MAX_INDEX),
    "no shard": filled(b'{"weight_map":[', b"{} ", b"]}", MAX_INDEX),
    "a long shard": b'{"weight_map":{"a":"' + b"x" * (MAX_INDEX - 100) + WIDE + b'.safetensors"}}',
    "a long name": b'{"weight_map":{"' + b"x" * (MAX_INDEX - 100) + WIDE + b'":"model.safetensors"}}',
    "another file": b'{"weight_map":{"a":"' + b"/" * (MAX_INDEX - 100) + WIDE + b'"}}',
    "nested": filled(b'{"weight_map":', b'{"a":', b"", MAX_INDEX, b""),
}
TOKENIZERS = {
    "one token": as_json({"model": {"vocab": {"x" * 3_000_000: 1}}}),
    "unigram": b'{"model":{"vocab":[' + b",".join([b'["x",1]'] * 490_000) + b"]}}",
    "infinity": b'{"model":{"vocab":{"a":1e999}}}',
}
CARDS = {
    "bomb": b"---\na: &a {x: 1}\n"
    + b"\n".join(b"%c: &%c {<<: [%s]}" % (n + 1, n + 1, b",".join([b"*%c" % n] * 9)) for n in range(97, 105))
    + b"\n---\n",
    "long": b"---\n" + b"- a: [b, c]\n" * 80_000 + b"---\n",
}
FILES = {WEIGHTS: HEADERS, "config.json": CONFIGS, INDEX: INDEXES, "tokenizer.json": TOKENIZERS, "README.md": CARDS}
# The worst of each kind; all others are slow tests.
FIRST = ("a long wide name", "as many pairs as may be", "as many wide names as may be", "nested and few", "tables")
FIRST += ("a long type", "shards", "a long shard", "infinity", "long")
HOSTILE = [
    pytest.param(file, case, marks=[] if case in FIRST else [pytest.mark.slow])
    for file, cases in FILES.items()
    for case in cases
]
MEASURED = """
import resource, subprocess, sys
done = subprocess.run([sys.executable, "-m", "upcycle", *sys.argv[1:]])
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_utime + used.ru_stime, used.ru_maxrss / 1000)
sys.exit(done.returncode)
"""


def measured(folder, *arguments):
    """A command, its seconds of processor time and its peak MB, by a small process: a fork's peak begins with ours."""
    command = [sys.executable, "-c", MEASURED, *map(str, arguments)]
    variables = {**os.environ, "NO_COLOR": "1", "COLUMNS": "200"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=variables, timeout=90, check=False)
    *_, last = done.stdout.splitlines()
    seconds, megabytes = map(float, last.split())
    return done, seconds, megabytes


def spoil(folder, file, data):
    """Put a hostile file into a seed."""
    if file == INDEX:
        (folder / WEIGHTS).rename(folder / "shard.safetensors")
    (folder / file).write_bytes(with_header(data) if file == WEIGHTS else data)


@pytest.mark.parametrize(("file", "case"), HOSTILE, ids=lambda value: value.replace(" ", "-"))
def test_a_hostile_file_is_refused_in_little_time_and_memory(file, case, pair):
    data = FILES[file][case]
    assert len(data) <= {WEIGHTS: MAX_HEADER, INDEX: MAX_INDEX, "config.json": MAX_JSON}.get(file, 10**8)
    for name in "ab" if file == "config.json" else "a":
        spoil(pair / name, file, data)
    done, seconds, megabytes = measured(pair, "merge", "--seeds", "a", "b", "--recipe", "bam", "--out", "out")
    print(f"{file} {case}: {seconds:.1f} s, {megabytes:.0f} MB: {done.stderr[:200]}")
    assert "Traceback" not in done.stderr
    assert "unexpected" not in done.stderr
    if done.returncode == 0 or file == "README.md":  # what says nothing of the model does no harm
        assert done.returncode == 0, done.stderr
        checked = run_cli("verify", "out", "--seeds", "a", "b", cwd=pair)  # what is written can be read
        assert checked.returncode == 0, checked.stderr[:1000]
    else:
        assert done.returncode == 1
        assert done.stderr.startswith("error: seed '")
        assert len(done.stderr) < 2100
        assert sorted(path.name for path in pair.iterdir()) == ["a", "b"]
    assert seconds < SECONDS
    assert megabytes < MEGABYTES


OFFLINE = """
import sys
sys.path.insert(0, sys.argv[1])
def refuse(event, arguments):
    if event.startswith("socket."):
        print("NETWORK", event, arguments, file=sys.stderr)
        raise SystemExit("network")
sys.addaudithook(refuse)
from upcycle.cli.main import main
main(sys.argv[2:])
"""


@pytest.mark.parametrize(
    "command",
    [
        ("merge", "--seeds", "a", "b", "--recipe", "bam", "--out", "out"),
        ("merge", "--seeds", "a", "b", "--recipe", "average", "--dry-run"),
        ("plan", "--seeds", "a", "b", "--recipe", "btx"),
        ("plan", "--config", "a/config.json", "--num-experts", "4", "--recipe", "bam", "--json"),
    ],
    ids=lambda command: "-".join(command[:2] + command[-1:]),
)
def test_local_seeds_need_no_network(command, pair):
    """Creating a socket, or asking for an address, is already too much."""
    variables = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    program = [sys.executable, "-c", OFFLINE, str(ROOT), *command]
    done = subprocess.run(program, cwd=pair, env=variables, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "NETWORK" not in done.stderr
    probe = "import socket; socket.socket()"
    refused = OFFLINE.split("from upcycle")[0] + probe
    done = subprocess.run([sys.executable, "-c", refused, "."], capture_output=True, text=True, check=False)
    assert "NETWORK socket.__new__" in done.stderr  # so the hook does see one


def test_a_token_is_never_shown_nor_written(pair):
    home = pair / "home"
    environment = {"HF_TOKEN": TOKEN, "HUGGING_FACE_HUB_TOKEN": TOKEN, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    (pair / "bad").mkdir()
    commands = [
        ("merge", "--seeds", "a", "b", "--recipe", "bam", "--out", "out", "--json"),
        ("plan", "--seeds", "a", "b", "--recipe", "bam"),
        ("inspect", "out"),
        ("verify", "out", "--seeds", "a", "b"),
        ("merge", "--seeds", "a", "bad", "--recipe", "bam"),
        ("merge", "--seeds", "a", "nobody/nothing", "--recipe", "bam"),
        ("merge", "--seeds", "a", "nobody/nothing@main", "--recipe", "bam"),
    ]
    codes = []
    for command in commands:
        yes = ("--yes",) if command[0] == "merge" else ()
        done = run_cli(*command, *yes, cwd=pair, **environment, UPCYCLE_DEBUG="1")
        assert "marked" not in done.stdout + done.stderr
        codes.append(done.returncode)
    assert codes == [0] * 4 + [1] * 3
    for path in pair.rglob("*"):
        assert "marked" not in path.name
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path
    record = json.loads((pair / "out" / "upcycle.json").read_text())
    assert [seed["name"] for seed in record["seeds"]] == ["a", "b"]
