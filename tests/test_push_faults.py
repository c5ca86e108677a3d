"""`upcycle push` when the Hub, the network, somebody else or a kill comes between; and where the token is not."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import run_cli
from tests.hub_repos import Token
from tests.hub_server import HubServer
from tests.pushing import NAME, Push, check_pushed, contents, licensed_seeds, mix, pusher, refused

KILLS = 20
MARKED = "hf_AbCdEfGhIjKlMnOpQrStUvWxYz012345"


@pytest.fixture
def push(hub: HubServer, tmp_path: Path) -> Push:
    return pusher(hub, tmp_path / "home")


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture that is not to be changed."""
    folder = tmp_path_factory.mktemp("merged")
    return mix(licensed_seeds(folder), folder / "mixture")


def start(hub: HubServer, home: Path, *arguments: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "upcycle", "push", *map(str, arguments)]
    variables = {**os.environ, **hub.environment(home, hub.WRITE)}
    return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_what_passes_is_tried_again(hub: HubServer, push: Push, merged: Path) -> None:
    """Rate limits and errors of the Hub, at every step, and in the middle of an upload."""
    hub.fail("/whoami-v2", 429)
    hub.fail("/repos/create", 500)
    hub.fail("/preupload/", 429, Retry_After="0")
    hub.fail("^/lfs/", 503, method="PUT", Retry_After="0")
    hub.cut("^/lfs/", 1000, method="PUT", skip=1)
    hub.fail("/commit/", 503)
    done = push(merged, NAME)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    check_pushed(hub, merged)
    assert len(hub.repo(NAME).commits) == 2


def test_a_refused_commit(hub: HubServer, push: Push, merged: Path) -> None:
    hub.create(NAME)
    hub.fail("/commit/", 400)
    refused(push(merged, NAME), "the Hub refuses: ", "no commit was made", "the same command goes on")
    assert len(hub.repo(NAME).commits) == 1
    hub.faults.clear()
    sent = hub.received("^/lfs/")
    assert push(merged, NAME).returncode == 0
    assert hub.received("^/lfs/") == sent
    check_pushed(hub, merged)
    refused(push(merged, NAME, HF_HUB_OFFLINE="1"), "HF_HUB_OFFLINE")


@pytest.mark.parametrize("option", ["--branch=main", "--branch=next", "--create-pr"])
def test_a_lost_answer_is_looked_for(hub: HubServer, push: Push, merged: Path, option: str) -> None:
    hub.add_model(NAME, {".gitattributes": "", "LICENSE": "x"})
    tries = 3 if option == "--branch=main" else 1  # the last of those that are made
    hub.cut("/commit/", 100, times=tries - 1)
    hub.lose("/commit/")
    done = push(merged, NAME, option)
    assert done.returncode == 0, done.stderr
    commits = hub.repo(NAME).commits
    assert len(commits) == 3
    assert len(hub.asked("/commit/")) == tries
    pull = option == "--create-pr"
    assert done.stdout == f"{hub.url}/{NAME}/{'discussions/1' if pull else f'commit/{commits[-1].oid}'}\n"
    check_pushed(hub, merged, "LICENSE", revision=commits[-1].oid)


def test_it_is_not_known_whether(hub: HubServer, push: Push, merged: Path) -> None:
    """The commit's answer is lost, and the Hub refuses to say more."""
    hub.create(NAME)
    hub.lose("/commit/")
    hub.when("/commit/", lambda: hub.fail("/api/models/", 400, times=None, method="GET"))
    refused(push(merged, NAME), "Whether it was made is not known", "the same command")
    hub.faults.clear()
    done = push(merged, NAME)
    assert done.returncode == 0
    assert "no commit was made" in done.stderr
    assert len(hub.repo(NAME).commits) == 2
    check_pushed(hub, merged)


def test_somebody_else_commits_meanwhile(hub: HubServer, push: Push, merged: Path) -> None:
    hub.add_model(NAME, {".gitattributes": "", "LICENSE": "x"})
    hub.when("/commit/", lambda: hub.add_model(NAME, {".gitattributes": "", "LICENSE": "theirs"}))
    done = push(merged, NAME)
    refused(done, "somebody else has committed", "nothing was committed", "the same command")
    assert len(hub.repo(NAME).commits) == 3
    assert push(merged, NAME).returncode == 0
    assert hub.files(NAME)["LICENSE"] == b"theirs"
    check_pushed(hub, merged, "LICENSE")

    made = hub.add_model  # a repository that did not exist when it was looked for
    hub.when("/repos/create", lambda: made("org/new", {"config.json": "{}"}))
    refused(push(merged, "org/new"), "somebody else made Hub repository org/new")
    assert set(hub.files("org/new")) == {"config.json"}


def test_an_ignoring_repository_gets_the_whole_model(hub: HubServer, push: Push, merged: Path) -> None:
    hub.add_model(NAME, {".gitattributes": "", ".gitignore": "*.safetensors\n*.json\n"})
    assert push(merged, NAME).returncode == 0
    check_pushed(hub, merged, ".gitignore")


def test_ctrl_c_is_heard_at_once(hub: HubServer, push: Push, merged: Path, tmp_path: Path) -> None:
    hub.delay("^/lfs/", 20, times=1, method="PUT")
    process = start(hub, tmp_path / "home", merged, NAME)
    hub.wait_for("^/lfs/", "PUT")
    time.sleep(0.5)  # until it is all sent, and the answer waited for
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    printed, messages = process.communicate(timeout=60)
    assert (process.returncode, printed) == (130, "")
    assert messages == "error: interrupted; the same command goes on with what is uploaded\n"
    assert time.monotonic() - began < 10
    assert len(hub.repo(NAME).commits) == 1
    assert push(merged, NAME).returncode == 0
    check_pushed(hub, merged)


def test_the_token_is_nowhere(hub: HubServer, merged: Path, tmp_path: Path) -> None:
    """In what is printed, in the folder, in the caches, in what was uploaded; from the variable and from the file."""
    hub.tokens[MARKED] = Token("alice", "write", ("org",))
    home, folder, seen = tmp_path / "home", shutil.copytree(merged, tmp_path / "folder"), []
    before = contents(folder)
    cases: list[tuple[list[str], str]] = [
        ([NAME], "/commit/"),
        ([NAME], "/preupload/"),
        ([NAME, "--json"], ""),
        ([NAME, "--create-pr", "--dry-run"], "/whoami-v2"),
        (["stranger/model"], ""),
    ]
    (home / "hub").mkdir(parents=True)
    for number, (words, failing) in enumerate(cases):
        hub.faults.clear()
        if failing:
            hub.fail(failing, 400)
        from_file = number % 2 == 1
        if from_file:
            (home / "token").write_text(MARKED)
        environment = hub.environment(home, None if from_file else MARKED)
        done = run_cli("push", folder, *words, **environment, UPCYCLE_DEBUG="1", HF_HUB_VERBOSITY="debug", HF_DEBUG="1")
        seen.append(done.returncode)
        assert MARKED not in done.stdout + done.stderr
        assert MARKED[3:] not in done.stdout + done.stderr
    assert {0, 1} == set(seen)
    assert contents(folder) == before
    for place in (home, folder):
        holders = [path for path in place.rglob("*") if path.is_file() and MARKED.encode() in path.read_bytes()]
        assert holders in ([], [home / "token"])
    for commit in hub.repo(NAME).commits:
        assert not any(MARKED.encode() in content for content in hub.files(NAME, commit.oid).values())
        assert MARKED not in commit.title + commit.message
    assert {record.token for record in hub.asked("^/(cdn|lfs)/")} <= {None}
    assert MARKED in {record.token for record in hub.requests}


@pytest.mark.slow
def test_kills_leave_no_half_model(hub: HubServer, merged: Path, tmp_path: Path) -> None:
    """SIGKILL at random moments, then once more undisturbed: every commit ever made holds no model, or a whole one."""
    draw = random.Random(0)
    began = time.monotonic()
    assert pusher(hub, tmp_path / "home")(merged, "org/measured").returncode == 0
    lasts = time.monotonic() - began
    killed_with, whole = [], 0
    for number in range(KILLS):
        name = f"org/model-{number}"
        hub.delay(f"/{name}", 0.05)
        process = start(hub, tmp_path / "home", merged, name)
        # From the first request on, where something may happen at all.
        time.sleep(lasts * draw.uniform(0.4, 1.5))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        hub.faults.clear()
        up = {record.path for record in hub.asked(f"^/lfs/{name}/", "PUT", status=200)}
        killed_with.append(len(up))
        whole += name in hub.repos and len(hub.repo(name).commits) == 2
        before = len(hub.requests)
        done = pusher(hub, tmp_path / "home")(merged, name)
        assert done.returncode == 0, done.stderr
        assert not up & {record.path for record in hub.requests[before:]}, "uploaded twice"
        check_pushed(hub, merged, name=name)
        for commit in hub.repo(name).commits:
            if set(commit.files) != {".gitattributes"}:
                check_pushed(hub, merged, name=name, revision=commit.oid)
        assert len(hub.repo(name).commits) == 2
    print(f"{KILLS} kills: {killed_with} of 3 shards were up, {whole} commits were made before")
    assert 0 in killed_with
    assert any(killed_with)
