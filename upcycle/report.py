"""A report: one page about mixtures, checkpoints and trainings, that needs nothing but itself.

`write_report` reads the sources, says what goes on the page as plain data, draws, and writes the page and, beside it,
the pictures as PNGs, both at once or neither.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from upcycle.checkpoint import read_json
from upcycle.errors import DataError, OutputError
from upcycle.report_tables import (
    Model,
    Settings,
    Table,
    describe_all,
    loss_tables,
    own_expert_table,
    recorded_table,
    settings_of,
    speed_table,
    task_table,
)
from upcycle.run_records import (
    Routing,
    Source,
    clean,
    measured_routing,
    name_apart,
    read_sources,
    recorded_routing,
    shorten,
)
from upcycle.version import __version__

if TYPE_CHECKING:
    from upcycle.pictures import Picture

TEMPLATE: Final = "report.html.j2"
_MARKER: Final = re.compile(rb'<meta name="generator" content="upcycle [^"<>]{1,40}">')
MAX_EVALUATION: Final = 200_000_000  # bytes of JSON
_MARKED: Final = 2000  # bytes of a page's beginning, within which the marker stands
_PNG: Final = re.compile(rb"\x89PNG\r\n\x1a\n.{0,200}tEXtSoftware\x00upcycle ", re.S)


@dataclass(frozen=True)
class Report:
    """What was written: the page, its size in bytes, and the pictures as files."""

    out: Path
    pictures: list[Path]
    bytes: int


@dataclass
class Part:
    """A stretch of a section: tables and pictures under a heading of their own, if it has one."""

    title: str = ""
    intro: str = ""
    tables: list[Table] = field(default_factory=list)
    pictures: "list[Picture]" = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.tables or self.pictures)


@dataclass(frozen=True)
class Page:
    """Everything on the page, in its order."""

    title: str
    verdict: Sequence[str]
    notes: Sequence[str]
    models: Sequence[Model]
    losses: Part
    curves: Part
    routing: Sequence[Part]
    similarity: Sequence[Part]
    speed: Part
    settings: Sequence[Settings]

    def pictures(self) -> "list[Picture]":
        """Every picture, in its order."""
        parts = (self.losses, self.curves, *self.routing, *self.similarity, self.speed)
        return [picture for part in parts for picture in part.pictures]


def write_report(
    sources: Sequence[Path], out: Path, evaluation: Mapping[str, Any] | None = None, overwrite: bool = False
) -> Report:
    """Write a page about `sources`, and its pictures as PNGs into the folder `<stem>-pictures` beside it.

    Args:
        sources: folders of checkpoints or trainings.
        out: the page.
        evaluation: what `upcycle eval --json` prints, of these sources and others.
        overwrite: replace a former report; anything else is never replaced.

    Raises:
        CheckpointError: a source that is neither, or is damaged.
        OutputError: an output that exists or cannot be written; then nothing is left half-done.
    """
    folder = _pictures_folder(out)
    check_output(out, overwrite)
    page = make_page(read_sources(list({os.path.realpath(path): path for path in sources}.values())), evaluation)
    text = render(page)
    files = {f"{picture.name}.png": picture.png for picture in page.pictures()}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _write(out, folder, text.encode(), files)
    except OSError as error:
        raise OutputError(f"{out} cannot be written: {error.strerror or error}; choose another --out") from error
    return Report(out, [folder / name for name in files], len(text.encode()))


def read_evaluation(file: Path) -> dict[str, Any]:
    """What `upcycle eval --json` printed into a file.

    Raises:
        CheckpointError: it cannot be read; DataError: it holds something else.
    """
    found = read_json(file, MAX_EVALUATION)
    models = found.get("models")
    rows = list(models.values()) if isinstance(models, dict) else []
    if not rows or not all(isinstance(row, dict) and isinstance(row.get("domains"), dict) for row in rows):
        raise DataError(f"{file} is no evaluation; expected what `upcycle eval --json` prints")
    return found


def _pictures_folder(out: Path) -> Path:
    return out.parent / f"{out.stem}-pictures"


def check_output(out: Path, overwrite: bool) -> None:
    """Refuse an output that holds anything but a former report, or that one without `overwrite`.

    Raises:
        OutputError: and what to do.
    """
    folder = _pictures_folder(out)
    try:
        if os.path.lexists(out):
            if out.is_symlink() or not out.is_file():
                raise OutputError(f"output {out} exists and is no plain file; choose another --out")
            with out.open("rb") as file:
                ours = _MARKER.search(file.read(_MARKED))
            if not ours:
                raise OutputError(
                    f"output {out} exists and is no report of upcycle, so it is never overwritten; choose another --out"
                )
            if not overwrite:
                raise OutputError(f"output {out} exists; --yes overwrites it, --out chooses another file")
        if os.path.lexists(folder):
            _check_pictures(folder, overwrite)
    except OSError as error:
        raise OutputError(f"output {out} cannot be read: {error.strerror}; choose another --out") from error


def _check_pictures(folder: Path, overwrite: bool) -> None:
    if folder.is_symlink() or not folder.is_dir():
        raise OutputError(f"{folder}, the folder of pictures, exists and is no folder; choose another --out")
    found = sorted(folder.iterdir())
    for path in found:
        ours = path.suffix == ".png" and path.is_file() and not path.is_symlink()
        if ours:
            with path.open("rb") as file:
                ours = bool(_PNG.match(file.read(400)))
        if not ours:
            raise OutputError(
                f"{folder}, the folder of pictures, holds '{clean(path.name)}', which is no picture of a report, so it "
                "is never overwritten; choose another --out"
            )
    if found and not overwrite:
        raise OutputError(f"{folder}, the folder of pictures, exists; --yes overwrites it, --out chooses another file")


def _write(out: Path, folder: Path, page: bytes, files: Mapping[str, bytes]) -> None:
    """Write everything under temporary names, then put it in place; a failure puts the former pictures back."""
    staging = Path(tempfile.mkdtemp(prefix=f".{out.stem}-", dir=out.parent))
    try:
        (staging / "new").mkdir()
        for name, png in files.items():
            (staging / "new" / name).write_bytes(png)
        (staging / "page").write_bytes(page)
        former = folder.exists()
        if former:
            folder.rename(staging / "former")
        try:
            if files:
                (staging / "new").rename(folder)
            (staging / "page").replace(out)
        except BaseException:  # an interrupt, too
            if files and folder.exists():
                folder.rename(staging / "failed")
            if former:
                (staging / "former").rename(folder)
            raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def render(page: Page) -> str:
    """The page as HTML."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["cut"] = shorten
    environment.filters["svg"] = lambda picture: Markup(picture.svg)
    template = (resources.files("upcycle") / TEMPLATE).read_text(encoding="utf-8")
    return environment.from_string(template).render(page=page, version=__version__)


def make_page(sources: Sequence[Source], evaluation: Mapping[str, Any] | None) -> Page:
    """Say and draw what goes on the page."""
    from upcycle.report_pictures import (
        comparison_picture,
        heldout_pictures,
        loss_picture,
        routing_pictures,
        similarity_pictures,
        speed_picture,
    )

    labels = _label_models(sources, evaluation)
    routings = _routings(sources, evaluation, labels)
    runs = [source for source in sources if source.training is not None]
    losses = Part()
    if evaluation:
        losses.tables = [*loss_tables(evaluation, labels), task_table(evaluation, labels)]
        losses.pictures = list(comparison_picture(evaluation, labels))
    else:
        recorded = [run for run in runs if run.metrics.evaluations]
        title = "" if len(recorded) > 1 else "Held-out loss, nats per token"
        losses.tables = [recorded_table(run, title or run.label) for run in recorded]
    losses.tables = [table for table in losses.tables if table.rows]
    stems = _stems(list(routings))
    measured = [run for run in runs if run.metrics.steps]
    speed = Part(tables=[speed_table(measured)], pictures=list(speed_picture(measured))) if measured else Part()
    routing, similarity = [], []
    for label, one in routings.items():
        own = own_expert_table(one)
        tables = [own] if own.rows else []
        routing.append(Part(label, one.origin, tables, list(routing_pictures(one, stems[label]))))
        similarity.append(Part(label, "", [], list(similarity_pictures(one, stems[label]))))
    return Page(
        title=", ".join(source.label for source in sources),
        verdict=[clean(sentence) for sentence in (evaluation or {}).get("verdict", ())],
        notes=[f"{source.label}: {clean(note)}" for source in sources for note in source.notes],
        models=describe_all(sources),
        losses=losses,
        curves=Part(pictures=[*loss_picture(measured), *heldout_pictures(runs)]),
        routing=[part for part in routing if part],
        similarity=[part for part in similarity if part],
        speed=speed,
        settings=[settings_of(run) for run in runs if run.training],
    )


def _label_models(sources: Sequence[Source], evaluation: Mapping[str, Any] | None) -> dict[str, str]:
    """A name for each model evaluated: its source's where it is one; names of sources and others tell them apart."""
    models = list((evaluation or {}).get("models", {}))
    known = {
        os.path.realpath(folder): source
        for source in sources
        for folder in (source.folder, source.checkpoint)
        if folder
    }
    places = {path: os.path.realpath(path) for path in models}
    others = [path for path in models if places[path] not in known]
    names = name_apart([*(str(source.folder) for source in sources), *others])
    for source, name in zip(sources, names, strict=False):
        source.label = name
    named = dict(zip(others, names[len(sources) :], strict=True))
    return {path: named[path] if path in named else known[places[path]].label for path in models}


def _routings(
    sources: Sequence[Source], evaluation: Mapping[str, Any] | None, labels: Mapping[str, str]
) -> dict[str, Routing]:
    """What is known of each mixture's routing: as measured by the evaluation, else as its training recorded it."""
    measured = {
        labels[path]: measured_routing(model["routing"])
        for path, model in (evaluation or {}).get("models", {}).items()
        if model.get("routing")
    }
    found: dict[str, Routing] = {}
    for source in sources:
        routing = measured.pop(source.label, None) or recorded_routing(source)
        if routing:
            found[source.label] = routing
    return found | measured


def _stems(labels: Sequence[str]) -> dict[str, str]:
    """What is added to the file names of each mixture's pictures: nothing where there is one mixture."""
    if len(labels) < 2:
        return dict.fromkeys(labels, "")
    from upcycle.report_pictures import slug

    return {label: f"-{number}-{slug(label)}" for number, label in enumerate(labels, 1)}
