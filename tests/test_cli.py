"""The command line: its contract of streams, exit codes, names and lists."""

import json
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from upcycle.cli.main import expand_lists
from upcycle.cli.merge import parse_size

from tests.conftest import run_cli

COST = {
    *("total_parameters", "active_parameters", "flops_per_token", "training_flops_per_token"),
    *("checkpoint_bytes", "cache_bytes_per_token"),
}
RESULT = {"out", "format", "model_type", "num_experts", "bytes_written", "seconds"}
PAPER = Path(__file__).parent / "data" / "paper_small.json"


@pytest.mark.parametrize(
    ("given", "expanded"),
    [
        ("merge --seeds a b c --recipe bam", "merge --seeds a --seeds b --seeds c --recipe bam"),
        ("merge --recipe bam --seeds a b", "merge --recipe bam --seeds a --seeds b"),
        ("merge --seeds=a b --json", "merge --seeds=a --seeds b --json"),
        ("plan --weights a=1 b=2 --json", "plan --weights a=1 --weights b=2 --json"),
        ("plan --seeds a -- b", "plan --seeds a b"),
        ("merge --seeds --json", "merge --seeds --json"),
        ("merge --set a=1 b=2 --seeds x=y z", "merge --set a=1 --set b=2 --seeds x=y --seeds z"),
        ("inspect path -- --odd", "inspect path -- --odd"),
    ],
)
def test_list_options_take_every_word(given, expanded):
    assert expand_lists(given.split()) == expanded.split()


def test_the_call_everything_turns_on(seeds, tmp_path):
    result = run_cli("merge", "--seeds", "code", "law", "math", "--recipe", "bam-kv-shared", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert 'from_pretrained("bam-kv-shared-3x", trust_remote_code=True)' in result.stdout
    assert "3 experts" in result.stdout
    assert "untrained" in result.stdout
    assert result.stderr == ""  # no terminal, no progress
    # The printed lines are exact: they run.
    lines = [line.strip() for line in result.stdout.splitlines() if line.startswith("  ")]
    script = "\n".join([*lines, "print(type(model).__name__, len(tokenizer))"])
    ran = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["BamForCausalLM", "96"]


def test_json_is_one_object_with_the_fixed_names(seeds, tmp_path):
    merged = run_cli("merge", "--seeds", *seeds, "--recipe", "bam", "--json", "--out", "x/y", cwd=tmp_path)
    found = json.loads(merged.stdout)
    assert set(found) == RESULT | COST
    assert found["out"] == "x/y"
    assert found["bytes_written"] == (tmp_path / "x/y/model.safetensors").stat().st_size == found["checkpoint_bytes"]
    assert (found["format"], found["model_type"], found["num_experts"]) == ("bam", "bam", 3)

    dry = json.loads(run_cli("merge", "--seeds", *seeds, "--recipe", "bam", "--json", "--dry-run", cwd=tmp_path).stdout)
    planned = json.loads(run_cli("plan", "--seeds", *seeds, "--recipe", "bam", "--json", cwd=tmp_path).stdout)
    inspected = json.loads(run_cli("inspect", "x/y", "--json", cwd=tmp_path).stdout)
    for costs in (dry, planned, inspected):
        assert {key: costs[key] for key in COST} == {key: found[key] for key in COST}
    assert not (tmp_path / "bam-3x").exists()
    assert inspected["experts"] == ["code", "law", "math"]

    extracted = run_cli("extract", "x/y", "--expert", "1", "--out", "law-again", "--json", cwd=tmp_path)
    assert set(json.loads(extracted.stdout)) == RESULT
    dense = json.loads(run_cli("inspect", "law-again", "--json", cwd=tmp_path).stdout)
    assert (dense["format"], dense["num_experts"], dense["model_type"]) == ("dense", 1, "llama")
    assert "bam" in dense["recipes"]
    average = json.loads(run_cli("merge", "--seeds", *seeds, "--recipe", "average", "--json", cwd=tmp_path).stdout)
    assert (average["format"], average["num_experts"], average["out"]) == ("dense", 1, "average-3x")
    recipes = json.loads(run_cli("recipes", "--json").stdout)["recipes"]
    assert "bam-kv-shared" in {recipe["name"] for recipe in recipes}


@pytest.mark.parametrize(
    ("recipe", "total", "active"),
    [
        (["bam"], "776,002,560", "662,756,352"),
        (["bam-kv-shared"], "738,253,824", "625,007,616"),
        (["btx", "--set", "router.ffn.top_k=1"], "700,480,512", "587,234,304"),
        (["btx-top1"], "700,480,512", "587,234,304"),
    ],
)
def test_plan_prints_the_papers_numbers(recipe, total, active):
    result = run_cli("plan", "--config", PAPER, "--num-experts", 4, "--recipe", *recipe)
    assert result.returncode == 0, result.stderr
    lines = {line.split("  ")[1].strip(): line for line in result.stdout.splitlines() if "  " in line.strip()}
    assert total in lines["Parameters"]
    assert active in lines["Active per token"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["mrge"], 2, "Did you mean 'merge'"),
        (["merge", "--seed", "a", "--recipe", "bam"], 2, "--seeds"),
        (["merge", "--seeds", "a", "--recipe", "bam", "--dryrun"], 2, "--dry-run"),
        (["merge", "--recipe", "bam"], 2, "--seeds"),
        (["merge", "--seeds", "a", "b", "--recipe", "bam", "--dtype", "int8"], 2, "bf16"),
        (["plan", "--recipe", "bam"], 2, "--config"),
        (["merge", "--seeds", "no/such", "b", "--recipe", "bam"], 1, "no/such"),
        (["inspect", "nowhere"], 1, "nowhere"),
        (["extract", "nowhere", "--expert", "0", "--out", "x"], 1, "nowhere"),
        (["generate", "nowhere", "text"], 1, "nowhere"),
        (["plan", "--config", "nowhere.json", "--num-experts", "4", "--recipe", "bam"], 1, "nowhere.json"),
    ],
)
def test_errors_go_to_stderr_with_their_code(arguments, code, message, tmp_path):
    result = run_cli(*arguments, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (code, ""), result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_an_existing_output_is_kept_unless_told(seeds, tmp_path):
    command = ("merge", "--seeds", *seeds, "--recipe", "average")
    assert run_cli(*command, cwd=tmp_path).returncode == 0
    again = run_cli(*command, cwd=tmp_path)
    assert (again.returncode, "--yes" in again.stderr) == (1, True)
    assert run_cli(*command, "--yes", cwd=tmp_path).returncode == 0
    into_seed = run_cli(*command, "--out", seeds[0], "--yes", cwd=tmp_path)
    assert (into_seed.returncode, "within one another" in into_seed.stderr) == (1, True)
    assert (seeds[0] / "model.safetensors").exists()


def test_an_expert_is_found_by_number_or_name(seeds, tmp_path):
    run_cli("merge", "--seeds", *seeds, "--recipe", "bam", "--out", "m", cwd=tmp_path)
    assert run_cli("extract", "m", "--expert", "law", "--out", "one", cwd=tmp_path).returncode == 0
    assert run_cli("extract", "m", "--expert", "1", "--out", "two", cwd=tmp_path).returncode == 0
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    wrong = run_cli("extract", "m", "--expert", "3", "--out", "x", cwd=tmp_path)
    assert (wrong.returncode, "0 code, 1 law, 2 math" in wrong.stderr) == (1, True)
    dense = run_cli("extract", seeds[0], "--expert", "0", "--out", "x", cwd=tmp_path)
    assert (dense.returncode, "expected a BAM mixture" in dense.stderr) == (1, True)


def test_generate_continues_a_text(seeds, tmp_path):
    run_cli("merge", "--seeds", *seeds, "--recipe", "bam-kv-shared", "--out", "m", cwd=tmp_path)
    result = run_cli("generate", "m", "word5 word9", "--max-new-tokens", "4", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("word5 word9")
    assert result.stderr == ""


def test_a_damaged_mixture_says_nothing_made_up(seeds, tmp_path):
    from tests.test_seeds import edit_weights

    run_cli("merge", "--seeds", *seeds, "--recipe", "bam", "--out", "m", cwd=tmp_path)
    edit_weights(tmp_path / "m", lambda state: state.pop("dense.model.layers.0.mlp.router.weight"))
    result = run_cli("generate", "m", "word5", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (1, "")
    assert "mlp.router.weight" in result.stderr


def test_a_message_cannot_steer_the_terminal(tmp_path):
    result = run_cli("inspect", "a\x1b[2Jb" + "x" * 300, cwd=tmp_path)
    assert result.returncode == 1
    assert "\x1b" not in result.stderr


def test_help_is_quick_and_imports_neither_torch_nor_transformers():
    script = (
        "import sys\nfrom upcycle.cli.main import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'huggingface_hub'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"
    times = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert run_cli("--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # Processor time: what a free core takes, however many tests run beside this one.
        times.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    assert statistics.median(times) < 0.3, times


def test_importing_changes_nothing():
    script = (
        "import sys, upcycle\nassert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
        "from transformers import AutoConfig\n"
        "try:\n    AutoConfig.for_model('bam')\nexcept ValueError:\n    pass\nelse:\n    raise SystemExit(1)\n"
        "upcycle.register()\nassert AutoConfig.for_model('bam').model_type == 'bam'\nupcycle.register()\n"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("500 MB", 5 * 10**8), ("1.5GB", 1_500_000_000), ("1000", 1000)]
)
def test_sizes_are_read(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["five", "0", "-1", "5XB", "0.1"])
def test_no_size_is_a_usage_error(text, seeds, tmp_path):
    result = run_cli("merge", "--seeds", *seeds, "--recipe", "bam", f"--max-shard-size={text}", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert "5GB" in result.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_output_that_cannot_be_written_is_told():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "upcycle", "recipes"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 1
    assert done.stderr == "error: what was to be printed cannot be written: No space left on device\n"
