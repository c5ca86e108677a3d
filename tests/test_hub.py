"""Models by their names on the Hub: what is asked of it, what is refused and how, against a local one."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.conftest import branch, run_cli, write_tokenizer
from tests.hub_server import HubServer
from tests.test_hub_server import client
from tests.test_seeds import edit_weights
from tests.test_vocabulary import resize, set_added
from tests.tiny import BY_NAME, VOCAB, edit_json, make_seed
from upcycle.dense_config import read_dense
from upcycle.hub import ask
from upcycle.layout import make_layout
from upcycle.scaling import DENSE

DATA = Path(__file__).parent / "data"
CARD = "---\nlicense: apache-2.0\n---\n# A model\n"
Cli = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def seeds(base_seed: Path, tmp_path: Path) -> list[Path]:
    """Three specialists on the disk: sharded, in one file, and in one file."""
    folders = [branch(base_seed, tmp_path / name, number) for number, name in enumerate(("code", "law", "math"))]
    for folder in folders:
        (folder / "README.md").write_text(CARD)
    model = AutoModelForCausalLM.from_pretrained(folders[0], dtype=torch.bfloat16)
    (folders[0] / "model.safetensors").unlink()
    model.save_pretrained(folders[0], max_shard_size="20KB")
    return folders


@pytest.fixture
def cli(hub: HubServer, tmp_path: Path) -> Cli:
    """The command line with this test's Hub, a cache of its own, and no token unless one is given."""

    def run(*arguments: object, token: str | None = None, **more: str) -> subprocess.CompletedProcess[str]:
        return run_cli(*arguments, cwd=tmp_path, **{**hub.environment(tmp_path / "home", token), **more})

    return run


def place(hub: HubServer, folders: list[Path]) -> list[str]:
    """Put seeds on the Hub, and what else may lie in such repositories."""
    for folder in folders:
        files = {file.name: file.read_bytes() for file in folder.iterdir()}
        hub.add_model(f"org/{folder.name}", {**files, "onnx/model.onnx": b"x" * 5000, "original.safetensors": b"no"})
    return [f"org/{folder.name}" for folder in folders]


def refusal(done: "subprocess.CompletedProcess[str]") -> str:
    """The one message of a command that was refused."""
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr.count("error:") == 1
    assert "Traceback" not in done.stderr
    return done.stderr


class Hollow(bytes):
    """A file of which all but the head is zeros that take no memory."""

    size = 0

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, wanted: Any) -> Any:
        start, stop, _ = wanted.indices(self.size)
        head = bytes(self)[start:stop] if start < bytes.__len__(self) else b""
        return head.ljust(max(0, stop - start), b"\0")


def large_seed(shards: int = 30) -> dict[str, bytes | str]:
    """Llama 3's 70 billion parameters, as a repository holds them."""
    config = (DATA / "llama_70b.json").read_text()
    dense = make_layout(read_dense(json.loads(config), "the large seed"), DENSE, 1).dense
    names, files, weight_map = list(dense), {}, {}
    for number in range(shards):
        header, end = {}, 0
        for name in names[number::shards]:
            size = 2 * prod(dense[name])
            header[name] = {"dtype": "BF16", "shape": list(dense[name]), "data_offsets": [end, end + size]}
            end += size
        text, file = json.dumps(header).encode(), f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        files[file] = Hollow(len(text).to_bytes(8, "little") + text)
        files[file].size = 8 + len(text) + end
        weight_map |= dict.fromkeys(header, file)
    return {
        **files,
        "config.json": config,
        "README.md": CARD,
        "model.safetensors.index.json": json.dumps({"weight_map": weight_map}),
    }


def test_a_merge_by_names_is_that_of_the_folders(hub: HubServer, cli: Cli, seeds: list[Path], tmp_path: Path) -> None:
    names = place(hub, seeds)
    done = cli("merge", "--seeds", *names, "--recipe", "bam", "--out", "remote")
    assert done.returncode == 0, done.stderr
    assert cli("merge", "--seeds", *seeds, "--recipe", "bam", "--out", "local").returncode == 0
    remote, local = tmp_path / "remote", tmp_path / "local"
    assert {file.name for file in remote.iterdir()} == {file.name for file in local.iterdir()}
    for file in local.iterdir():
        if file.name not in ("upcycle.json", "upcycle.sums.json", "README.md"):
            assert file.read_bytes() == (remote / file.name).read_bytes(), file.name
    records = [json.loads((folder / "upcycle.json").read_text()) for folder in (remote, local)]
    for seed, name in zip(records[0]["seeds"], names, strict=True):
        assert seed.pop("repository") == name
        assert seed.pop("revision") == hub.repo(name).find().oid
        assert seed["license"] == "apache-2.0"
    for seed in records[1]["seeds"]:
        assert (seed.pop("repository"), seed.pop("revision")) == (None, None)
    assert records[0] == records[1]  # the plan's hash, too
    assert not hub.asked("onnx|original")
    again = len(hub.requests)
    assert cli("verify", "remote", "--seeds", *names).returncode == 0
    assert not [r for r in hub.requests[again:] if r.method == "GET" and r.path.endswith(".safetensors")]
    assert cli("verify", "remote", "--seeds", *seeds).returncode == 0


def test_branches_and_tags(hub: HubServer, cli: Cli, seeds: list[Path], tmp_path: Path) -> None:
    names = place(hub, seeds)
    first = hub.repo("org/law").find().oid
    hub.add_model("org/law", {"README.md": "moved on"})
    wanted = [names[0], f"other=org/law@{first}", names[2]]
    assert cli("merge", "--seeds", *wanted, "--recipe", "btx", "--out", "out").returncode == 0
    record = json.loads((tmp_path / "out" / "upcycle.json").read_text())
    assert record["seeds"][1]["name"] == "other"
    assert record["seeds"][1]["revision"] == first
    assert "there is no such branch, tag or commit" in refusal(
        cli("plan", "--seeds", "org/law@nowhere", names[0], "--recipe", "btx")
    )


def test_a_plan_moves_headers_alone(hub: HubServer, cli: Cli, seeds: list[Path], tmp_path: Path) -> None:
    names = place(hub, seeds)
    size = sum(file.stat().st_size for folder in seeds for file in folder.glob("*.safetensors"))
    done = cli("plan", "--seeds", *names, "--recipe", "bam", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    kept = [seeds[0] / "README.md", *seeds[0].glob("tokenizer*"), seeds[0] / "generation_config.json"]
    kept += [seed / "tokenizer_config.json" for seed in seeds[1:]]  # for their chat templates
    assert found["download_bytes"] == size + sum(file.stat().st_size for file in kept if "README" not in file.name)
    local = json.loads(cli("plan", "--seeds", *seeds, "--recipe", "bam", "--json").stdout)
    assert {**local, "download_bytes": found["download_bytes"]} == found
    assert not hub.asked("tokenizer", method="GET")
    weights = hub.asked("cdn.*safetensors$", "GET")
    assert weights
    assert all(record.range for record in weights)
    assert cli("merge", "--seeds", *names, "--recipe", "bam", "--dry-run").returncode == 0
    assert not (tmp_path / "bam-3x").exists()


def test_a_plan_of_large_seeds_is_small(hub: HubServer, cli: Cli) -> None:
    """Headers of a model of 70 billion parameters in 30 shards, of which no byte of weights exists."""
    for name in ("code", "law"):
        hub.add_model(f"org/{name}", large_seed())
    done = cli("plan", "--seeds", "org/code", "org/law", "--recipe", "bam-kv-shared", "--json", "--allow-unrelated")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["download_bytes"] > 280e9
    moved = sum(record.sent for record in hub.requests)
    print(f"{moved:,} bytes")
    assert moved < 2_000_000


@pytest.mark.parametrize("differing", [False, True])
def test_tokenizers_are_compared_by_what_the_hub_calls_them(
    hub: HubServer, cli: Cli, seeds: list[Path], tmp_path: Path, differing: bool
) -> None:
    if differing:
        write_tokenizer(seeds[1], swap=(3, 4))
    names = place(hub, seeds)
    done = cli("plan", "--seeds", *names, "--recipe", "bam")
    assert bool(hub.asked("tokenizer.json", "GET")) is differing
    if differing:
        assert "'word3' the id 4" in refusal(done)
    # A folder beside repositories is compared by what the Hub calls their content.
    done = cli("plan", "--seeds", seeds[0], *names[1:], "--recipe", "bam", HF_HUB_CACHE=str(tmp_path / "empty"))
    assert done.returncode == int(differing), done.stderr
    assert len(hub.asked("tokenizer.json", "GET")) == (3 if differing else 0)


def test_strangers_are_refused_before_they_are_downloaded(
    hub: HubServer, cli: Cli, seeds: list[Path], tmp_path: Path
) -> None:
    other = make_seed(BY_NAME["llama"], tmp_path / "other", 99, torch.bfloat16)
    write_tokenizer(other)
    names = place(hub, [seeds[0], other])
    assert "share no ancestor" in refusal(cli("merge", "--seeds", *names, "--recipe", "bam", "--out", "out"))
    assert all(record.range for record in hub.asked("safetensors$", "GET"))
    assert not (tmp_path / "out").exists()


def test_what_is_seen_only_when_it_is_here(hub: HubServer, cli: Cli, seeds: list[Path], tmp_path: Path) -> None:
    """A NaN is found while streaming, as in a folder."""

    def spoil(state: dict[str, Any]) -> None:
        state["model.norm.weight"][3] = float("nan")

    edit_weights(seeds[1], spoil)
    message = refusal(cli("merge", "--seeds", *place(hub, seeds), "--recipe", "bam", "--out", "out"))
    assert "seed 'law'" in message
    assert "model.norm.weight" in message
    assert not (tmp_path / "out").exists()


def test_what_the_hub_refuses(hub: HubServer, cli: Cli, seeds: list[Path], tmp_path: Path) -> None:
    names = place(hub, seeds)
    files = {file.name: file.read_bytes() for file in seeds[1].iterdir()}
    hub.add_model("org/gated", files, gated=True)
    hub.add_model("org/private", files, private=True)
    hub.add_model("org/pickled", {"config.json": files["config.json"], "pytorch_model.bin": b"\x80"})
    hub.add_model("org/adapter", {"adapter_config.json": "{}", "adapter_model.bin.md": "x"})
    hub.add_model("org/halved", {**files, "model.safetensors": files["model.safetensors"][:5000]})

    def told(*more: str, **options: Any) -> str:
        return refusal(cli("plan", "--seeds", names[0], *more, "--recipe", "btx", **options))

    assert "there is no such repository, or it is private" in told("org/nothing")
    assert "there is no folder org/nothing" in told("org/nothing")
    assert "there is no such repository, or it is private" in told("org/private")
    assert "it is gated; accept its terms" in told("org/gated")
    assert "its weights are pickled (pytorch_model.bin)" in told("org/pickled")
    assert "holds an adapter alone; give it with its base: BASE+org/adapter" in told("org/adapter")
    assert "truncated" in told("org/halved")
    for file in ("config.json", "tokenizer.json"):
        bomb = Hollow(b"{")
        bomb.size = 10**9
        hub.add_model("org/bomb", {**files, file: bomb})
        assert f"{file} has 1,000,000,000 bytes, expected at most 100,000,000" in told("org/bomb")
    away = {"weight_map": {"model.norm.weight": "../../../model.safetensors"}}
    strange = {"config.json": files["config.json"], "model.safetensors.index.json": json.dumps(away)}
    hub.add_model("org/away", strange)
    assert "expected a file name in the same folder" in told("org/away")
    assert "the token is not valid" in told("org/law", token="hf_wrong")
    assert "no name of a Hub repository" in told("../nowhere/at/all")
    for command in ("inspect", "verify"):
        assert "there is no folder org/nothing; Hub repository org/nothing: there is no such" in refusal(
            cli(command, "org/nothing")
        )
    assert cli("plan", "--seeds", names[0], "org/private", "--recipe", "btx", token=hub.READ).returncode == 0
    message = told("org/law", HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_ETAG_TIMEOUT="1")
    assert "the Hub cannot be reached" in message
    assert "HF_HUB_OFFLINE=1" in message


def test_a_renamed_repository_is_found_and_said(hub: HubServer, cli: Cli, seeds: list[Path], tmp_path: Path) -> None:
    names = place(hub, seeds)
    script = "api.move_repo('org/law', 'org/laws')"
    client(hub, tmp_path / "mover", script)
    done = cli("plan", "--seeds", *names, "--recipe", "btx")
    assert done.returncode == 0, done.stderr
    assert "org/law is now org/laws on the Hub" in done.stderr


def test_a_flaky_hub_is_asked_again(hub: HubServer, cli: Cli, seeds: list[Path]) -> None:
    names = place(hub, seeds)
    hub.fail("/api/models/org/law", 503)
    hub.fail("/org/code/resolve", 429, method="GET", Retry_After="0")
    hub.cut("cdn", after_bytes=30_000, reset=True, skip=3)
    done = cli("merge", "--seeds", *names, "--recipe", "btx", "--out", "out")
    assert done.returncode == 0, done.stderr
    assert hub.asked(status=503)
    assert hub.asked(status=429)
    assert cli("verify", "out", "--seeds", *seeds).returncode == 0


def test_without_a_network_the_cache_serves(hub: HubServer, cli: Cli, seeds: list[Path], tmp_path: Path) -> None:
    names = place(hub, seeds)
    wanted = ("--seeds", *names, "--recipe", "btx")
    assert "HF_HUB_OFFLINE is set, nobody was asked" in refusal(cli("plan", *wanted, HF_HUB_OFFLINE="1"))
    assert cli("merge", *wanted, "--out", "first").returncode == 0
    asked = len(hub.requests)
    assert cli("merge", *wanted, "--out", "second", HF_HUB_OFFLINE="1").returncode == 0
    assert len(hub.requests) == asked
    for name in ("model.safetensors", "upcycle.json"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_names_go_wherever_folders_go(hub: HubServer, cli: Cli, seeds: list[Path], tmp_path: Path) -> None:
    assert cli("merge", "--seeds", *seeds, "--recipe", "bam", "--out", "mixture").returncode == 0
    names = place(hub, [tmp_path / "mixture", *seeds])
    done = cli("inspect", names[0], "--json")
    found, expected = json.loads(done.stdout), json.loads(cli("inspect", "mixture", "--json").stdout)
    assert {**found, "path": "mixture"} == expected
    assert hub.sent("cdn") < 70_000  # the header's guess
    for number, line in enumerate(("word1 word2 word3 " * 30, "word4 word5 " * 40)):
        (tmp_path / f"d{number}.txt").write_text(line)
    data = ("--data", f"one={tmp_path / 'd0.txt'}", f"two={tmp_path / 'd1.txt'}")
    done = cli("eval", *names, *data, "--sequence-length", 16, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert list(found["models"]) == names
    folders = ["mixture", "code", "law", "math"]
    expected = json.loads(cli("eval", *folders, *data, "--sequence-length", 16, "--json").stdout)
    for name, folder in zip(names, folders, strict=True):
        assert found["models"][name]["domains"] == expected["models"][folder]["domains"]
        assert found["models"][name]["role"] == expected["models"][folder]["role"]
    assert found["verdict"] == expected["verdict"]
    done = cli("eval", names[0], *names[:2], *data, "--sequence-length", 16, "--base", names[1], "--json")
    assert done.returncode == 0, done.stderr
    assert list(json.loads(done.stdout)["models"]) == names[:2]
    done = cli("train", names[0], *data, "--sequence-length", 16, "--steps", 2, "--batch-size", 2, "--out", "trained")
    assert done.returncode == 0, done.stderr
    assert "Trained by upcycle" in (tmp_path / "trained" / "README.md").read_text()
    assert cli("extract", names[0], "--expert", "law", "--out", "law-again").returncode == 0
    again, law = load_file(tmp_path / "law-again" / "model.safetensors"), load_file(seeds[1] / "model.safetensors")
    assert torch.equal(again["model.layers.0.mlp.up_proj.weight"], law["model.layers.0.mlp.up_proj.weight"])
    assert cli("verify", names[0]).returncode == 0
    assert cli("generate", names[0], "word1", "--max-new-tokens", 2).returncode == 0
    done = cli("report", names[0], "trained", "--out", "report.html")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "report.html").read_text()
    assert "mixture" in page
    assert str(tmp_path / "home") not in page


def test_a_disk_that_is_too_small(hub: HubServer, tmp_path: Path, seeds: list[Path]) -> None:
    names = place(hub, seeds)
    script = """
import shutil, sys
from types import SimpleNamespace
from upcycle import hub
hub.shutil.disk_usage = lambda _: SimpleNamespace(free=1000)
from upcycle.cli.main import main
main(["merge", "--seeds", *sys.argv[1:], "--recipe", "btx", "--out", "out"])
"""
    command = [sys.executable, "-c", script, *names]
    variables = {**os.environ, **hub.environment(tmp_path / "home"), "NO_COLOR": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=variables, check=False)
    assert "only 1,000 free; make room, or set HF_HOME to another disk" in refusal(done)


def test_cached_seeds_need_not_be_whole(hub: HubServer, cli: Cli, seeds: list[Path], tmp_path: Path) -> None:
    """A shard that is not in the cache is downloaded, those that are are not."""
    names = place(hub, seeds)
    wanted = ("--seeds", *names, "--recipe", "btx")
    assert cli("merge", *wanted, "--out", "first").returncode == 0
    shard = next((tmp_path / "home").rglob("model-00002-of-*.safetensors"))
    shard.unlink()
    before = len(hub.asked("cdn", "GET"))
    assert cli("merge", *wanted, "--out", "second").returncode == 0
    shutil.rmtree(tmp_path / "first")
    whole = [record for record in hub.asked("cdn", "GET")[before:] if not record.range]
    assert len(whole) <= 1


def test_a_seed_in_lfs_and_one_in_git_are_compared_by_content(hub: HubServer, cli: Cli, seeds: list[Path]) -> None:
    (seeds[0] / "tokenizer.json").write_text((seeds[0] / "tokenizer.json").read_text() + " " * 20)
    hub.lfs_above = (seeds[1] / "tokenizer.json").stat().st_size + 10
    names = place(hub, seeds)
    assert len({len(hub.repo(name).find().files["tokenizer.json"].key) for name in names[:2]}) == 2
    assert cli("plan", "--seeds", *names, "--recipe", "btx").returncode == 0


def test_the_token_is_nowhere(hub: HubServer, cli: Cli, seeds: list[Path], tmp_path: Path) -> None:
    """In what is printed, in results, records and caches; whether a command succeeds or fails."""
    marked = "hf_" + "Marked0Token1"
    hub.tokens[marked] = hub.tokens[hub.READ]
    names = place(hub, seeds)
    for name in names:
        hub.repo(name).private = True
    (tmp_path / "text.txt").write_text("word1 word2 word3 " * 40)
    data = ("--data", f"one={tmp_path / 'text.txt'}", "--sequence-length", 16)
    commands: list[tuple[tuple[object, ...], str]] = [
        (("plan", "--seeds", *names, "--recipe", "btx"), ""),
        (("merge", "--seeds", *names, "--recipe", "btx", "--out", "out"), ""),
        (("merge", "--seeds", *names, "--recipe", "btx", "--out", "out2"), "/api/models/org/law"),
        (("plan", "--seeds", *names, "--recipe", "btx"), "/api/models/org/math"),
        (("train", names[1], *data, "--steps", 2, "--batch-size", 1, "--out", "trained"), ""),
    ]
    codes, debug = [], {"UPCYCLE_DEBUG": "1", "HF_HUB_VERBOSITY": "debug", "HF_DEBUG": "1"}
    for words, failing in commands:
        hub.faults.clear()
        if failing:
            hub.fail(failing, 400, times=None)
        done = cli(*words, token=marked, **debug)
        codes.append(done.returncode)
        assert marked[3:] not in done.stdout + done.stderr
    assert codes == [0, 0, 1, 1, 0]
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and marked[3:].encode() in path.read_bytes()]
    assert marked in {record.token for record in hub.requests}


def test_progress_adds_up_to_the_bytes(hub: HubServer, seeds: list[Path], tmp_path: Path) -> None:
    names = place(hub, seeds)
    script = """
import json, sys
from upcycle.seeds import download, download_bytes, read_seeds
seeds, told = read_seeds(sys.argv[1:]), []
wanted = download_bytes(seeds)
download(seeds, told.append)
print(json.dumps([wanted, sum(told), download_bytes(seeds)]))
"""
    variables = {**os.environ, **hub.environment(tmp_path / "home")}
    command = [sys.executable, "-c", script, *names]
    done = subprocess.run(command, capture_output=True, text=True, env=variables, check=False)
    assert done.returncode == 0, done.stderr
    wanted, told, left = json.loads(done.stdout)
    assert wanted == told > 0
    assert left == 0
    assert done.stderr == ""  # none of the client's bars


def test_vocabularies_and_templates_of_the_hub(hub: HubServer, cli: Cli, seeds: list[Path], tmp_path: Path) -> None:
    """Aligned by tokenizers that are downloaded, with the template of a seed that is not the first."""
    set_added(seeds[1], ["<one>"])
    resize(seeds[1], VOCAB + 1)
    edit_json(seeds[1] / "tokenizer_config.json", chat_template="{{ messages }}")
    names = place(hub, seeds)
    options = ("--recipe", "btx", "--align-vocab", "--chat-template", "law")
    assert cli("plan", "--seeds", *names, *options).returncode == 0
    made = cli("merge", "--seeds", *names, *options, "--out", "remote")
    assert made.returncode == 0, made.stderr
    assert "tokens of seed 'law': 1 new to the first seed ('<one>')" in made.stderr
    assert cli("merge", "--seeds", *seeds, *options, "--out", "local").returncode == 0
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "config.json"):
        assert (tmp_path / "remote" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()
    assert "{{ messages }}" in (tmp_path / "remote" / "tokenizer_config.json").read_text()
    assert cli("verify", "remote", "--seeds", *names).returncode == 0
    plain = cli("merge", "--seeds", *names, "--recipe", "btx", "--align-vocab", "--out", "plain")
    assert "the result has none, as seed 'code' has none; others are those of 'law'" in plain.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("again", [False, True], ids=["fails", "is tried again"])
def test_ctrl_c_that_gets_lost_in_the_client_is_heard(number: signal.Signals, again: bool) -> None:
    """What cleans up after an interrupt may fail, which looks like a failure of the network, and it tries again."""
    calls = []

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def call() -> None:
        calls.append(1)
        with suppress(ConnectionError if again else ()):
            try:
                signal.raise_signal(number)
            finally:
                raise ConnectionError("the connection cannot be closed")

    before = signal.signal(number, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            ask("a question", call)
        assert signal.getsignal(number) is interrupt
    finally:
        signal.signal(number, before)
    assert len(calls) == 1


def test_a_signal_that_ends_nothing_is_left_to_whoever_handles_it() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: heard.append(number))
    try:
        assert ask("a question", lambda: signal.raise_signal(signal.SIGINT) or "an answer") == "an answer"
    finally:
        signal.signal(signal.SIGINT, before)
    assert heard == [signal.SIGINT]
