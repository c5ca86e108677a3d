"""`upcycle push` against the Hub of the tests: what goes there, what is replaced, who may."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import run_cli
from tests.hub_server import HubServer
from tests.pushing import NAME, Push, check_pushed, contents, licensed_seeds, mix, pusher, refused, writes
from tests.training import arguments
from upcycle.card import BEGIN, END
from upcycle.errors import HubError
from upcycle.hub_account import check_name

PNG = b"\x89PNG\r\n\x1a\n and so on"

LOAD = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

tokens = torch.arange(1, 25)[None]
logits = []
for source in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True).eval()
    assert len(AutoTokenizer.from_pretrained(source, trust_remote_code=True)) == 96
    with torch.no_grad():
        logits.append(model(tokens).logits)
assert logits[0].dtype == torch.bfloat16 and logits[0].isfinite().all()
print(type(model).__name__, torch.equal(*logits), "upcycle" in sys.modules)
"""


@pytest.fixture
def push(hub: HubServer, tmp_path: Path) -> Push:
    return pusher(hub, tmp_path / "home")


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return licensed_seeds(tmp_path_factory.mktemp("seeds"))


@pytest.fixture(scope="module")
def merged(seeds: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture that is not to be changed."""
    return mix(seeds, tmp_path_factory.mktemp("merged") / "mixture")


@pytest.fixture
def mixture(merged: Path, tmp_path: Path) -> Path:
    return shutil.copytree(merged, tmp_path / "mixture")


def test_round_trip(hub: HubServer, push: Push, mixture: Path, tmp_path: Path) -> None:
    """Files arrive byte for byte in one commit, and transformers alone loads the same model by its name."""
    (mixture / "notes.txt").write_text("mine")
    (mixture / ".lock").write_text("")
    for name in ("checkpoints/step-000001/model.safetensors", "trackers/log", ".git/config", "report-pictures/x.txt"):
        (mixture / name).parent.mkdir(parents=True, exist_ok=True)
        (mixture / name).write_text("not this")
    (mixture / "report-pictures" / "loss.png").write_bytes(PNG)
    before = contents(mixture)
    done = push(mixture, NAME, "--private")
    assert done.returncode == 0, done.stderr
    commits = hub.repo(NAME).commits
    assert len(commits) == 2
    assert done.stdout == f"{hub.url}/{NAME}/commit/{commits[1].oid}\n"
    assert commits[1].title.startswith("Upload bam of a, b, c, by upcycle ")
    assert hub.repo(NAME).private
    (line,) = done.stderr.splitlines()
    assert line == "note: left out: .git/, .lock, checkpoints/, notes.txt, report-pictures/x.txt, trackers/"
    check_pushed(hub, mixture)
    assert "report-pictures/loss.png" in hub.files(NAME)
    assert contents(mixture) == before
    script = [sys.executable, "-c", LOAD, NAME, str(mixture)]
    environment = {**os.environ, **hub.environment(tmp_path / "home", hub.READ)}
    loaded = subprocess.run(script, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert loaded.stdout.split() == ["BamForCausalLM", "True", "False"], loaded.stderr

    again = push(mixture, NAME, "--private")
    assert (again.returncode, again.stdout) == (0, f"{hub.url}/{NAME}\n")
    assert "no commit was made" in again.stderr
    assert len(hub.repo(NAME).commits) == 2


def test_by_names_alone(hub: HubServer, seeds: list[Path], tmp_path: Path) -> None:
    """Seeds by name, merged, pushed and loaded by name: the model that the folder holds."""
    for seed in seeds:
        hub.add_model(f"org/{seed.name}", seed)
    names = [f"org/{seed.name}" for seed in seeds]
    environment = hub.environment(tmp_path / "home", hub.WRITE)
    merge = ("merge", "--seeds", *names, "--recipe", "bam", "--out", tmp_path / "out", "--allow-unrelated")
    done = run_cli(*merge, "--push-to", "org/a", **environment)
    assert "holds another model" in done.stderr
    assert not (tmp_path / "out").exists()
    done = run_cli(*merge, "--push-to", NAME, **environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith(f"{hub.url}/{NAME}/commit/")
    card = hub.files(NAME)["README.md"].decode()
    assert "base_model:\n- org/a\n- org/b\n- org/c\nbase_model_relation: merge\n" in card
    assert f'from_pretrained("{NAME}"' in card
    script = [sys.executable, "-c", LOAD, NAME, str(tmp_path / "out")]
    loaded = subprocess.run(
        script, env={**os.environ, **environment}, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert loaded.stdout.split() == ["BamForCausalLM", "True", "False"], loaded.stderr


def test_dry_run_only_asks(hub: HubServer, push: Push, mixture: Path, tmp_path: Path) -> None:
    total = sum(len(content) for name, content in contents(mixture).items() if name != "README.md")
    done = push(mixture, NAME, "--dry-run", token=None)
    assert done.returncode == 0, done.stderr
    assert f"{NAME}, a new repository" in done.stdout
    assert "To be deleted: nothing" in done.stdout
    assert "README.md" in done.stdout
    assert "---\n" in done.stdout.partition("The card, README.md:")[2]
    assert "no token" in done.stderr
    shard, here = "model-00002-of-00003.safetensors", contents(mixture)
    others = {"old.safetensors": b"1", "model-00001-of-00009.safetensors": b"2"}
    same_size = {name: here[name][:-1] + b" " for name in (shard, "tokenizer.json")}
    hub.add_model(NAME, {**here, **others, **same_size})
    for token in (None, hub.WRITE):
        done = push(mixture, NAME, "--dry-run", "--json", token=token)
        found = json.loads(done.stdout)
        assert found["changed"] == ["README.md", shard, "tokenizer.json"]
        assert found["deleted"] == ["model-00001-of-00009.safetensors"]
        assert sum(size for name, size in found["files"].items() if name != "README.md") == total
        assert found["files"]["README.md"] == len(found["card"].encode())
        assert (found["url"], found["committed"], found["replaces"]) == (None, False, None)
    shown = push(mixture, NAME, "--dry-run").stdout
    assert re.search(r"config\.json +[\d,]+ +already there", shown)
    assert re.search(r"tokenizer\.json +[\d,]+ +changed", shown)
    other = {"config.json": "{}", "upcycle.json": json.dumps({"plan": "other", "recipe": {"name": "btx"}})}
    hub.add_model("org/other", other)
    done = push(mixture, "org/other", "--dry-run")
    assert done.returncode == 0
    assert "would be refused" in done.stderr
    assert writes(hub) == []
    assert len(hub.repo(NAME).commits) == 2


def test_another_model_is_replaced_only_when_told(hub: HubServer, push: Push, mixture: Path, seeds: list[Path]) -> None:
    """Its files go in the same commit; what no model consists of stays."""
    other = mix(seeds, mixture.parent / "other", recipe="btx", shard=40_000)
    stays = {"LICENSE": "x", "picture.png": PNG, "onnx/model.onnx": "y", "handler.py": "z", "a.gguf": "w"}
    goes = {"pytorch_model.bin": "p", "pytorch_model.bin.index.json": "{}", "train.json": "{}", "merges.txt": "m"}
    goes |= {"modeling_own.py": "1", "adapter_config.json": "{}"}
    base = hub.add_model(NAME, {".gitattributes": "", **contents(other), **stays, **goes})
    refused(
        push(mixture, NAME), "holds another model: btx of a, b, c, trained", "to be pushed is bam of a, b, c", "--yes"
    )
    assert writes(hub) == []
    done = push(mixture, NAME, "--yes")
    assert done.returncode == 0, done.stderr
    assert "note: it replaces btx of a, b, c" in done.stderr
    check_pushed(hub, mixture, *stays)
    _, _, commit = hub.repo(NAME).commits
    assert commit.parent == base

    hub.add_model("org/foreign", {"config.json": "{}", "pytorch_model.bin": "p"})
    refused(push(mixture, "org/foreign"), "a model that upcycle did not make (config.json, pytorch_model.bin)")
    hub.add_model("org/damaged", {"upcycle.json": "{"})
    refused(push(mixture, "org/damaged"), "damaged")
    hub.add_model("org/nothing", {"README.md": "# Soon to come", "LICENSE": "x"})
    assert push(mixture, "org/nothing").returncode == 0
    assert b"Soon to come" in hub.files("org/nothing")["README.md"]


def test_branches_and_pull_requests(hub: HubServer, push: Push, mixture: Path) -> None:
    """Neither replaces anything, so neither needs --yes; a branch with a model of its own does."""
    base = hub.add_model(NAME, {".gitattributes": "", "config.json": "{}", "model-00007-of-00009.safetensors": "x"})
    later: list[str] = []
    moved = {".gitattributes": "", "config.json": "{}", "LICENSE": "theirs"}
    hub.when("/preupload/", lambda: later.append(hub.add_model(NAME, moved)))
    done = push(mixture, NAME, "--branch", "next")
    assert done.returncode == 0, done.stderr
    repo = hub.repo(NAME)
    assert repo.find("next").parent == base
    (base,) = later
    assert repo.find().oid == base
    check_pushed(hub, mixture, revision="next")
    proposed = push(mixture, NAME, "--create-pr", token=hub.STRANGER)
    assert (proposed.returncode, proposed.stdout) == (0, f"{hub.url}/{NAME}/discussions/1\n"), proposed.stderr
    assert repo.find().oid == base
    assert repo.find("refs/pr/1").parent == base
    check_pushed(hub, mixture, "LICENSE", revision="refs/pr/1")
    hub.add_model(NAME, {"config.json": "[]"}, branch="theirs")
    refused(push(mixture, NAME, "--branch", "theirs"), "branch theirs, holds another model")
    hub.add_model("org/new", {"LICENSE": "x"})
    assert push(mixture, "org/new", "--branch", "v1").returncode == 0
    assert "upcycle.json" not in hub.files("org/new")
    assert push(mixture, "org/none", "--branch", "v1").returncode == 0
    assert set(hub.files("org/none")) == {".gitattributes"}
    assert "upcycle.json" in hub.files("org/none", "v1")
    both = push(mixture, NAME, "--create-pr", "--branch", "next")
    assert (both.returncode, both.stdout) == (2, "")


@pytest.mark.parametrize(
    ("token", "name", "words"),
    [
        (None, NAME, ["no token", "hf auth login"]),
        ("hf_nonsense", NAME, ["not valid", "hf auth login"]),
        (HubServer.READ, NAME, ["alice's token may only read"]),
        (HubServer.STRANGER, NAME, ["stranger may not write to Hub repository org/model", "--create-pr"]),
        (HubServer.STRANGER, "org/new", ["may not make one of 'org'", "expected stranger/…"]),
        (HubServer.STRANGER, "org/private", ["may not make one of 'org'", "nor see private ones there"]),
    ],
)
def test_refusals(hub: HubServer, push: Push, mixture: Path, token: str | None, name: str, words: list[str]) -> None:
    hub.add_model(NAME, {"LICENSE": "x"})
    hub.add_model("org/private", {"LICENSE": "x"}, private=True)
    refused(push(mixture, name, token=token), *words)
    assert writes(hub) == []


def test_what_is_damaged_or_foreign_is_not_pushed(hub: HubServer, push: Push, mixture: Path, seeds: list[Path]) -> None:
    shard = next(mixture.glob("model-00002-*"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    refused(push(mixture, NAME), "is damaged, so nothing was pushed", shard.name, "checksum")
    shard.unlink()
    refused(push(mixture, NAME), shard.name)
    refused(push(seeds[0], NAME), "not made by upcycle", "hf upload")
    refused(push(mixture / "nothing", NAME), "config.json")
    assert hub.requests == []


def test_licences_are_checked_first(hub: HubServer, push: Push, seeds: list[Path], tmp_path: Path) -> None:
    copies = [shutil.copytree(seed, tmp_path / seed.name) for seed in seeds]
    (copies[1] / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    folder = mix(copies, tmp_path / "mixture")
    refused(push(folder, NAME), "licence", "cc-by-nc-4.0", "--license")
    (tmp_path / "no.json").write_text("{}")
    refused(push(folder, NAME, "--license", "other", "--eval", tmp_path / "no.json"), "no.json is no evaluation")
    assert hub.requests == []
    done = push(folder, NAME, "--license", "cc-by-nc-4.0")
    assert done.returncode == 0, done.stderr
    assert b"license: cc-by-nc-4.0\n" in hub.files(NAME)["README.md"]
    # What the folder's own card states is stated.
    (folder / "README.md").write_text("---\nlicense: cc-by-nc-sa-4.0\n---\nWe asked them.\n")
    done = push(folder, NAME)
    assert done.returncode == 0, done.stderr
    assert b"license: cc-by-nc-sa-4.0\n" in hub.files(NAME)["README.md"]


def test_what_people_wrote_on_the_card_stays(hub: HubServer, push: Push, mixture: Path) -> None:
    """What stands in the folder, else in the repository; and the folder is not touched."""
    hub.add_model(NAME, {".gitattributes": "", "README.md": "---\nlicense: mit\n---\n# Ours\n\nFor the orchard.\n"})
    generated = f"# A title\n\n{BEGIN}\nlong ago\n{END}\n"
    (mixture / "README.md").write_text(generated)
    assert push(mixture, NAME).returncode == 0
    card = hub.files(NAME)["README.md"].decode()
    assert "For the orchard." in card
    assert "long ago" not in card
    assert BEGIN in card
    (mixture / "README.md").write_text(f"{generated}\nFor the meadow.\n")
    assert push(mixture, NAME).returncode == 0
    card = hub.files(NAME)["README.md"].decode()
    assert "For the meadow." in card
    assert "For the orchard." not in card
    assert "no commit was made" in push(mixture, NAME).stderr
    assert (mixture / "README.md").read_text() == f"{generated}\nFor the meadow.\n"


def test_names_and_visibility_are_told(hub: HubServer, push: Push, mixture: Path) -> None:
    hub.add_model("org/old", {"LICENSE": "x"}, private=True)
    hub.moved["org/old"] = NAME
    hub.repos[NAME] = hub.repos.pop("org/old")
    hub.repos[NAME].name = NAME
    done = push(mixture, "org/old")
    assert done.returncode == 0, done.stderr
    assert "org/old is now org/model on the Hub" in done.stderr
    assert "private and stays so" in done.stderr
    assert f"/{NAME}/commit/" in done.stdout
    hub.add_model("org/public", {"LICENSE": "x"})
    refused(push(mixture, "org/public", "--private"), "is public, and --private is for a new one")
    assert len(hub.repo("org/public").commits) == 2


def test_a_training_is_pushed_over_its_mixture(
    hub: HubServer, push: Push, merged: Path, data: dict[str, str], tmp_path: Path
) -> None:
    """One plan is one model. What would keep it from being pushed is known before the training begins."""
    out = tmp_path / "out"
    assert push(merged, NAME).returncode == 0
    words = (*arguments(merged, data, out, "--steps", 2, "--json"), "--push-to", NAME)
    refused(run_cli(*words, **hub.environment(tmp_path / "home", hub.READ)), "may only read")
    assert run_cli(*arguments(merged, data, out, "--steps", 2), "--license", "mit").returncode == 2
    assert not out.exists()
    done = run_cli(*words, **hub.environment(tmp_path / "home", hub.WRITE))
    assert done.returncode == 0, done.stderr
    assert "left out: .lock, checkpoints/\n" in done.stderr
    assert json.loads(done.stdout)["url"] == f"{hub.url}/{NAME}/commit/{hub.repo(NAME).find().oid}"
    check_pushed(hub, out)
    assert {"train.json", "metrics.jsonl", "model.safetensors"} <= hub.files(NAME).keys()
    assert not {"model.safetensors.index.json", "model-00001-of-00003.safetensors"} & hub.files(NAME).keys()
    assert [commit.title[:18] for commit in hub.repo(NAME).history()] == ["Upload bam of a, b"] * 2 + ["initial commit"]
    refused(push(merged, NAME), "another model: bam of a, b, c, trained (plan ")


def test_what_was_made_is_safe_when_its_push_fails(hub: HubServer, push: Push, mixture: Path, tmp_path: Path) -> None:
    """And the command that is printed pushes it."""
    folder = mixture.rename(tmp_path / "a folder")
    script = """
import sys
from pathlib import Path
from upcycle.cli.push import prepare_push, push_result
from upcycle.push_plan import read_provenance

folder = Path(sys.argv[1])
prepare_push("org/model", read_provenance(folder), "mit")
try:
    push_result(folder, "org/model", "mit")
except Exception as error:
    print(type(error).__name__, error)
"""
    hub.fail("/commit/", 403)
    environment = {**os.environ, **hub.environment(tmp_path / "home", hub.WRITE)}
    command = [sys.executable, "-c", script, str(folder)]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert printed.startswith("HubError commit to Hub repository org/model: the token may not do that")
    before, _, told = printed.partition("push it with: upcycle push ")
    assert f"the checkpoint is safe at {folder}" in before
    assert shlex.split(told) == [str(folder), NAME, "--license", "mit"]
    assert push(*shlex.split(told)).returncode == 0
    check_pushed(hub, folder)
    calls = "; ".join(f"prepare_push('org/model', dict(seeds=[]{plan}), 'mit')" for plan in ("", ", plan='other'"))
    command = [sys.executable, "-c", f"from upcycle.cli.push import prepare_push; {calls}"]
    looked = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert "to be pushed is a mixture of unknown seeds (plan other…)" in looked.stderr  # the second call, not the first
    assert b"license: mit" in hub.files(NAME)["README.md"]


@pytest.mark.parametrize("name", ["model", "org/a--b", "org/model@v1", "a/b/c", "org/.x", "../model", "org/model "])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(HubError, match="name"):
        check_name(name)
