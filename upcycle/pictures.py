"""Pictures of plain numbers through matplotlib: each as SVG text for a page and as PNG bytes for a model card.

Both come from one drawing. Its ink is one sentinel colour, dark on the PNG's white ground; in the SVG it becomes
`currentColor`, so that the picture follows the page's light or dark theme.
"""

import html
import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from upcycle.numeric import Array
from upcycle.run_records import shorten
from upcycle.version import __version__

INK: Final = "#1b1c1d"
SOFTWARE: Final = "upcycle"  # begins the PNGs' "Software" text, by which they are known as ours
WIDTH: Final = 4.6  # inches; 331 user units, so that text of 9 units is 9 px or more where the page is 400 px wide
DPI: Final = 180
MAX_POINTS: Final = 1000
MAX_LABEL: Final = 18  # characters
# Mid tones that stand 3 : 1 against white and against a dark ground, told apart by people with colour blindness too.
COLORS: Final = ("#2f7fc1", "#cf6a17", "#0b9470", "#b5549a", "#8b7500", "#7f68d0", "#2a93a6", "#80868b")
MARKERS: Final = "os^DvPX*"
_STYLE: Final = {
    "font.family": "DejaVu Sans",  # ships with matplotlib, so every machine lays out alike
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9.0,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "xtick.major.size": 3.0,
    "ytick.major.size": 3.0,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.unicode_minus": True,
    "axes.formatter.useoffset": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "upcycle",
    "text.parse_math": False,  # names may hold a `$`
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}


@dataclass(frozen=True)
class Picture:
    """A finished picture.

    Attributes:
        name: the stem of its file, and the prefix of the SVG's ids.
        caption: how to read it.
        alt: what it shows, for who cannot see it.
        svg: an `<svg>` element to stand in a page.
        png: the bytes of the same on white.
    """

    name: str
    caption: str
    alt: str
    svg: str
    png: bytes


@dataclass(frozen=True)
class Curve:
    """One line; a y that is not finite is a gap. `raw` is drawn faint behind it, over the same x."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    raw: Sequence[float] | None = None


def smooth(values: Sequence[float]) -> list[float]:
    """A centred mean over a twentieth of all values, gaps left out and kept."""
    given = np.asarray(values, np.float64)
    half = len(given) // 40
    if half < 1 and len(given) >= 10:
        half = 1
    finite = np.isfinite(given)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, given, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    low = np.clip(np.arange(len(given)) - half, 0, len(given))
    high = np.clip(np.arange(len(given)) + half + 1, 0, len(given))
    means = (sums[high] - sums[low]) / np.maximum(counts[high] - counts[low], 1)
    return [float(value) for value in np.where(finite, means, np.nan)]


def thin(x: Sequence[float], y: Sequence[float], limit: int = MAX_POINTS) -> tuple[Array, Array]:
    """At most `limit` points of a curve, with the lowest, the highest and a gap, if any, of every stretch."""
    xs, ys = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if len(ys) <= limit:
        return xs, ys
    kept = {0, len(ys) - 1}
    for part in np.array_split(np.arange(len(ys)), (limit - 2) // 3):
        finite = np.isfinite(ys[part])
        if finite.any():
            kept.add(int(part[finite][np.argmin(ys[part][finite])]))
            kept.add(int(part[finite][np.argmax(ys[part][finite])]))
        if not finite.all():
            kept.add(int(part[~finite][0]))
    index = sorted(kept)
    return xs[index], ys[index]


def short(label: str, limit: int = MAX_LABEL) -> str:
    """A label that fits a picture."""
    return shorten(label, limit)


def line_picture(
    name: str,
    title: str,
    curves: Sequence[Curve],
    *,
    x_label: str,
    y_label: str,
    caption: str,
    alt: str,
    reference: tuple[float, str] | None = None,
    markers: bool = False,
    from_zero: bool = False,
) -> Picture:
    """Lines over steps or layers; `reference` is a dashed level and what it means."""
    with _drawing() as figure:
        labelled = len(curves) > 1 or reference is not None
        rows = math.ceil((len(curves) + (reference is not None)) / _legend_columns(curves, reference))
        figure.set_size_inches(WIDTH, 2.55 + (0.19 * rows if labelled else 0))
        axes = figure.add_subplot()
        faint = 0.45 if len(curves) == 1 else 0.25
        for index, curve in enumerate(curves):
            color = COLORS[index % len(COLORS)]
            dashes = ("-", "--", ":", "-.")[index // len(COLORS) % 4]
            if curve.raw is not None:
                axes.plot(*thin(curve.x, curve.raw), color=color, alpha=faint, linewidth=0.7, zorder=1.5)
            axes.plot(
                *thin(curve.x, curve.y),
                color=color,
                linestyle=dashes,
                linewidth=1.7,
                marker=MARKERS[index % len(MARKERS)] if (markers and len(curve.y) <= 60) or len(curve.y) == 1 else None,
                markersize=4,
                label=short(curve.label),
            )
        if reference:
            axes.axhline(reference[0], color=INK, linewidth=0.9, linestyle=(0, (4, 3)), label=reference[1])
        axes.set_title(_title(title))
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(axis="y", color=INK, alpha=0.14, linewidth=0.6)
        axes.margins(x=0.02)
        places = {value for curve in curves for value in curve.x}
        if len(places) == 1:
            axes.set_xlim(min(places) - 1, max(places) + 1)
        axes.xaxis.set_major_locator(_whole_numbers())
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        if from_zero:
            axes.set_ylim(bottom=0, top=max(axes.get_ylim()[1] * 1.03, 1e-9))
        if labelled:
            figure.legend(loc="outside lower left", ncols=_legend_columns(curves, reference), handlelength=2.2)
        return _finish(figure, name, caption, alt)


def heat_picture(
    name: str,
    title: str,
    panels: Mapping[str, Array],
    *,
    columns: Sequence[str],
    rows: Sequence[str] | None,
    low: float,
    high: float,
    bar_label: str,
    mark: float | None,
    caption: str,
    alt: str,
    bright_is_low: bool = False,
    digits: int = 2,
    row_label: str = "",
) -> Picture:
    """One heat map a panel, all on one scale; `rows` None counts layers from 0. `mark` is pointed out on the scale.

    Where there is room, each cell says its value to so many `digits`.
    """
    colors = "cividis_r" if bright_is_low else "cividis"
    with _drawing() as figure:
        across = 1 if len(panels) == 1 else 2
        down = math.ceil(len(panels) / across)
        shape = next(iter(panels.values())).shape
        cell = (WIDTH - 0.55) / across / max(1, shape[1]) * 72  # points
        printed = max(shape) <= 16 and cell >= 11 + 5.5 * digits
        angle = 0 if shape[1] > 8 or max(map(len, columns)) * 5.6 < cell else 45
        height = min(max(shape[0] * (0.22 if rows is None else 0.34), 0.9), 2.4 if down < 3 else 1.5)
        total = down * (height + (0.7 if angle else 0.45)) + 0.95
        figure.set_size_inches(WIDTH, total)
        axes = figure.subplots(down, across, squeeze=False)
        image: Any = None
        for index, place in enumerate(axes.flat):
            if index >= len(panels):
                place.set_axis_off()
                continue
            label, values = list(panels.items())[index]
            image = place.imshow(values, vmin=low, vmax=high, cmap=colors, aspect="auto", interpolation="none")
            place.set_title(short(label, 24), fontweight="normal")
            _label_cells(place, shape, columns, rows, angle)
            if (row_label or rows is None) and index % across == 0:
                place.set_ylabel(row_label or "layer")
            if shape[1] > 8 and index + across >= len(panels):
                place.set_xlabel("expert, counted from 0")
            if printed:
                _print_cells(place, values, image, digits)
        figure.suptitle(_title(title), x=0.01, ha="left", fontsize=9.5, fontweight="bold")
        bar = figure.colorbar(
            image, ax=axes, orientation="horizontal", fraction=0.16 / total, aspect=40, pad=0.08 / total
        )
        bar.set_label(bar_label)
        bar.outline.set_visible(False)
        bar.locator = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10])
        if mark is not None:
            bar.ax.plot([mark, mark], [0, 1], transform=bar.ax.get_xaxis_transform(), color="white", linewidth=3.0)
            bar.ax.plot([mark, mark], [-0.5, 1.5], transform=bar.ax.get_xaxis_transform(), color=INK, linewidth=1.2,
                        clip_on=False)  # fmt: skip
        return _finish(figure, name, caption, alt)


def _label_cells(
    axes: Any, shape: tuple[int, int], columns: Sequence[str], rows: Sequence[str] | None, angle: int
) -> None:
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if shape[1] <= 8:
        axes.set_xticks(range(shape[1]), [short(name, 12) for name in columns], rotation=angle,
                        ha="right" if angle else "center", rotation_mode="anchor")  # fmt: skip
    else:
        axes.xaxis.set_major_locator(_whole_numbers())
    if rows is not None:
        if shape[0] <= 8:
            axes.set_yticks(range(shape[0]), [short(name, 12) for name in rows])
        elif all(name.isdecimal() for name in rows):  # layers, of which some have no row
            shown = range(0, shape[0], math.ceil(shape[0] / 6))
            axes.set_yticks(shown, [rows[index] for index in shown])
        else:
            axes.yaxis.set_major_locator(_whole_numbers())
    else:
        axes.yaxis.set_major_locator(_whole_numbers())


def _whole_numbers() -> MaxNLocator:
    return MaxNLocator(6, integer=True, steps=[1, 2, 5, 10])


def _print_cells(axes: Any, values: Array, image: Any, digits: int) -> None:
    style = {"ha": "center", "va": "center", "fontsize": 8.5, "in_layout": False}
    for (row, column), value in np.ndenumerate(values):
        if math.isfinite(value):
            text = f"{value:.{digits}f}"
            text = text.replace("0.", ".", 1) if text.startswith(("0.", "-0.")) else text
            red, green, blue, _ = image.cmap(image.norm(value))
            bright = 0.3 * red + 0.59 * green + 0.11 * blue > 0.5
            axes.text(column, row, text, color="#000000" if bright else "#ffffff", **style)


def _legend_columns(curves: Sequence[Curve], reference: tuple[float, str] | None) -> int:
    longest = max(len(short(curve.label)) for curve in curves) if curves else 0
    longest = max(longest, len(reference[1]) if reference else 0)
    return max(1, min(4, int(72 * WIDTH / (40 + 5.4 * longest))))


def _title(title: str) -> str:
    return short(title, 42)


@contextmanager
def _drawing() -> Iterator[Figure]:
    """A figure in our style; nothing of it outlives the block."""
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a character that the font lacks: the browser will have it
        yield Figure(layout="constrained")


def _finish(figure: Figure, name: str, caption: str, alt: str) -> Picture:
    png, svg = io.BytesIO(), io.StringIO()
    canvas = FigureCanvasAgg(figure)
    figure.set_dpi(DPI)
    engine: Any = figure.get_layout_engine()
    engine.execute(figure)
    figure.set_layout_engine("none")  # laid out once for both
    figure.patch.set_facecolor("white")
    canvas.print_png(png, metadata={"Software": f"{SOFTWARE} {__version__}"})  # savefig would draw everything twice
    figure.patch.set_facecolor("none")
    FigureCanvasSVG(figure).print_svg(svg, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return Picture(name, caption, alt, _for_page(svg.getvalue(), name, alt), png.getvalue())


def _for_page(svg: str, name: str, alt: str) -> str:
    """An SVG file as an element of a page: no prologue, ids of its own, ink in the text's colour, a name to be read."""
    body = svg[svg.index("<svg") :]
    view = re.search(r'viewBox="([\d. -]+)"', body)
    assert view
    body = body[body.index(">") + 1 :]
    body = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", body, flags=re.S)
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', "".join(re.findall(r"<[^>]*>", body))))

    def rewrite(match: re.Match[str]) -> str:  # tags alone: a name may hold anything that looks like one of these
        tag = re.sub(r' id="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", match[0])
        return re.sub(r'(href="|url\()#', rf"\1#{name}-", tag).replace(INK, "currentColor")

    body = re.sub(r"<[^>]*>", rewrite, body)
    body = re.sub(r">\s*\n\s*<", ">\n<", body)
    label = html.escape(alt, quote=True)
    return f'<svg viewBox="{view[1]}" role="img" aria-label="{label}" preserveAspectRatio="xMidYMid meet">{body}'
