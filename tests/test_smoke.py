"""The smoke test passes where all is well, and fails with one sentence wherever something is broken."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner
from upcycle.cli.demo import demo as demo_command

from tests.conftest import run_cli
from upcycle import smoke
from upcycle.demo import DOMAINS, read_text
from upcycle.errors import OutputError, RecipeError, UpcycleError
from upcycle.smoke_text import COUNTS, documents


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, smoke.Found]:
    """The command in an empty folder: what it printed, and what it left."""
    kept = []

    def keep(found: smoke.Found) -> str:
        kept.append(found)
        return "kept"

    app = typer.Typer()
    app.command()(demo_command)
    folder = tmp_path_factory.mktemp("empty")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(smoke, "CHECKS", (*smoke.CHECKS, keep))
        result = CliRunner().invoke(app, ["--tiny"], catch_exceptions=False)
        assert (result.exit_code, result.stderr) == (0, "")
        assert [path.name for path in folder.iterdir()] == [".demo"]
    return result.stdout, moved(kept[0], folder / kept[0].merged.parent)


def moved(found: smoke.Found, folder: Path) -> smoke.Found:
    """The same, as it lies in another folder."""
    models = {str(folder / Path(path).name): entry for path, entry in found.result.evaluation["models"].items()}
    result = replace(
        found.result,
        evaluation=deepcopy({**found.result.evaluation, "models": models}),
        report=folder / found.result.report.name,
        mixture=folder / found.result.mixture.name,
    )
    return smoke.Found(result, found.recipe, {name: folder / name for name in found.seeds}, folder / found.merged.name)


@pytest.fixture
def found(ran: tuple[str, smoke.Found], tmp_path: Path) -> smoke.Found:
    """A copy that a test may damage, and that passes until it does."""
    return moved(ran[1], shutil.copytree(ran[1].merged.parent, tmp_path / "copy"))


def test_the_command_says_what_it_checked_and_with_what(ran: tuple[str, smoke.Found]) -> None:
    lines = ran[0].splitlines()
    for name in ("python 3.", "torch ", "transformers ", "huggingface_hub ", "upcycle "):
        assert name in lines[0]
    passed = [line.partition(":")[0].split()[1] for line in lines if line.startswith("ok  ")]
    assert passed == ["specialists", "merge", "loading", "exactness", "training", "report", "kept"]
    assert lines[-1].startswith("all is well, ")
    assert len(lines) == len(passed) + 2


def test_the_text_is_always_the_same_and_nothing_of_it_is_trained_on_twice(tmp_path: Path) -> None:
    smoke.write_text(tmp_path)
    for split, count in COUNTS.items():
        assert read_text(tmp_path, split) == {domain: documents(domain, split) for domain in DOMAINS}
        assert all(len(set(texts)) == count for texts in read_text(tmp_path, split).values())
    for domain in DOMAINS:
        assert not {*documents(domain, "train")} & {*documents(domain, "heldout")}


def lose(found: smoke.Found) -> None:
    """A tensor less in the trained mixture."""
    edit(found.trained, lambda state: state.pop(min(state)))


def miscompute(found: smoke.Found) -> None:
    """The checkpoint's own code computes something else than upcycle's."""
    file, softmax = found.merged / "modeling_bam.py", "return logits.softmax("
    text = file.read_text()
    assert softmax in text
    file.write_text(text.replace(softmax, "return 1.01 * logits.softmax("))


def flip(found: smoke.Found) -> None:
    """A bit of a weight."""
    file = found.merged / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(data)


def swap(found: smoke.Found) -> None:
    """Seeds that were merged in another order."""
    names = list(found.seeds)
    one, other = (found.seeds[name] for name in names[:2])
    shutil.move(one, one.with_name("kept"))
    shutil.move(other, one)
    shutil.move(one.with_name("kept"), other)


def forget(found: smoke.Found) -> None:
    """No checksums."""
    (found.trained / "upcycle.sums.json").unlink()


def unlearn(found: smoke.Found) -> None:
    found.entry(found.trained)["mean_loss"] = found.entry(found.merged)["mean_loss"]


def diverge(found: smoke.Found) -> None:
    found.entry(found.trained)["mean_loss"] = float("nan")


def mix_up(found: smoke.Found) -> None:
    """A specialist that knows its domain less than the seed does."""
    losses = found.entry(found.seeds["math"])["domains"]["math"]
    losses["loss"] = found.entry(found.seeds["seed"])["domains"]["math"]["loss"] + 0.1


def unreport(found: smoke.Found) -> None:
    found.result.report.unlink()


def misreport(found: smoke.Found) -> None:
    found.result.report.write_text("<html></html>")


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "check", "message"),
    [
        (mix_up, smoke.check_specialists, "on math the specialist's held-out loss is"),
        (flip, smoke.check_files, "verification failed: .*checksum"),
        (swap, smoke.check_files, "verification failed: .*a seed was changed"),
        (forget, smoke.check_files, "has no checksums"),
        (lose, smoke.check_loading, "missing"),
        (miscompute, smoke.check_loading, "two loads of .* differ: by up to"),
        (unlearn, smoke.check_training, "loss went from"),
        (diverge, smoke.check_training, "loss went from .* to nan"),
        (unreport, smoke.check_report, "was not written"),
        (misreport, smoke.check_report, "does not show"),
    ],
)
def test_what_is_broken_is_found(
    found: smoke.Found, damage: Callable[[smoke.Found], None], check: Callable[[smoke.Found], str], message: str
) -> None:
    damage(found)
    with pytest.raises(UpcycleError, match=message):
        check(found)


def test_copies_that_do_not_give_the_seed_are_found(found: smoke.Found, monkeypatch: pytest.MonkeyPatch) -> None:
    merge = smoke.merge

    def wrong(plan: Any, out: Path, **options: Any) -> Any:
        result = merge(plan, out, **options)
        edit(out, lambda state: state[max(state)].mul_(1.01))
        return result

    smoke.check_identity(found)
    monkeypatch.setattr(smoke, "merge", wrong)
    with pytest.raises(UpcycleError, match="copies of the seed do not give its logits"):
        smoke.check_identity(found)


def test_a_sabotaged_merge_exits_with_1(tmp_path: Path) -> None:
    script = (
        "from upcycle import demo\nfrom upcycle.cli.main import main\nmerge = demo.merge\n"
        "def sabotaged(plan, out, **options):\n"
        "    result = merge(plan, out, **options)\n"
        "    with (out / 'model.safetensors').open('r+b') as file:\n"
        "        file.seek(-2, 2)\n        file.write(bytes([file.read(1)[0] ^ 1]))\n"
        "    return result\n"
        "demo.merge = sabotaged\nmain(['demo', '--tiny', '--recipe', 'average'])\n"
    )
    environment = {**os.environ, "NO_COLOR": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("error: verification failed: ")
    assert done.stderr.count("\n") == 1
    assert "all is well" not in done.stdout


def test_what_cannot_be_asked_for_is_said(tmp_path: Path) -> None:
    both = run_cli("demo", "--tiny", "--data", "text", cwd=tmp_path)
    assert (both.returncode, both.stdout) == (2, "")
    assert "--data" in both.stderr
    assert not (tmp_path / ".demo").exists()
    with pytest.raises(RecipeError, match="copies one seed"):
        smoke.run_smoke("llama", tmp_path, recipe="sparse-upcycling", tell=print)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="choose another --work"):
        smoke.run_smoke("llama", tmp_path / "file", tell=print)


def test_a_second_run_trains_again(
    ran: tuple[str, smoke.Found], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    former = shutil.copytree(ran[1].merged.parent, tmp_path / "tiny" / "llama") / "seed"
    mine = tmp_path / "tiny" / "llama" / "mine.txt"
    mine.touch()

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(smoke, "run_demo", stop)
    with pytest.raises(KeyboardInterrupt):
        smoke.run_smoke("llama", tmp_path, tell=print)
    assert not former.exists()
    assert mine.exists()
