"""Plots as inline SVG text, drawn by matplotlib in one calm style."""

import io
import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spvla.files import cache_dir

os.environ.setdefault("MPLCONFIGDIR", str(cache_dir() / "matplotlib"))  # HOME may be read-only, and it would say so
import matplotlib

matplotlib.use("svg")  # no window system, and no other backend is ever needed
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

INK, FAINT = "#1d2733", "#c9d1d9"
MARKERS = "osD^v"  # the next one once the colours are used up
COLOURS = ("#2f6fb3", "#d1603d", "#3a8f6b", "#8a5fb0", "#b8892b", "#6b7785")
_STYLE = {
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#eef1f4",
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "svg.hashsalt": "spvla",  # equal data gives equal bytes
    "svg.fonttype": "none",
}
Rate = tuple[float, float, float]  # rate, low, high
Series = Mapping[str, Sequence[tuple[float, float]]]  # label -> (x, y) points


def curves(title: str, series: Series, *, x_label: str = "optimiser step") -> str:
    """Lines over steps, one colour a label."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(title, width=4.6, height=2.6)
        for colour, (label, points) in zip(COLOURS * 3, series.items(), strict=False):
            xs, ys = zip(*points, strict=True)
            axes.plot(xs, ys, color=colour, label=label, linewidth=1.4, marker="o" if len(xs) < 3 else None)
        axes.set_xlabel(x_label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if len(series) > 1:
            axes.legend(fontsize=7.5, loc="best")
        return _svg(figure)


def intervals(title: str, rows: Sequence[str], series: Sequence[tuple[str, Sequence[Rate | None]]]) -> str:
    """Success rates with their intervals: one row a task and, within it, one line a policy; a legend if several."""
    line, space = 0.13, 0.14  # inches
    row = len(series) * line + space
    legend = [textwrap.fill(label, 130, break_on_hyphens=False) for label, _ in series] if len(series) > 1 else []
    height = 0.8 + len(rows) * row + 0.18 * sum(1 + text.count("\n") for text in legend)
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(title, width=9.4, height=height)
        for n, (_, rates) in enumerate(series):
            colour, marker = COLOURS[n % len(COLOURS)], MARKERS[n // len(COLOURS) % len(MARKERS)]
            from_middle = (n - (len(series) - 1) / 2) * line / row
            there = [(y + from_middle, *rate) for y, rate in enumerate(rates) if rate is not None]
            ys, means, lows, highs = zip(*there, strict=True)
            axes.hlines(ys, lows, highs, color=colour, alpha=0.35, linewidth=5, capstyle="round")
            axes.plot(means, ys, marker, color=colour, markersize=4.5)
        axes.grid(False, axis="y")
        axes.hlines([y + 0.5 for y in range(len(rows) - 1)], -0.02, 1.02, color=FAINT, linewidth=0.5)
        axes.tick_params("y", length=0)
        axes.set_yticks(range(len(rows)), rows)
        axes.set(xlim=(-0.02, 1.02), ylim=(len(rows) - 0.5, -0.5), xlabel="success (95% Wilson interval)")
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        if legend:
            figure.legend(axes.lines, legend, loc="outside lower left", fontsize=8)
        return _svg(figure)


@dataclass(frozen=True)
class Scale:
    """One parameter of every trial as numbers; words stand at 0, 1, 2, ... in `words`' order."""

    name: str
    numbers: list[float]
    words: list[str]

    @classmethod
    def of(cls, name: str, values: Sequence[Any]) -> "Scale":
        if all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
            return cls(name, list(values), [])
        words = sorted({str(v) for v in values})
        return cls(name, [words.index(str(v)) for v in values], words)

    @property
    def ends(self) -> tuple[float, float]:
        return min(self.numbers), max(self.numbers)

    def says(self, number: float) -> str:
        return self.words[int(number)] if self.words else f"{number:.3g}"


def heat_map(title: str, x: Scale, y: Scale, values: Sequence[float]) -> str:
    """Scattered points coloured by value; an axis is logarithmic where its range spans more than a decade."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(title, width=4.6, height=3.2)
        drawn = axes.scatter(x.numbers, y.numbers, c=values, s=420, cmap="viridis", marker="s", edgecolors="white")
        for left, up, v, fill in zip(x.numbers, y.numbers, values, drawn.to_rgba(values), strict=True):
            ink = _ink_on(fill)
            axes.annotate(f"{v:.2f}", (left, up), ha="center", va="center", fontsize=7, color=ink)
        for axis, scale in (("x", x), ("y", y)):
            low, high = scale.ends
            if scale.words:
                axes.set(**{f"{axis}ticks": range(len(scale.words)), f"{axis}ticklabels": scale.words})
            elif low > 0 and high / low > 10:
                axes.set(**{f"{axis}scale": "log"})
        axes.margins(0.25)
        axes.set_xlabel(x.name)
        axes.set_ylabel(y.name)
        figure.colorbar(drawn, ax=axes, shrink=0.85)
        return _svg(figure)


def parallel_coordinates(title: str, scales: Sequence[Scale]) -> str:
    """One line a trial through all axes; the last axis is the objective and gives the colour."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(title, width=4.8, height=3.2)
        axes.grid(False, axis="y")
        spans = [(low, high - low or 1.0) for low, high in (scale.ends for scale in scales)]
        colours = matplotlib.colormaps["viridis"]
        for row in zip(*(scale.numbers for scale in scales), strict=True):
            heights = [(v - low) / span for v, (low, span) in zip(row, spans, strict=True)]
            axes.plot(range(len(scales)), heights, color=colours(heights[-1]), linewidth=1.6, alpha=0.85)
        axes.set_xticks(range(len(scales)), [scale.name for scale in scales])
        axes.set_yticks([])
        for i, scale in enumerate(scales):
            low, high = scale.ends
            axes.annotate(scale.says(low), (i, -0.04), ha="center", va="top", fontsize=7)
            if high > low:
                axes.annotate(scale.says(high), (i, 1.04), ha="center", fontsize=7)
        axes.set_ylim(-0.12, 1.12)
        return _svg(figure)


def _ink_on(fill: Sequence[float]) -> str:
    """What can be read on a colour (r, g, b, ...), by its luminance (Rec. 601)."""
    r, g, b, *_ = fill
    return "white" if 0.299 * r + 0.587 * g + 0.114 * b < 0.5 else INK


def _figure(title: str, *, width: float, height: float) -> tuple[Figure, Axes]:
    """Sizes in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
    return figure, axes


def _svg(figure: Figure) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None}, transparent=True)
    text = out.getvalue()
    return text[text.index("<svg") :]
