"""The workflows, and the one for users in docs/ci.md: what they run exists, and their versions are pyproject.toml's."""

import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from tests.conftest import run_cli

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BOUNDS = {found.name: found.specifier for found in map(Requirement, PROJECT["dependencies"])}
ACTIONS = {"actions/checkout@v4", "actions/setup-python@v5", "actions/upload-artifact@v4"}


def workflows() -> dict[str, dict[Any, Any]]:
    """Every workflow by name, parsed; YAML takes the key `on` for true."""
    texts = {file.name: file.read_text() for file in (ROOT / ".github" / "workflows").iterdir()}
    texts["docs/ci.md"] = "".join(
        re.findall(r"^```yaml\n(.*?)^```", (ROOT / "docs" / "ci.md").read_text(), re.M | re.S)
    )
    return {name: yaml.safe_load(text) for name, text in texts.items()}


def rows(job: dict[str, Any]) -> list[dict[str, str]]:
    matrix: dict[str, Any] = job.get("strategy", {}).get("matrix", {"include": [{}]})
    assert matrix.keys() == {"include"}
    return list(matrix["include"])


def filled(text: str, row: dict[str, str]) -> str:
    """Text with the values of a row of the matrix; as on GitHub, one that it lacks is empty."""
    return re.sub(r"\$\{\{ matrix\.(\w+) \}\}", lambda match: row.get(match[1], ""), text)


def steps(kind: str) -> Iterator[tuple[str, dict[str, str], dict[str, Any]]]:
    """Steps that have a key, for each row of their matrix, with their job's environment filled in."""
    for workflow in workflows().values():
        for job in workflow["jobs"].values():
            for row in rows(job):
                environment = {key: filled(value, row) for key, value in job.get("env", {}).items()}
                for step in job["steps"]:
                    if kind in step:
                        yield filled(step[kind], row), environment, step.get("with", {})


def pins(file: str) -> dict[str, Version]:
    lines = [line for line in (ROOT / file).read_text().splitlines() if line and not line.startswith("#")]
    return {name: Version(version) for name, version in (line.split("==") for line in lines)}


def test_no_workflow_may_write_or_run_for_ever() -> None:
    assert workflows().keys() == {"checks.yml", "docs/ci.md"}
    for name, workflow in workflows().items():
        assert workflow["permissions"] == {"contents": "read"}, name
        assert workflow["concurrency"]["cancel-in-progress"] is True, name
        assert {"push", "pull_request"} <= workflow[True].keys(), name
        for job in workflow["jobs"].values():
            assert 0 < job["timeout-minutes"] <= 60, name
            assert re.fullmatch(r"ubuntu-\d\d\.\d\d", job["runs-on"]), name


def test_actions_have_versions_and_pip_a_cache() -> None:
    for used, _, options in steps("uses"):
        assert used in ACTIONS
        if "setup-python" in used:
            assert options["cache"] == "pip"
            assert options["cache-dependency-path"]


def test_what_is_run_exists() -> None:
    ran = {(command, *environment.items()) for command, environment, _ in steps("run")}
    assert len(ran) > 3
    for command, *environment in ran:
        words = command.split()
        if words[0] == "make":
            variables = [f"{key}={value}" for key, value in environment]
            assert subprocess.run(["make", "-n", *words[1:], *variables], cwd=ROOT, capture_output=True).returncode == 0
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M), command
        elif words[0] == "upcycle":
            assert {option for option in words if option.startswith("-")} <= options_of(words[1]), command
        else:
            assert words == ["python", "-m", "pip", "install", PROJECT["name"]]


def test_tests_that_are_left_out_exist() -> None:
    words = {word for _, environment, _ in steps("run") for word in environment.get("PYTEST_ADDOPTS", "").split()}
    assert words
    for word in words:
        file, _, name = word.removeprefix("--deselect=").partition("::")
        assert f"def {name}(" in (ROOT / file).read_text(), word


def options_of(command: str) -> set[str]:
    shown = run_cli(command, "--help")
    assert shown.returncode == 0, command
    return set(re.findall(r"--[\w-]+", shown.stdout))


@pytest.mark.parametrize("versions", ["pinned", "oldest", "newest"])
def test_versions_are_those_that_pyproject_allows(versions: str) -> None:
    (job,) = workflows()["checks.yml"]["jobs"].values()
    chosen = [row for row in rows(job) if row["versions"] == versions]
    assert chosen
    assert job["env"]["CONSTRAINTS"] == "${{ matrix.constraints }}"
    for row in chosen:
        assert row["python"] in SpecifierSet(PROJECT["requires-python"])
        found = pins(row["constraints"])
        for name in found.keys() & BOUNDS.keys():
            assert found[name] in BOUNDS[name], name
        if versions == "oldest":
            assert row["python"] == lowest(SpecifierSet(PROJECT["requires-python"]))
            for name in ("torch", "transformers", "huggingface_hub"):
                assert found[name].release[:2] == Version(lowest(BOUNDS[name])).release, name
        elif versions == "newest":
            assert not found
        else:
            assert BOUNDS.keys() & found.keys() >= {"torch", "transformers", "huggingface_hub"}
    if versions == "pinned":
        assert [row["python"] for row in chosen if row["target"] == "test"] == ["3.11", "3.13"]


def lowest(bounds: SpecifierSet) -> str:
    (bound,) = (part.version for part in bounds if part.operator == ">=")
    return bound
