"""The report: what is on the page, what it refuses to write over, and how it looks in a real browser."""

import html
import json
import math
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from tests.conftest import merge_and_load
from tests.tiny import BY_NAME, make_seeds, mixtral_config
from upcycle.errors import CheckpointError, OutputError
from upcycle.report import Report, write_report
from upcycle.report_pictures import routing_pictures
from upcycle.run_records import read_sources, recorded_routing

DOMAINS = ["docs", "a", "b"]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


def step_line(step: int, layers: int = 2, experts: int = 3, **changes: Any) -> dict[str, Any]:
    random = np.random.default_rng(step)
    nll = 3 + math.exp(-step / 20) + 0.1 * random.normal()
    shares = random.dirichlet(np.ones(experts), layers).round(5).tolist()
    return {
        "step": step,
        "tokens": 64 * step,
        "loss": nll + 0.02,
        "nll": nll,
        "load": shares,
        "gates": shares,
        "entropy": [1.0] * layers,
        "attention_entropy": [0.9] * layers,
        "gradient_norm": 1.0,
        "learning_rate": 1e-3,
        "skipped": None,
        "seconds": 0.5,
        "tokens_per_second": 128.0 + step % 7,
        **changes,
    }


def evaluation_line(step: int, domains: list[str], layers: int = 2, experts: int = 3) -> dict[str, Any]:
    random = np.random.default_rng(step)
    shares = {name: random.dirichlet(np.ones(experts), layers).round(5).tolist() for name in domains}
    held = {name: {"loss": 5 - 0.01 * step, "load": shares[name], "gates": shares[name]} for name in domains}
    return {"step": step, "heldout": held}


def make_run(
    folder: Path, model: Path | None = None, lines: list[Any] | None = None, trained_from: str = "mix"
) -> Path:
    """A training's folder as `upcycle train` leaves it, of a finished model or without."""
    if model:
        shutil.copytree(model, folder)
    else:
        folder.mkdir(parents=True)
    settings = {"steps": 30, "sequence_length": 16, "learning_rate": 1e-3, "shard": False, "shares": {"docs": 1.0}}
    data = {"docs": {"tokens": 3_000_000, "documents": None}}
    reasons = {"learning_rate": "step law: 0.001"}
    table: dict[str, Any] = {
        "upcycle_version": "1",
        "model": trained_from,
        "settings": settings,
        "reasons": reasons,
        "data": data,
    }
    (folder / "train.json").write_text(json.dumps({**table, "epochs": {"docs": 0.25}}))
    if lines is None:
        lines = [evaluation_line(0, DOMAINS), *map(step_line, range(1, 31)), evaluation_line(30, DOMAINS)]
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "metrics.jsonl").write_text("".join(text + "\n" for text in texts))
    return folder


def make_evaluation(paths: list[str], mixture: str | None = None) -> dict[str, Any]:
    """What `upcycle eval --json` prints: each model is 0.1 nats worse than the one before it."""
    random = np.random.default_rng(0)
    shares = random.dirichlet(np.ones(3), 2).tolist()
    cosines = np.full((2, 3, 3), 0.5)
    cosines[:, [0, 1, 2], [0, 1, 2]] = 1
    kinds = ("ffn_weights", "ffn_outputs", "attention_weights", "attention_outputs")
    models: dict[str, Any] = {}
    for index, path in enumerate(paths):
        loss = 3 + 0.1 * index
        one = {"loss": loss, "ci95": [loss - 0.02, loss + 0.02], "perplexity": math.exp(loss), "tokens": 100}
        domains = {name: {**one, "bits_per_byte": 1 + 0.01 * index, "documents": 3} for name in DOMAINS}
        models[path] = {"domains": domains, "mean_loss": loss, "role": "mixture" if path == mixture else "seed a"}
        if path == mixture:
            routed = {
                "load": shares,
                "gates": shares,
                "entropy": [0.8, 0.7],
                "attention_entropy": [0.8, 0.9],
            }
            own = {"own_expert": "a", "own_share": [0.5, 0.25]}
            none = {"own_expert": None, "own_share": None}
            models[path]["routing"] = {
                "experts": ["a", "b", "c"],
                "top_k": 1,
                "domains": {name: {**routed, **(own if name == "a" else none)} for name in DOMAINS},
                "similarity": dict.fromkeys(kinds, cosines.tolist()),
            }
    return {"models": models, "measure": "loss", "verdict": ["The mixture is ahead."]}


@pytest.fixture
def blank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are laid out but not drawn, for tests of what stands beside them: drawing takes most of the time."""
    from upcycle import pictures

    def finish(figure: Any, name: str, caption: str, alt: str) -> pictures.Picture:
        png = b"\x89PNG\r\n\x1a\n0000tEXtSoftware\x00upcycle 1"
        return pictures.Picture(name, caption, alt, f'<svg aria-label="{html.escape(alt)}"></svg>', png)

    monkeypatch.setattr(pictures, "_finish", finish)


def page_of(sources: list[Path], out: Path, evaluation: dict[str, Any] | None = None) -> str:
    write_report(sources, out, evaluation)
    return out.read_text()


def words(page: str) -> str:
    """What a reader sees of a page, outside the pictures."""
    page = re.sub(r"<(style|svg).*?</\1>", " ", page, flags=re.S)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", page)))


def check_png(data: bytes) -> tuple[int, int]:
    """Every chunk's checksum of a PNG; its size."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, kind = 8, b""
    while kind != b"IEND":
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        body = data[at + 4 : at + 8 + length]
        assert zlib.crc32(body) == int.from_bytes(data[at + 8 + length : at + 12 + length], "big")
        at += 12 + length
    assert at == len(data)
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `mixture` of other tests, made once: a report only reads it."""
    folder = tmp_path_factory.mktemp("mixed")
    merge_and_load(make_seeds(BY_NAME["llama"], folder / "seeds", dtype=torch.bfloat16), folder / "mixture", "bam")
    return folder / "mixture"


@pytest.fixture(scope="module")
def full(mixture: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    """A page with every section, of a run with a long name."""
    folder = tmp_path_factory.mktemp("full")
    run = make_run(folder / ("a-run-with-a-very-long-name-" * 5), mixture)
    evaluation = make_evaluation([str(run), "other", "x" * 200], str(run))
    return write_report([run], folder / "report.html", evaluation)


def test_a_run_is_shown_with_what_it_recorded(mixture, blank, tmp_path):
    run = make_run(tmp_path / "run", mixture)
    written = write_report([run], tmp_path / "report.html")
    page = written.out.read_text()
    text = words(page)
    assert "mixture of 3 experts" in text
    assert "docs 5.000 4.700 \N{MINUS SIGN}0.300" in text
    assert "FFN, attention query, attention key, attention value, attention output" in text
    assert "not stated" in text  # licences
    assert "step law: 0.001" in text
    assert "1,920" in text or "1.92 k" in text  # tokens
    assert "Speed, median 131 tokens/s" in text
    names = [path.stem for path in written.pictures]
    assert names == ["loss", *(f"heldout-{name}" for name in DOMAINS), "load", "gates", "own-expert", "entropy",
                     "attention-entropy", "speed"]  # fmt: skip
    assert written.bytes == len(page.encode())
    assert [path.name for path in (tmp_path / "report-pictures").iterdir()]
    assert {path.name for path in tmp_path.iterdir()} == {"run", "report.html", "report-pictures"}


def test_an_evaluation_is_shown_with_the_best_marked(mixture, blank, tmp_path):
    paths = [str(mixture), "elsewhere/a", "elsewhere/b"]
    evaluation = make_evaluation(paths, str(mixture))
    evaluation["models"]["elsewhere/b"]["tasks"] = {"arc_easy": {"acc": 0.5}}
    page = page_of([mixture], tmp_path / "report.html", evaluation)
    text = words(page)
    assert text.index("The mixture is ahead.") < text.index("What it is made of") < text.index("Held-out loss")
    assert text.index("Held-out loss") < text.index("Routing") < text.index("How alike")
    assert page.count('class="best"') == 4  # three domains and their mean, of the loss alone
    assert page.count('aria-label="best"') == 4  # not by colour alone
    assert "mixture mixture ★ 3.000 ± 0.020" in text
    assert "arc_easy acc – – 0.5000" in text
    assert "a a 37.5% 33.3%" in text
    pictures = {path.stem for path in (tmp_path / "report-pictures").iterdir()}
    assert {"load", "gates", "own-expert", "similarity-ffn-outputs", "similarity-attention-weights"} <= pictures
    assert "loss" not in pictures  # nothing was trained
    behind = page[page.index('id="picture-losses"') :]
    assert "docs: mixture, a: mixture" in behind[: behind.index("</svg>")]


def test_different_tokenizers_are_compared_by_bits_alone(mixture, blank, tmp_path):
    evaluation = {**make_evaluation([str(mixture), "other"]), "measure": "bits_per_byte"}
    page = page_of([mixture], tmp_path / "report.html", evaluation)
    assert page.index("Held-out bits per byte") < page.index("Held-out loss")
    assert "different tokenizers" in page
    bits = page[page.index("Held-out bits per byte") : page.index("Held-out loss")]
    assert page.count('class="best"') == bits.count('class="best"') == 4


def test_several_runs_share_the_pictures_and_keep_their_names(mixture, blank, tmp_path):
    runs = [make_run(tmp_path / name / "out", mixture) for name in ("one", "two")]
    page = page_of(runs, tmp_path / "report.html")
    assert "one/out, two/out" in words(page)
    names = {path.stem for path in (tmp_path / "report-pictures").iterdir()}
    assert {"heldout-a", "load-1-one-out", "load-2-two-out"} <= names
    picture = page[page.index('id="picture-heldout-a"') :]
    assert "two/out: 5.000 at step 0, 4.700 at step 30" in picture[: picture.index("</svg>")]


def test_names_are_escaped_and_cut(mixture, tmp_path):
    nasty = '<script>alert("x")</script>&$a$ id="y" #1b1c1d'
    domains = [nasty, "x" * 300, "数学 new\nline\x07"]
    run = make_run(tmp_path / "run", mixture, [evaluation_line(0, domains), evaluation_line(9, domains)], nasty)
    evaluation = {**make_evaluation([str(run), nasty]), "verdict": [nasty]}
    for number, found in enumerate((None, evaluation)):
        page = page_of([run], tmp_path / f"{number}.html", found)
        assert "<script" not in page
        assert words(page).count('<script>alert("x")</script>') >= 1
        assert "\x07" not in page
        titles = re.findall(r"<text[^>]*>([^<]*)</text>", page)
        assert max(map(len, map(html.unescape, titles))) <= 45


def test_the_pictures_follow_the_page_s_colours_and_have_words_and_ids_of_their_own(full):
    page = full.out.read_text()
    assert "#1b1c1d" not in page
    assert page.count("currentColor") > 50
    assert "prefers-color-scheme: dark" in page
    assert "@page" in page
    figures = re.findall(r"<figure.*?</figure>", page, re.S)
    assert len(figures) >= 10
    for figure in figures:
        label = re.search(r'<svg viewBox="[^"]+" role="img" aria-label="([^"]{30,})"', figure)
        assert label
        assert re.search(r"<figcaption>[^<]{40,}</figcaption>", figure)
    ids = re.findall(r'\sid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', page)) <= set(ids)
    for address in re.findall(r'(?:src|href)="([^"]+)"', page):
        assert address.startswith(("#", "data:", "https://arxiv.org/")), address


def test_the_pictures_lie_beside_the_page_as_pngs(full):
    assert set(full.pictures) == set((full.out.parent / "report-pictures").iterdir())
    for path in full.pictures:
        width, height = check_png(path.read_bytes())
        assert width == 828  # 4.6 inches at 180 a inch
        assert height > 400
        assert path.stat().st_size < 300_000


def test_the_same_input_gives_the_same_bytes(mixture, tmp_path):
    run = make_run(tmp_path / "run", mixture, [evaluation_line(0, ["docs"]), step_line(1, gates=None)])
    first = write_report([run], tmp_path / "report.html")
    before = [path.read_bytes() for path in (first.out, *first.pictures)]
    again = write_report([run], tmp_path / "report.html", overwrite=True)
    assert [path.read_bytes() for path in (again.out, *again.pictures)] == before


def test_damaged_and_missing_metrics_are_said_and_not_fatal(mixture, blank, tmp_path):
    lines = [
        evaluation_line(0, ["docs"]),
        step_line(1, nll=None, loss=None, skipped="the loss is nan", tokens_per_second="fast"),
        step_line(2, load=[[1, 2], [3]], seconds=10**400),
        '{"step": 3, "nll": ',
        "[1, 2]",
        '{"step": 4, "nll": NaN, "entropy": [[1]]}',
        {"step": 5, "heldout": {"docs": {"loss": None, "load": "x"}, "a": 3}},
    ]
    run = make_run(tmp_path / "run", mixture, lines)
    text = words(page_of([run], tmp_path / "report.html"))
    assert "run: metrics.jsonl: 2 lines (4, 5) are damaged" in text
    assert "Steps skipped 1" in text
    assert "docs 5.000 – –" in text
    empty = make_run(tmp_path / "empty", None, [])
    text = words(page_of([empty], tmp_path / "empty.html"))
    assert "holds no step yet" in text
    assert "saved nothing yet" in text
    (empty / "train.json").write_text("{")
    (empty / "metrics.jsonl").unlink()
    assert "train.json" in words(page_of([empty], tmp_path / "damaged.html"))


def test_an_unfinished_run_is_shown_by_its_last_checkpoint(mixture, blank, tmp_path):
    run = make_run(tmp_path / "run")
    shutil.copytree(mixture, run / "checkpoints" / "step-000020")
    (run / "checkpoints" / "step-000030").mkdir()  # cut short
    text = words(page_of([run], tmp_path / "report.html"))
    assert "not finished; shown is checkpoints/step-000020" in text
    assert "mixture of 3 experts" in text
    (run / "checkpoints" / "step-000020" / "model.safetensors").write_bytes(b"short")
    text = words(page_of([run], tmp_path / "other.html"))
    assert "the checkpoint cannot be read" in text


def test_dense_models_and_transformers_own_mixtures_are_shown(base_seed, blank, tmp_path):
    from transformers import MixtralForCausalLM

    MixtralForCausalLM(mixtral_config()).save_pretrained(tmp_path / "native")
    text = words(page_of([base_seed, tmp_path / "native"], tmp_path / "report.html"))
    assert "dense model" in text
    assert "mixture of 4 experts" in text
    assert "top 2 of 4 FFN experts" in text
    assert text.count("Weight files") == 2


def test_a_page_of_a_large_run_stays_small(tmp_path):
    layers, experts, domains = 80, 64, [f"domain-{number}" for number in range(8)]
    few = {"load": [], "gates": [], "entropy": [], "attention_entropy": []}
    lines: list[Any] = [evaluation_line(0, domains, layers, experts)]
    lines += [json.dumps(step_line(step, 1, 1, **few)) for step in range(1, 10_001)]
    lines[5000] = step_line(5000, nll=50.0)  # a spike that thinning must keep
    losses = {name: {"loss": 4.0} for name in domains}
    lines += [{"step": step, "heldout": losses} for step in range(100, 10_000, 100)]
    lines += [step_line(10_001, layers, experts), evaluation_line(10_001, domains, layers, experts)]
    written = write_report([make_run(tmp_path / "run", None, lines)], tmp_path / "report.html")
    assert written.bytes < 3_000_000
    from upcycle.pictures import thin

    values = np.sin(np.arange(10_000.0))
    values[[4321, 7000]] = 50, math.nan
    x, y = thin(range(10_000), values)
    assert len(x) <= 1000
    assert 50 in y
    assert np.isnan(y).sum() == 1
    assert (x[0], x[-1]) == (0, 9999)


def test_what_is_no_report_is_never_overwritten(mixture, blank, tmp_path):
    out, folder = tmp_path / "out" / "report.html", tmp_path / "out" / "report-pictures"
    run = make_run(tmp_path / "run", mixture, [evaluation_line(0, ["docs"]), evaluation_line(1, ["docs"])])
    write_report([run], out)
    written = {path: path.read_bytes() for path in out.parent.rglob("*") if path.is_file()}
    with pytest.raises(OutputError, match="--yes"):
        write_report([run], out)
    (folder / "mine.png").write_bytes(b"\x89PNG\r\n\x1a\n but not yours")
    with pytest.raises(OutputError, match=r"mine\.png"):
        write_report([run], out, overwrite=True)
    (folder / "mine.png").unlink()
    out.rename(tmp_path / "kept")
    with pytest.raises(OutputError, match="folder of pictures"):
        write_report([run], out)
    out.write_text("<html>my own page</html>")
    with pytest.raises(OutputError, match="no report"):
        write_report([run], out, overwrite=True)
    out.unlink()
    out.mkdir()
    with pytest.raises(OutputError, match="plain file"):
        write_report([run], out, overwrite=True)
    out.rmdir()
    (tmp_path / "kept").rename(out)
    assert {path: path.read_bytes() for path in out.parent.rglob("*") if path.is_file()} == written
    write_report([mixture], out, overwrite=True)  # without pictures: those of the former report go
    assert sorted(path.name for path in out.parent.iterdir()) == ["report.html"]


def test_a_failure_leaves_the_former_report(mixture, blank, tmp_path, monkeypatch):
    out = tmp_path / "out" / "report.html"
    run = make_run(tmp_path / "run", mixture)
    write_report([run], out)
    before = {path: path.read_bytes() for path in out.parent.rglob("*") if path.is_file()}
    replace = Path.replace

    def fail(path: Path, target: Path) -> Path:
        if target == out:
            raise OSError(28, "No space left on device")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OutputError, match="No space left"):
        write_report([run], out, make_evaluation([str(run)]), overwrite=True)
    assert {path: path.read_bytes() for path in out.parent.rglob("*") if path.is_file()} == before
    assert len(list(out.parent.iterdir())) == 2


@pytest.mark.parametrize("name", ["missing", "empty", "file"])
def test_what_is_neither_checkpoint_nor_run_is_refused(name, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"neither|no folder") as caught:
        write_report([tmp_path / name], tmp_path / "report.html")
    assert name in str(caught.value)
    assert not (tmp_path / "report.html").exists()


def test_importing_does_not_load_matplotlib():
    script = "import sys, upcycle, upcycle.report, upcycle.cli.report; raise SystemExit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_the_command_writes_the_page_and_says_where(mixture, blank, tmp_path, monkeypatch):
    from upcycle.cli import report

    app = typer.Typer()
    app.command()(report.report)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, [str(mixture), str(make_run(tmp_path / "run", mixture)), "--json"])
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["out"] == "report.html"
    assert said["bytes"] == (tmp_path / "report.html").stat().st_size
    assert all((tmp_path / path).is_file() for path in said["pictures"])
    result = CliRunner().invoke(app, [str(mixture)])
    assert isinstance(result.exception, OutputError)
    result = CliRunner().invoke(app, [str(mixture), "--yes"])
    assert result.stdout.startswith("report.html: ")


HARNESS = """<!DOCTYPE html><meta charset="utf-8"><pre id="findings"></pre><script>
async function look(width) {
  const frame = document.createElement("iframe");
  frame.style = `width:${width}px;height:900px;border:0`;  // headless windows have a least width, frames have none
  frame.src = PAGE;
  document.body.append(frame);
  await new Promise(done => frame.onload = done);
  const doc = frame.contentDocument, view = frame.contentWindow, broken = [], sizes = [];
  for (const figure of doc.querySelectorAll("figure")) {
    const svg = figure.querySelector("svg");
    const box = svg ? svg.getBoundingClientRect() : {width: 0, height: 0};
    const drawn = svg ? svg.querySelectorAll("path, text, image").length : 0;
    if (box.width < 200 || box.height < 100 || drawn < 10) broken.push(figure.id);
    for (const image of svg ? svg.querySelectorAll("image") : []) {
      const loaded = new Image();
      const came = await new Promise(tell => {
        loaded.onload = () => tell(true);
        loaded.onerror = () => tell(false);
        loaded.src = image.href.baseVal;
      });
      if (!came) broken.push(figure.id + ": image");
      const place = image.getBoundingClientRect();
      if (!loaded.naturalWidth || place.width < 20 || place.height < 4) broken.push(figure.id + ": empty image");
    }
  }
  const walker = doc.createTreeWalker(doc.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const parent = walker.currentNode.parentElement, text = walker.currentNode.data.trim();
    const box = parent.getBoundingClientRect();
    if (!text || parent.closest("style") || !box.width || !box.height) continue;
    const svg = parent.ownerSVGElement;
    const scale = svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
    sizes.push([parseFloat(view.getComputedStyle(parent).fontSize) * scale, text]);
  }
  sizes.sort((a, b) => a[0] - b[0]);
  const root = doc.documentElement;
  return {
    figures: doc.querySelectorAll("figure").length, broken, smallest: sizes[0], texts: sizes.length,
    over: root.scrollWidth - root.clientWidth, wide: view.innerWidth};
}
(async () => {
  const found = [];
  for (const width of WIDTHS) found.push(await look(width));
  document.getElementById("findings").textContent = JSON.stringify(found);
})();
</script>"""


def in_browser(page: Path, *widths: int) -> tuple[list[dict[str, Any]], list[str]]:
    """What Chromium finds on a page laid out so many pixels wide, and what its console says."""
    harness = page.with_name("harness.html")
    script = HARNESS.replace("PAGE", json.dumps(page.name)).replace("WIDTHS", json.dumps(widths))
    harness.write_text(script.replace("<script>", "<body><script>"))
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files")
    logs = ("--enable-logging=stderr", "--virtual-time-budget=20000", f"--user-data-dir={page.parent / 'profile'}")
    command = [str(CHROMIUM), *options, *logs, "--dump-dom", harness.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    found = re.search(r'<pre id="findings">(.+?)</pre>', done.stdout, re.S)
    assert found, done.stderr[-3000:]
    return json.loads(html.unescape(found[1])), [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium or chrome on the PATH to show the page in")
def test_the_page_is_sound_in_a_real_browser(full):
    findings, console = in_browser(full.out, 400, 1400)
    assert console == []
    for width, found in zip((400, 1400), findings, strict=True):
        assert found["wide"] == width
        assert found["broken"] == []
        assert found["figures"] == len(full.pictures) >= 14
        assert found["over"] <= 0, "the page scrolls sideways"
        assert found["smallest"][0] >= 9, found["smallest"]
        assert found["texts"] > 200


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium or chrome on the PATH to show the page in")
def test_the_browser_finds_what_is_broken(mixture, tmp_path):
    lines = [evaluation_line(0, ["docs"]), step_line(1)]
    written = write_report([make_run(tmp_path / "run", mixture, lines)], tmp_path / "report.html")
    page = written.out.read_text()
    page = re.sub(r"(data:image/png;base64,\s*)iVBOR", r"\1xxxxx", page, count=1)  # a picture within a heat map
    page = re.sub(r'(<figure id="picture-loss">).*?</svg>', r"\1<svg></svg>", page, count=1, flags=re.S)
    page = page.replace("<main>", '<main><div style="width:3000px;font-size:6px">wide</div><script>nothing()</script>')
    written.out.write_text(page)
    (found,), console = in_browser(written.out, 400)
    assert "picture-loss" in found["broken"]
    assert "picture-load: image" in found["broken"]
    assert found["over"] > 0
    assert found["smallest"][0] == 6
    assert any("nothing is not defined" in line for line in console)


def test_split_experts_in_some_layers_are_shown_by_their_names(blank, tmp_path):
    """From a training's record alone: what each picture calls columns and rows, and the own expert's share."""
    overrides = ("experts.granularity=2", "layers.mix=every 2")
    merge_and_load(make_seeds(BY_NAME["llama"], tmp_path / "seeds"), tmp_path / "mix", "bam", *overrides)
    load, gates = [[0.1, 0.2, 0.3, 0.2, 0.1, 0.1]], [[0.5, 0.3, 0.2]]
    line = step_line(1, 1, load=load, gates=gates)
    held = {"step": 1, "heldout": {"a": {"loss": 3.0, "load": load, "gates": gates}}}
    run = make_run(tmp_path / "run", tmp_path / "mix", [line, held])
    (source,) = read_sources([run])
    routing = recorded_routing(source)
    assert routing.experts == ["a.0", "a.1", "b.0", "b.1", "c.0", "c.1"]
    assert (routing.groups, list(routing.layers), routing.top_k) == (["a", "b", "c"], [1], 2)
    assert routing.own_share["a"] == pytest.approx([0.3])  # of both parts together, as a token uses two experts
    made = {picture.name: picture for picture in routing_pictures(routing, "")}
    assert "a: most to b.0, 0.30" in made["load"].alt
    assert "a: most to a, 0.50" in made["gates"].alt
    text = words(page_of([run], tmp_path / "page.html"))
    assert "Each FFN split into 2 experts" in text
    assert "of one that was split the part that it picks" in text
    assert "mixture of 6 experts" in text


def test_a_native_mixture_is_shown_beside_one_seed(blank, tmp_path):
    merge_and_load(make_seeds(BY_NAME["llama"], tmp_path / "seeds"), tmp_path / "mix", "btx", format="native")
    text = words(page_of([make_run(tmp_path / "run", tmp_path / "mix")], tmp_path / "page.html"))
    assert "Class MixtralForCausalLM, of transformers' own" in text
    assert "mixture one seed ratio" in text
    assert "a: most to" in (tmp_path / "page.html").read_text()  # its experts have their seeds' names
