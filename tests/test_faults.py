"""What is thrown at a merge while it writes: kills, other inputs at the restart, damaged remains, full disks."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import branch
from tests.test_merge import digests, make_plan
from tests.test_seeds import edit_weights
from tests.tiny import edit_json
from upcycle import preflight
from upcycle.assemble import Assembler
from upcycle.errors import OutputError
from upcycle.journal import JOURNAL
from upcycle.merge import merge
from upcycle.verify import verify

PARTIAL = ".out.upcycle-partial"
LIMIT = 20
ROOT = Path(__file__).parents[1]
KILLED = """
import os, signal, sys
from upcycle.cli.main import main
from upcycle.journal import Journal
def dying(name, left):
    real = getattr(Journal, name)
    def call(*arguments):
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        left.pop()
        real(*arguments)
    setattr(Journal, name, call)
dying(sys.argv[1], [None] * int(sys.argv[2]))
main(sys.argv[3:])
"""


@pytest.fixture
def no_hang():
    """Nothing here may block for good, as on a pipe."""

    def stop(*_):
        pytest.fail(f"not done after {LIMIT} s")

    former = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, former)


def killed(folder, *arguments, after=6, what="add"):
    """A merge of the seeds in `folder` to `out`, killed after so many tensors, or before its journal is removed."""
    command = ["merge", "--seeds", "code", "law", "math", "--recipe", "bam", "--out", "out", *arguments]
    done = subprocess.run([sys.executable, "-c", KILLED, what, str(after), *command], cwd=folder, check=False)
    assert done.returncode == -9
    return folder / PARTIAL


@pytest.fixture
def staged(seeds, tmp_path):
    """What a merge in two shards left that was killed after six tensors."""
    return killed(tmp_path, "--max-shard-size", "60000")


def kill_many(folder, kills, random_seed):
    command = [sys.executable, "-m", "tests.fuzz.kills", str(folder), str(kills), str(random_seed)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    print(counts)  # shown with pytest -rP
    assert counts["kills"] >= kills
    return counts


def test_a_killed_merge_leaves_nothing_or_everything(tmp_path):
    counts = kill_many(tmp_path, 12, 0)
    assert counts["kills while writing"] >= 4
    assert counts["merges taken up again"] >= 2


@pytest.mark.slow
def test_merges_killed_a_thousand_times_leave_nothing_or_everything(tmp_path):
    counts = kill_many(tmp_path, 1000, 1)
    assert counts["kills by time"] >= 300
    assert counts["kills while writing"] >= 400  # so the kills did meet merges that had written something
    assert counts["merges taken up again"] >= 200
    assert counts["kills of a resumed merge"] >= 100
    assert counts["between the renames"] >= 20
    assert counts["new result stood"] >= 50


def another_law(seeds):
    edit_weights(seeds[1], lambda weights: weights["model.norm.weight"].add_(0.5))


def law_from_elsewhere(seeds):
    branch(seeds[0], seeds[1].parent / "elsewhere" / "law", 9)


def another_config(seeds):
    edit_json(seeds[0] / "config.json", trained_by="hand")


def nothing(_):
    pass


# What changes between a kill and the restart: the seeds, then the command; and what is told.
CHANGES = {
    "a seed was trained on": (another_law, {}, "a file of seed 'law' has changed"),
    "a seed was touched": (lambda seeds: os.utime(seeds[1] / "model.safetensors"), {}, "seed 'law' has changed"),
    "a seed of that name elsewhere": (law_from_elsewhere, {"law": "elsewhere/law"}, "seed 'law' has changed"),
    "a seed of another name": (nothing, {"math": "logic=math"}, "seed 'logic' is new"),
    "the first seed's config": (another_config, {}, "the recipe, an option or a seed is another"),
    "two seeds": (nothing, {"order": ("code", "law")}, "the recipe, an option or a seed is another"),
    "another order": (nothing, {"order": ("law", "code", "math")}, "the recipe, an option or a seed is another"),
    "another recipe": (nothing, {"recipe": "btx"}, "the recipe, an option or a seed is another"),
    "a recipe's value": (nothing, {"set": ("router.ffn.top_k=2",)}, "the recipe, an option or a seed is another"),
    "another random seed": (nothing, {"options": {"random_seed": 1}}, "the recipe, an option or a seed is another"),
    "another dtype": (nothing, {"options": {"dtype": "F32"}}, "the recipe, an option or a seed is another"),
    "other shards": (nothing, {"max_shard_size": 50_000}, "--max-shard-size is another"),
    "one shard": (nothing, {"max_shard_size": 10**9}, "--max-shard-size is another"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_merge_starts_afresh_and_says_why(change, seeds, staged, tmp_path):
    damage, now, why = CHANGES[change]
    damage(seeds)
    paths = [tmp_path / now.get(name, name) for name in now.get("order", ("code", "law", "math"))]
    paths = [f"logic={path.parent / 'math'}" if "=" in path.name else path for path in paths]
    plan = make_plan(paths, now.get("recipe", "bam"), *now.get("set", ()), **now.get("options", {}))
    size, told, made = now.get("max_shard_size", 60_000), [], []
    merge(plan, tmp_path / "out", max_shard_size=size, tell=told.append, progress=made.append)
    assert len(told) == 1
    assert "is not taken up" in told[0]
    assert why in told[0]
    assert sum(made) == plan.nbytes
    same_as_undisturbed(plan, tmp_path, size)


def same_as_undisturbed(plan, folder, max_shard_size=60_000):
    merge(plan, folder / "undisturbed", max_shard_size=max_shard_size)
    assert digests(folder / "out") == digests(folder / "undisturbed")
    assert verify(folder / "out").problems == []
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_files_beside_the_weights_are_those_of_the_restart(seeds, tmp_path):
    """The weights are the same, so they are taken up; the other files are not what they were."""
    (seeds[0] / "chat_template.jinja").write_text("{{ messages }}")
    partial = killed(tmp_path, "--max-shard-size", "60000", what="remove", after=0)
    assert (partial / "chat_template.jinja").exists()
    (seeds[0] / "chat_template.jinja").unlink()
    edit_json(seeds[0] / "generation_config.json", temperature=0.5)
    plan, told = make_plan(seeds), []
    merge(plan, tmp_path / "out", max_shard_size=60_000, tell=told.append)
    assert "going on after" in told[0]
    same_as_undisturbed(plan, tmp_path)


def again(monkeypatch, seeds, tmp_path):
    """Go on in `out`: the tensors that were written, and what was told."""
    written, told = [], []
    with monkeypatch.context() as patch:
        real = Assembler.jobs
        patch.setattr(Assembler, "jobs", lambda self, one: written.append(one.name) or real(self, one))
        merge(make_plan(seeds), tmp_path / "out", max_shard_size=60_000, tell=told.append)
    return sorted(written), told


def test_only_what_is_damaged_is_written_again(seeds, staged, tmp_path, monkeypatch):
    shutil.copytree(staged, tmp_path / "copy")
    claimed = [json.loads(line) for line in (staged / JOURNAL).read_text().splitlines() if '"tensor"' in line]
    claimed = {line["tensor"] for line in claimed}
    missing = sorted({tensor.name for tensor in make_plan(seeds).tensors} - claimed)
    assert len(claimed) >= 6
    assert missing
    written, told = again(monkeypatch, seeds, tmp_path)
    assert written == missing
    assert "going on after" in told[0]
    whole, draw = digests(tmp_path / "out"), random.Random(0)
    places = json_header_places(tmp_path / "out")
    for name in sorted(claimed):
        shutil.rmtree(tmp_path / "out")
        shutil.copytree(tmp_path / "copy", staged)
        file, begin, end = places[name]
        data = bytearray((staged / file).read_bytes())
        data[draw.randrange(begin, end)] ^= 1 << draw.randrange(8)
        (staged / file).write_bytes(data)
        assert again(monkeypatch, seeds, tmp_path)[0] == sorted([*missing, name])
        assert digests(tmp_path / "out") == whole
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def json_header_places(folder):
    """By tensor its file, and where its bytes begin and end."""
    places = {}
    for file in folder.glob("*.safetensors"):
        data = file.read_bytes()
        base = 8 + int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8:base]).items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                places[name] = (file.name, base + begin, base + end)
    return places


NASTY = [b"", b"\n", b"null", b"[]", b"{}", b"\x00" * 5000, b"\xff\xfe{", b"[" * 100_000, b'{"a":' * 100_000]
NASTY += [b'{"identity": ' + value + b"}" for value in (b"null", b"3", b"{}", b'{"upcycle": "0.1.0"}', b"[[]]")]
NASTY += [b'{"tensor": ' + value + b"}" for value in (b"null", b'"x"', b'"x", "sums": 3', b'[], "sums": [[]]')]
NASTY += [b'{"tensor": "x", "sums": ' + value + b"}" for value in (b"null", b"{}", b'"abc"', b"9" * 5000, b"[NaN]")]


def nasty_journals(data, draw, count):
    """A journal cut short, with other bytes, with lines lost, doubled, swapped, foreign."""
    lines = data.splitlines(keepends=True)
    names = [json.loads(line)["tensor"] for line in lines if b'"tensor"' in line]
    yield from NASTY
    yield from (data + line + b"\n" + data for line in NASTY)
    yield from (b"\n".join([lines[1], line, *lines[2:]]) for line in NASTY)
    # The sums of one tensor said of another, and of one that is not written.
    yield data.replace(names[0].encode(), names[1].encode())
    yield data.replace(names[0].encode(), b"dense.model.norm.weight")
    for _ in range(count):
        mixed, cut = bytearray(data), draw.randrange(len(data))
        for _ in range(draw.choice([1, 1, 3, 50])):
            mixed[draw.randrange(len(data))] = draw.randrange(256)
        yield from (data[:cut], data[cut:], bytes(mixed), b"".join(draw.choices(lines, k=len(lines))))


@pytest.mark.usefixtures("no_hang")
def test_a_damaged_journal_never_gives_a_wrong_result(seeds, staged, tmp_path):
    shutil.copytree(staged, tmp_path / "copy")
    plan = make_plan(seeds)
    merge(plan, tmp_path / "undisturbed", max_shard_size=60_000)
    expected, taken_up = digests(tmp_path / "undisturbed"), 0
    for journal in nasty_journals((staged / JOURNAL).read_bytes(), random.Random(0), 25):
        shutil.rmtree(staged, ignore_errors=True)
        shutil.copytree(tmp_path / "copy", staged)
        (staged / JOURNAL).write_bytes(journal)
        told = []
        merge(plan, tmp_path / "out", max_shard_size=60_000, overwrite=True, tell=told.append)
        assert digests(tmp_path / "out") == expected, journal[:2000]
        taken_up += any("going on" in text for text in told)
    assert taken_up > 50
    assert verify(tmp_path / "out").problems == []


def refused(plan, out, max_shard_size=10**9):
    """The message of a merge that was refused, or None."""
    try:
        merge(plan, out, max_shard_size=max_shard_size)
    except OutputError as error:
        return str(error)
    return None


@pytest.mark.usefixtures("no_hang")
@pytest.mark.parametrize("name", [JOURNAL, "model-00001-of-00002.safetensors", "config.json", "x"])
@pytest.mark.parametrize("what", ["folder", "link", "link to nothing", "fifo", "empty"])
def test_odd_remains_are_removed_or_refused(name, what, seeds, staged, tmp_path):
    """Never a wrong result, and nothing outside is touched."""
    (tmp_path / "precious").write_bytes(b"years of work")
    (staged / name).unlink(missing_ok=True)
    if what == "folder":
        (staged / name).mkdir()
    elif what == "fifo":
        os.mkfifo(staged / name)
    elif what == "empty":
        (staged / name).touch()
    else:
        (staged / name).symlink_to(tmp_path / ("precious" if what == "link" else "nowhere"))
    plan = make_plan(seeds)
    if refused(plan, tmp_path / "out", 60_000):
        assert not (tmp_path / PARTIAL).exists()  # so that the next one starts afresh
        merge(plan, tmp_path / "out", max_shard_size=60_000)
    assert (tmp_path / "precious").read_bytes() == b"years of work"
    assert not (tmp_path / "nowhere").exists()
    same_as_undisturbed(plan, tmp_path)


def mount(folder, pages):
    folder.mkdir(exist_ok=True)
    size = f"size={4096 * pages}"
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)], capture_output=True, check=False)
    return done.returncode == 0


@pytest.fixture
def disk(tmp_path, monkeypatch):
    """A function that mounts a disk of so many pages of 4096 bytes, empty, at one place."""
    folder = tmp_path / "disk"
    monkeypatch.setattr(preflight, "free_bytes", lambda _: 10**12)  # else nothing would be written at all

    def mounted(pages):
        if os.path.ismount(folder):
            subprocess.run(["umount", str(folder)], check=True)
        if not mount(folder, pages):
            pytest.skip("needs the right to mount a tmpfs")
        return folder

    yield mounted
    if os.path.ismount(folder):
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("max_shard_size", [10**9, 30_000])
def test_a_full_disk_of_any_size_is_told_and_nothing_is_left(max_shard_size, seeds, tmp_path, disk):
    plan, enough = make_plan(seeds), None
    merge(plan, tmp_path / "undisturbed", max_shard_size=max_shard_size)
    for pages in range(1, 100):
        folder = disk(pages)
        refusal = refused(plan, folder / "new" / "out", max_shard_size)
        if refusal is not None:
            assert enough is None, f"{pages} pages are too few, {enough} were enough"
            assert "the disk is full" in refusal, pages
            assert list(folder.iterdir()) == [], pages
            continue
        enough = enough or pages
        assert digests(folder / "new" / "out") == digests(tmp_path / "undisturbed")
        assert [path.name for path in folder.glob("*/*")] == ["out"]
        if pages > enough + 2:
            break
    taken = sum(-(-file.stat().st_size // 4096) for file in (tmp_path / "undisturbed").iterdir())
    assert enough
    assert taken <= enough <= taken + 4  # the journal, folders


def test_a_former_result_survives_a_full_disk(seeds, tmp_path, disk):
    former = make_plan(seeds, random_seed=5)
    taken = None
    for pages in range(30, 100, 7):
        folder = disk(pages)
        if refused(former, folder / "out"):
            continue
        taken, before = pages, digests(folder / "out")
        with pytest.raises(OutputError, match="the disk is full"):
            merge(make_plan(seeds), folder / "out", overwrite=True)
        assert digests(folder / "out") == before
        assert [path.name for path in folder.iterdir()] == ["out"]
        break
    assert taken
