"""The folder in which an output is written: all or nothing, one writer, nothing else ever replaced."""

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from upcycle.errors import OutputError
from upcycle.staging import check_target, partial_folder, staging


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
