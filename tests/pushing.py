"""What is pushed in tests, as a process, and what arrived."""

from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import torch

from tests.conftest import run_cli, write_tokenizer
from tests.hub_server import HubServer
from tests.tiny import BY_NAME, make_seeds
from upcycle.merge import merge
from upcycle.plan import plan_merge
from upcycle.recipe_file import load_recipe
from upcycle.seeds import read_seeds

NAME = "org/model"
Push = Callable[..., "CompletedProcess[str]"]


def licensed_seeds(folder: Path) -> list[Path]:
    """Three seeds with a tokenizer, under one licence."""
    folders = make_seeds(BY_NAME["llama"], folder, dtype=torch.bfloat16)
    for one in folders:
        write_tokenizer(one)
        (one / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    return folders


def mix(seeds: list[Path], out: Path, recipe: str = "bam", shard: int = 50_000) -> Path:
    """Their mixture, in three shards."""
    plan = plan_merge(load_recipe(recipe, []), read_seeds([str(seed) for seed in seeds]), allow_unrelated=True)
    merge(plan, out, max_shard_size=shard)
    return out


def pusher(hub: HubServer, home: Path) -> Push:
    """`upcycle push` as a process, by a token."""

    def push(*arguments: object, token: str | None = hub.WRITE, **variables: str) -> "CompletedProcess[str]":
        done = run_cli("push", *arguments, **{**hub.environment(home, token), **variables})
        assert "Traceback" not in done.stderr
        assert "%|" not in done.stderr, "a bar of the client's"
        return done

    return push


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check_pushed(hub: HubServer, folder: Path, *names: str, name: str = NAME, revision: str = "main") -> None:
    """The repository holds the folder's model byte for byte, and beside it the card and `names` only."""
    there = hub.files(name, revision)
    for name in ("README.md", ".gitattributes", *names):
        there.pop(name)
    here = contents(folder)
    here.pop("README.md", None)
    assert there.keys() <= here.keys()
    assert there == {name: here[name] for name in there}
    needed = {path.name for path in folder.glob("*.safetensors")} | {"config.json", "upcycle.json", "tokenizer.json"}
    assert needed <= there.keys()


def writes(hub: HubServer) -> list[str]:
    return [f"{record.method} {record.path}" for record in hub.requests if record.method not in ("GET", "HEAD")]


def refused(done: "CompletedProcess[str]", *words: str) -> None:
    """With one message and nothing on stdout."""
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert done.stderr.count("error:") == 1
    for word in words:
        assert word in done.stderr
