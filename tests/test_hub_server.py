"""The Hub of the tests against the unchanged client library: it has to be taken for the real one."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.hub_repos import Token
from tests.hub_server import HubServer

PRELUDE = """
import json, sys, time
from pathlib import Path
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, HfFileSystem, hf_hub_download
from huggingface_hub import snapshot_download

api = HfApi()
out = {}

def attempt(call, *arguments, **options):
    start = time.monotonic()
    try:
        call(*arguments, **options)
    except Exception as error:
        return [type(error).__name__, getattr(getattr(error, "response", None), "status_code", None)]
    return ["done", round(time.monotonic() - start)]
"""
LARGE = bytes(range(256)) * 1600
CHUNK = 10 << 20  # what the client takes from a connection at a time: after a break it goes on from a multiple of that
HUGE = LARGE * 27
SMALL = bytes(range(255)) * 100
CARD = "---\nlicense: apache-2.0\ntags: [moe]\n---\n# A model\n"
MODEL: dict[str, bytes | str] = {
    "README.md": CARD,
    "config.json": "{}",
    "large.safetensors": LARGE,
    "small.safetensors": SMALL,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model as files, one of them in a subfolder."""
    folder = tmp_path / "model"
    (folder / "onnx").mkdir(parents=True)
    for name, content in {**MODEL, "onnx/graph.json": "[]"}.items():
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def start(
    hub: HubServer, home: Path, script: str, *arguments: object, token: str | None = HubServer.WRITE
) -> subprocess.Popen[str]:
    """A client in a process of its own, as its settings are read when it is imported."""
    command = [sys.executable, "-c", PRELUDE + script + "\nprint(json.dumps(out))", *map(str, arguments)]
    variables = {**os.environ, **hub.environment(home, token), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def client(hub: HubServer, home: Path, script: str, *arguments: object, token: str | None = HubServer.WRITE) -> Any:
    """What a client's script leaves in `out`."""
    process = start(hub, home, script, *arguments, token=token)
    printed, messages = process.communicate(timeout=60)
    assert process.returncode == 0, messages
    return json.loads(printed.splitlines()[-1])


def check_whole(hub: HubServer) -> None:
    """Every commit ever made can be downloaded, and no token went to the storage."""
    for repo in hub.repos.values():
        for commit in repo.commits:
            for path, content in hub.files(repo.name, commit.oid).items():
                assert len(content) == commit.files[path].size
    assert {record.token for record in hub.asked("^/(cdn|lfs)/")} <= {None}


def test_uploads(hub: HubServer, tmp_path: Path, folder: Path) -> None:
    hub.part_size = 100_000
    script = """
out["url"] = str(api.create_repo("org/model", private=True))
api.create_repo("org/model", exist_ok=True)
out["again"] = attempt(api.create_repo, "org/model")
first = api.upload_folder(repo_id="org/model", folder_path=sys.argv[1])
out["same"] = api.upload_folder(repo_id="org/model", folder_path=sys.argv[1]).oid == first.oid
api.create_tag("org/model", tag="v1")
api.create_branch("org/model", branch="next", revision="v1")
api.upload_file(repo_id="org/model", path_or_fileobj=b"[1]", path_in_repo="onnx/graph.json", revision="next")
pull = api.upload_file(repo_id="org/model", path_or_fileobj=b"[2]", path_in_repo="config.json", create_pr=True)
out["pull"] = [pull.pr_revision, pull.pr_num]
delete = [CommitOperationDelete("onnx/"), CommitOperationDelete("small.safetensors")]
api.create_commit("org/model", delete, commit_message="Fewer files", parent_commit=first.oid)
out["late"] = attempt(api.delete_file, "config.json", "org/model", parent_commit=first.oid)
out["nothing"] = attempt(api.delete_file, "nothing", "org/model")
out["card"] = attempt(
    api.upload_file, repo_id="org/model", path_or_fileobj=b"---\\n- a list\\n---\\n", path_in_repo="README.md"
)
refs = api.list_repo_refs("org/model", include_pull_requests=True)
out["refs"] = {ref.ref: ref.target_commit for ref in [*refs.branches, *refs.tags, *refs.pull_requests]}
out["commits"] = [commit.title for commit in api.list_repo_commits("org/model")]
info = api.model_info("org/model", revision="v1", files_metadata=True)
out["info"] = [info.sha, info.private, info.gated, info.tags, info.card_data.license]
out["files"] = {s.rfilename: [s.size, s.blob_id, s.lfs and s.lfs.sha256] for s in info.siblings}
out["tree"] = [entry.path for entry in api.list_repo_tree("org/model", revision="next", recursive=True)]
out["paths"] = [entry.path for entry in api.get_paths_info("org/model", ["onnx", "config.json", "no"], revision="v1")]
out["user"] = [api.whoami()["name"], api.whoami()["auth"]["accessToken"]["role"]]
api.auth_check("org/model")
"""
    out = client(hub, tmp_path / "home", script, folder)
    repo = hub.repo("org/model")
    initial, uploaded, branched, proposed, deleted = repo.commits
    assert out["url"] == f"{hub.url}/org/model"
    assert out["again"] == ["HfHubHTTPError", 409]
    assert out["late"] == ["HfHubHTTPError", 412]
    assert out["nothing"] == ["RemoteEntryNotFoundError", 404]
    assert out["card"][0] == "ValueError"
    assert out["same"]
    assert out["pull"] == ["refs/pr/1", 1]
    assert out["user"] == ["alice", "write"]
    assert out["refs"] == dict(repo.refs)
    assert out["refs"]["refs/pr/1"] == proposed.oid
    assert out["refs"]["refs/heads/next"] == branched.oid
    assert out["commits"] == ["Fewer files", "Upload folder using huggingface_hub", "initial commit"]
    assert [c.parent for c in repo.commits] == [None, initial.oid, uploaded.oid, uploaded.oid, uploaded.oid]
    assert set(deleted.files) == {".gitattributes", "README.md", "config.json", "large.safetensors"}
    assert out["info"] == [uploaded.oid, True, False, ["moe"], "apache-2.0"]
    assert out["files"] == {path: [b.size, b.oid, b.sha256] for path, b in uploaded.files.items()}
    assert {path for path, blob in uploaded.files.items() if blob.sha256} == {"large.safetensors", "small.safetensors"}
    assert out["tree"] == sorted([*uploaded.files, "onnx"])
    assert out["paths"] == ["onnx", "config.json"]
    assert hub.files("org/model", "v1")["large.safetensors"] == LARGE
    # Each content went up once, the large one in parts.
    assert hub.received("^/lfs/") == len(LARGE) + len(SMALL)
    assert len(hub.asked("^/lfs/", "PUT")) == 1 + -(-len(LARGE) // hub.part_size)
    check_whole(hub)


def test_downloads(hub: HubServer, tmp_path: Path) -> None:
    commit = hub.add_model("org/model", {**MODEL, "huge.safetensors": HUGE})
    hub.cut("large.safetensors", 150_000)
    hub.cut("huge.safetensors", CHUNK + 150_000)
    hub.fail("/resolve/main/config.json", 503, method="HEAD")
    hub.fail("small.safetensors", 429, method="GET", Retry_After="0")
    script = """
hf_hub_download("org/model", "config.json")
out["limited"] = attempt(hf_hub_download, "org/model", "small.safetensors")
out["snapshot"] = snapshot_download("org/model")
fs = HfFileSystem()
with fs.open("org/model/large.safetensors", block_size=64) as file:
    file.seek(1000)
    out["range"] = list(file.read(4))
out["missing"] = [
    attempt(hf_hub_download, "org/model", "no"),
    attempt(hf_hub_download, "org/model", "config.json", revision="no"),
    attempt(hf_hub_download, "org/no", "config.json"),
    attempt(snapshot_download, "org/model", revision="no"),
]
"""
    out = client(hub, tmp_path / "home", script, token=None)
    snapshot = Path(out["snapshot"])
    assert snapshot.name == commit
    assert {path: (snapshot / path).read_bytes() for path in hub.files("org/model")} == hub.files("org/model")
    assert out["range"] == list(LARGE[1000:1004])
    assert out["limited"] == ["done", 1]  # the client waits a second longer than it is told
    first, second = hub.asked("^/cdn/.*huge.safetensors")
    assert (first.sent, first.range) == (CHUNK + 150_000, None)
    assert (second.status, second.sent, second.range) == (206, len(HUGE) - CHUNK, f"bytes={CHUNK}-")
    *_, ranged = hub.asked("^/cdn/.*large.safetensors")
    assert (ranged.status, ranged.sent) == (206, 68)
    assert hub.sent("^/cdn/.*large.safetensors") == 150_000 + len(LARGE) + 68
    assert out["missing"] == [
        ["RemoteEntryNotFoundError", 404],
        ["RevisionNotFoundError", 404],
        ["RepositoryNotFoundError", 401],
        ["RevisionNotFoundError", 404],
    ]
    check_whole(hub)


def test_rights(hub: HubServer, tmp_path: Path) -> None:
    hub.add_model("org/open", MODEL)
    hub.add_model("org/private", MODEL, private=True)
    hub.add_model("org/gated", MODEL, gated=True)
    hub.repo("org/gated").granted.add("guest")
    hub.tokens["hf_guest"] = Token("guest", "read")
    hub.add_model("org/moved", MODEL)
    script = """
tokens = {"nobody": False, "wrong": "hf_wrong", "stranger": "hf_stranger", "guest": "hf_guest",
          "reader": "hf_read", "writer": "hf_write"}
for name, token in tokens.items():
    user = HfApi(token=token)
    rows = {repo: attempt(user.hf_hub_download, f"org/{repo}", "README.md", cache_dir=f"{sys.argv[1]}/{name}")[0]
            for repo in ("open", "private", "gated", "missing")}
    commit = dict(repo_id="org/open", path_or_fileobj=name.encode(), path_in_repo="name")
    rows["info"] = attempt(user.model_info, "org/gated")[0]
    rows["write"] = attempt(user.upload_file, **commit)
    rows["propose"] = attempt(user.upload_file, **commit, create_pr=True)
    rows["create"] = attempt(user.create_repo, "org/new")
    rows["check"] = attempt(user.auth_check, "org/gated")
    out[name] = rows
api.move_repo("org/moved", "alice/new")
out["moved"] = [hf_hub_download("org/moved", "large.safetensors"), api.model_info("org/moved").id]
api.upload_file(repo_id="org/moved", path_or_fileobj=b"x", path_in_repo="by-the-old-name")
"""
    out = client(hub, tmp_path / "home", script, tmp_path)
    missing, gated, failed, done = "RepositoryNotFoundError", "GatedRepoError", "HfHubHTTPError", "done"
    seen = ("open", "private", "gated", "missing", "info")
    assert {name: [rows[repo] for repo in seen] for name, rows in out.items() if name != "moved"} == {
        "nobody": [done, missing, gated, missing, done],
        "wrong": [failed, failed, failed, failed, failed],
        "stranger": [done, missing, gated, missing, done],
        "guest": [done, missing, done, missing, done],
        "reader": [done, done, done, missing, done],
        "writer": [done, done, done, missing, done],
    }
    written, forbidden = ["done", 0], [failed, 403]
    assert {n: [out[n][key] for key in ("write", "propose", "create", "check")] for n in out if n != "moved"} == {
        "nobody": [[missing, 401], [missing, 401], [missing, 401], [gated, 401]],
        "wrong": [[failed, 401], [failed, 401], [failed, 401], [failed, 401]],
        "stranger": [forbidden, written, forbidden, [gated, 403]],
        "guest": [forbidden, forbidden, forbidden, written],
        "reader": [forbidden, forbidden, forbidden, written],
        "writer": [written, written, written, written],
    }
    assert out["moved"][1] == "alice/new"
    assert len(hub.asked("org/moved", status=307)) >= 4
    assert hub.files("alice/new")["by-the-old-name"] == b"x"
    assert "org/moved" not in hub.repos
    check_whole(hub)


def test_a_killed_upload_goes_on(hub: HubServer, tmp_path: Path, folder: Path) -> None:
    """What was up before the kill is not sent again, and no commit was made."""
    hub.create("org/model")
    large, small = (hashlib.sha256(content).hexdigest() for content in (LARGE, SMALL))
    script = 'out["oid"] = api.upload_folder(repo_id="org/model", folder_path=sys.argv[1]).oid'
    hub.delay(large, 30, times=1, method="PUT")
    process = start(hub, tmp_path / "home", script, folder)
    hub.wait_for(small, "PUT", status=200)
    hub.wait_for(large, "PUT")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert [commit.title for commit in hub.repo("org/model").commits] == ["initial commit"]
    hub.cut(large, 200_000, method="PUT")
    hub.fail("/preupload/", 503, Retry_After="0")
    out = client(hub, tmp_path / "home", script, folder)
    assert out["oid"] == hub.repo("org/model").find().oid
    assert hub.received(small) == len(SMALL)
    assert [record.received for record in hub.asked(large, "PUT")][1:] == [200_000, len(LARGE)]
    assert len(hub.repo("org/model").commits) == 2
    check_whole(hub)


def test_commits_that_meet_trouble(hub: HubServer, tmp_path: Path) -> None:
    """A lost answer, an error, another's commit in between, a pointer to what was never uploaded."""
    base = hub.add_model("org/model", MODEL)
    hub.lose("/commit/", method="POST")
    hub.fail("/commit/", 500, skip=1)
    hub.when("/commit/", lambda: hub.add_model("org/model", {**MODEL, "theirs": "first"}), skip=2)
    script = """
mine = dict(repo_id="org/model", path_in_repo="mine")
out["lost"] = attempt(api.upload_file, path_or_fileobj=b"1", **mine)[0]
out["same"] = api.upload_file(path_or_fileobj=b"1", **mine).oid
out["failed"] = attempt(api.upload_file, path_or_fileobj=b"2", **mine)
out["late"] = attempt(api.upload_file, path_or_fileobj=b"3", **mine, parent_commit=out["same"])
addition = CommitOperationAdd("x.safetensors", b"never uploaded")
addition._is_uploaded = True
addition._upload_mode = "lfs"
out["pointer"] = attempt(api.create_commit, "org/model", [addition], commit_message="x")
"""
    out = client(hub, tmp_path / "home", script)
    _, first, mine, theirs = hub.repo("org/model").commits
    assert out["lost"] == "RemoteProtocolError"  # which is not tried again, though the commit is there
    assert (first.oid, mine.parent, mine.oid, theirs.parent) == (base, base, out["same"], mine.oid)
    assert out["failed"] == ["HfHubHTTPError", 500]
    assert out["late"] == ["HfHubHTTPError", 412]
    assert out["pointer"] == ["BadRequestError", 400]
    assert "theirs" in theirs.files
    check_whole(hub)
