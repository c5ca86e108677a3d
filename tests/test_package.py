"""The package as it is installed, with other library versions, and what its documents promise."""

import os
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from tests.conftest import run_cli

ROOT = Path(__file__).parent.parent


def run(*command: object, cwd: Path = ROOT, **environment: str) -> str:
    variables = {**os.environ, **environment}
    variables.pop("PYTHONPATH", None)
    words = [str(word) for word in command]
    result = subprocess.run(words, cwd=cwd, env=variables, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return result.stdout


def fresh_environment(folder: Path, *requirements: object) -> Path:
    """The Python of a new, empty environment with `requirements`, held to the project's constraints."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--upgrade", "pip")
    run(python, "-m", "pip", "install", "--quiet", *requirements)
    return python


def test_the_command_reference_is_that_of_the_code():
    command = (sys.executable, "-m", "typer", "upcycle.cli.main", "utils", "docs", "--name", "upcycle")
    written = (ROOT / "docs" / "cli.md").read_text()
    assert run(*command, "--title", "The command line").strip() == written.strip(), "run `make docs`"


def test_the_readme_names_real_commands_and_files():
    text = (ROOT / "README.md").read_text()
    commands = {line.split()[1] for line in re.findall(r"^\s*upcycle .*$", text, re.M)}
    for command in sorted(commands):
        assert run_cli(command, "--help").returncode == 0, command
    for target in re.findall(r"^make ([\w-]+)", text, re.M):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), target
    for path in re.findall(r"\]\((?!http|#)([^)]+)\)", text):
        assert (ROOT / path).exists(), path


@pytest.mark.slow
def test_the_wheel_installs_only_upcycle(seeds, tmp_path):
    constraints = ("--constraint", ROOT / "constraints.txt")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path / "dist", ROOT)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"upcycle"}
    assert {"upcycle/cli/main.py", "upcycle/recipes/bam.toml", "upcycle/modeling/modeling_bam.py"} <= set(names)
    python = fresh_environment(tmp_path / "env", *constraints, wheel)
    upcycle = python.parent / "upcycle"
    run(upcycle, "merge", "--seeds", *seeds, "--recipe", "bam-kv-shared", "--out", "m", cwd=tmp_path)
    assert "word3" in run(upcycle, "generate", "m", "word3", cwd=tmp_path)
    assert "report.html" in run(upcycle, "report", "m", cwd=tmp_path)
    (tmp_path / "empty").mkdir()
    assert "all is well" in run(upcycle, "demo", "--tiny", cwd=tmp_path / "empty")
    for outsider in ("cli", "recipes", "tests"):
        script = f"import importlib.util as u; raise SystemExit(u.find_spec({outsider!r}) is not None)"
        run(python, "-c", script, cwd=tmp_path)


@pytest.mark.slow
def test_the_oldest_transformers_passes_too(tmp_path):
    """The tests of model, merge, training and evaluation in an environment with transformers 5.17."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    older = [line for line in lines if not line.startswith(("transformers==", "huggingface_hub==", "tokenizers=="))]
    (tmp_path / "older.txt").write_text("\n".join(older))
    requirements = ("--constraint", tmp_path / "older.txt", "transformers==5.17.*", "--editable", f"{ROOT}[dev]")
    python = fresh_environment(tmp_path / "env", *requirements)
    names = ("modeling", "modeling_use", "families", "merge", "losses", "train", "resume", "comparison", "similarity")
    names += ("acceleration", "backends", "side_by_side", "verify", "native")
    tests = [f"tests/test_{name}.py" for name in names]
    assert "5.17" in run(python, "-c", "import transformers; print(transformers.__version__)")
    assert " passed" in run(python, "-m", "pytest", "-q", "-n", "2", *tests)
