"""Trainings broken off and resumed, and what lies in their folder already."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file

from tests.conftest import run_cli, write_tokenizer
from tests.tiny import VOCAB, edit_json
from tests.training import arguments, metrics, options, run, same, state, weights
from upcycle.errors import DataError, OutputError, TrainingError, UpcycleError
from upcycle.train import train


def test_stopped_and_resumed_is_straight(mixture: Path, data: dict[str, str], tmp_path: Path) -> None:
    run(mixture, data, tmp_path / "straight", steps=6)
    asked = iter([False, False, True])
    stopped = train(options(mixture, data, tmp_path / "broken"), stop=lambda: next(asked))
    assert (stopped.finished, stopped.steps) == (False, 3)
    assert not (tmp_path / "broken" / "config.json").exists()
    resumed = run(mixture, data, tmp_path / "broken", resume=True)
    assert resumed.finished
    assert same(state(tmp_path / "broken", 6), state(tmp_path / "straight", 6))
    assert same(weights(tmp_path / "broken"), weights(tmp_path / "straight"))
    assert metrics(tmp_path / "broken") == metrics(tmp_path / "straight")


def test_killed_and_resumed_is_straight_bit_for_bit(mixture: Path, data: dict[str, str], tmp_path: Path) -> None:
    """60 steps = 30 steps, kill -9 somewhere after, and the rest."""
    more = ("--steps", 60, "--save-every", 30)
    assert run_cli(*arguments(mixture, data, tmp_path / "straight", *more)).returncode == 0
    command = arguments(mixture, data, tmp_path / "killed", *more)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-m", "upcycle", *command], env=environment)
    saved = tmp_path / "killed" / "checkpoints" / "step-000030"
    while not saved.exists() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "config.json").exists(), "the kill came too late to show anything"
    result = run_cli(*command, "--resume", OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    assert same(state(tmp_path / "killed", 60), state(tmp_path / "straight", 60))
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "straight")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_signals_finish_the_step_and_save(
    number: signal.Signals, code: int, mixture: Path, data: dict[str, str], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "upcycle", *arguments(mixture, data, tmp_path / "out", "--steps", 100_000)]
    restore = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    process = subprocess.Popen(command, stderr=subprocess.PIPE, preexec_fn=restore, text=True)
    while len(metrics_so_far(tmp_path / "out")) < 3 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    steps = metrics(tmp_path / "out", "nll")
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == [f"step-{len(steps):06d}"]


def test_what_a_resumed_training_reads_must_be_the_same(mixture: Path, base_seed: Path, tmp_path: Path) -> None:
    edit_json(base_seed / "tokenizer_config.json", eos_token="word2")
    file = tmp_path / "text.jsonl"
    file.write_text('{"text": "' + "word5 word6 " * 200 + '"}\n')
    source = {"text": str(file)}
    stop = iter([False, True])
    train(options(base_seed, source, tmp_path / "out"), stop=lambda: next(stop))
    file.write_text('{"text": "' + "word7 word8 " * 200 + '"}\n')
    with pytest.raises(DataError, match="other files than when this training began, or changed ones"):
        run(base_seed, source, tmp_path / "out", resume=True)
    write_tokenizer(base_seed)


def test_resuming_another_model_or_nothing(mixture: Path, data: dict[str, str], tmp_path: Path) -> None:
    stop = iter([True])
    train(options(mixture, data, tmp_path / "out"), stop=lambda: next(stop))
    damaged = weights(mixture)
    before = {name: value.clone() for name, value in damaged.items()}
    for value in damaged.values():
        value += 1
    save_file(damaged, mixture / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TrainingError, match="model_fingerprint was"):
        run(mixture, data, tmp_path / "out", resume=True)
    save_file(before, mixture / "model.safetensors", metadata={"format": "pt"})
    shutil.rmtree(tmp_path / "out" / "checkpoints")
    result = run(mixture, data, tmp_path / "out", resume=True)
    assert "begins anew" in result.warnings[0]
    assert metrics(tmp_path / "out", "step") == [1, 2, 3, 4, 5, 6]
    with pytest.raises(TrainingError, match="is finished"):
        run(mixture, data, tmp_path / "out", resume=True)


def test_a_former_training_stays_until_every_check_is_done(mixture: Path, data: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(mixture, data, out, steps=2)
    before = weights(out)
    np.save(tmp_path / "bad.npy", np.array([1, VOCAB] * 40))
    for sources, changes in (
        ({"x": str(tmp_path / "bad.npy")}, {}),
        (data, {"optimizer": "adamw-8bit"}),
        (data, {"heldout": {"x": str(tmp_path / "bad.npy")}}),
    ):
        with pytest.raises(UpcycleError):
            run(mixture, sources, out, overwrite=True, **changes)
        assert same(weights(out), before)
    (out / "checkpoints" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"holds 'checkpoints/notes\.txt'"):
        run(mixture, data, out, overwrite=True)
    (out / "checkpoints" / "notes.txt").unlink()
    (out / "train.json").write_text("{}")
    with pytest.raises(OutputError, match="is no training's folder"):
        run(mixture, data, out, overwrite=True)


def test_a_start_that_failed_does_not_block_the_next(mixture: Path, base_seed: Path, tmp_path: Path) -> None:
    edit_json(base_seed / "tokenizer_config.json", eos_token="word2")
    file = tmp_path / "text.jsonl"
    file.write_text('{"text": "' + "word5 word6 " * 200 + '"}\nnull\n')
    with pytest.raises(DataError, match="line 2"):
        run(base_seed, {"text": str(file)}, tmp_path / "out")
    file.write_text('{"text": "' + "word5 word6 " * 200 + '"}\n')
    assert run(base_seed, {"text": str(file)}, tmp_path / "out", steps=1).finished
    write_tokenizer(base_seed)


def test_held_out_data_belongs_to_the_training(mixture: Path, data: dict[str, str], tmp_path: Path) -> None:
    stop = iter([True])
    held = {"x": data["code"]}
    train(options(mixture, data, tmp_path / "out", heldout=held), stop=lambda: next(stop))
    for other in ({"y": data["code"]}, {"x": data["law"]}, {}):
        with pytest.raises(TrainingError, match="heldout_fingerprint was"):
            run(mixture, data, tmp_path / "out", resume=True, heldout=other)


def test_damaged_state_is_said(mixture: Path, data: dict[str, str], tmp_path: Path) -> None:
    stop = iter([True])
    train(options(mixture, data, tmp_path / "out"), stop=lambda: next(stop))
    file = tmp_path / "out" / "checkpoints" / "step-000001" / "training_state" / "state.pt"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(TrainingError, match="cannot be taken up"):
        run(mixture, data, tmp_path / "out", resume=True)
    progress = file.parent / "progress.json"
    train(options(mixture, data, tmp_path / "other"), stop=lambda: True)
    progress = tmp_path / "other" / "checkpoints" / "step-000001" / "training_state" / "progress.json"
    for content in ("{}", "[]", '{"step": "x"}', "\0"):
        progress.write_text(content)
        with pytest.raises(TrainingError, match="remove"):
            run(mixture, data, tmp_path / "other", resume=True)


def test_inputs_are_never_the_output(mixture: Path, data: dict[str, str], tmp_path: Path) -> None:
    run(mixture, data, tmp_path / "first", steps=2)
    before = weights(tmp_path / "first")
    inside = tmp_path / "first" / "checkpoints" / "step-000002"
    for model in (tmp_path / "first", inside):
        with pytest.raises(OutputError, match="lie within one another"):
            run(model, data, tmp_path / "first", overwrite=True)
    with pytest.raises(OutputError, match="lie within one another"):
        run(mixture, data, tmp_path, overwrite=True)
    assert same(weights(tmp_path / "first"), before)


def test_former_output_is_safe(mixture: Path, data: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match=r"holds 'thesis\.txt', so it is never overwritten"):
        run(mixture, data, out, overwrite=True)
    (out / "thesis.txt").unlink()
    stop = iter([True])
    train(options(mixture, data, out, steps=2), stop=lambda: next(stop))
    with pytest.raises(OutputError, match=r"--resume goes on with it, --yes overwrites it"):
        run(mixture, data, out, steps=2)
    with pytest.raises(TrainingError, match=r"learning_rate was 0.01 in .* and is 0.5 now"):
        run(mixture, data, out, steps=2, resume=True, learning_rate=0.5)
    other = {**data, "law": data["code"]}
    with pytest.raises(TrainingError, match="data_fingerprint was"):
        run(mixture, other, out, steps=2, resume=True)
    run(mixture, data, out, steps=3, overwrite=True)
    assert len(metrics(out)) == 3


def metrics_so_far(folder: Path) -> list[str]:
    file = folder / "metrics.jsonl"
    return file.read_text().splitlines() if file.exists() else []
