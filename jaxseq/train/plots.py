"""The figures of a run: its learning curves, and those that an experiment draws."""

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from .files import atomically
from .metrics import read_metrics
from .rows import Row, grouped, mean_of

COLORS = {"train": "#3b6fb6", "validation": "#d1602f", "test": "#3f8f5b"}
#: One for each of several models of a run.
PARTS = ("#3b6fb6", "#d1602f", "#3f8f5b", "#7a5195", "#b58900", "#4aa3a3", "#a83254", "#6b6b6b")
MANY = tuple(matplotlib.colormaps["tab20"](range(20)).tolist())
LABELS = {"loss": "loss", "bits_per_byte": "bits per byte", "accuracy": "accuracy (fraction)"}


STYLE: Any = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
STYLE |= {"axes.grid": True, "grid.color": "0.92", "grid.linewidth": 0.8, "axes.axisbelow": True}


@contextmanager
def saved_figure(path: Path, **options: Any) -> Iterator[Figure]:
    """A figure to draw on, in the house style, that becomes the file at the end; `options` are those of `Figure`."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(dpi=150, layout="constrained", **options)
        yield figure
        path.parent.mkdir(exist_ok=True)
        with atomically(path) as temporary:
            figure.savefig(temporary, format="png")


def draw_curves(folder: str | Path, baselines: dict[str, float] | None = None, **more: dict[str, float]) -> list[Path]:
    """Draw `plots/METRIC.png` for loss, bits per byte and accuracy, each where the run has it.

    `baselines` are values by name, drawn as horizontal lines over bits per byte; those of another metric come under
    that metric's name: `draw_curves(folder, accuracy={"chance": 0.1})`.
    """
    rows = read_metrics(folder)
    lines = {"bits_per_byte": baselines or {}} | more
    found = [metric for metric in LABELS if any(row.get(metric) is not None for row in rows)]
    return [_draw(Path(folder), metric, rows, lines.get(metric, {})) for metric in found]


def points_and_mean(axes: Any, rows: Iterable[Row], x: str, y: str, **style: Any) -> None:
    """A point for each row, field `y` over field `x`, and a line through their means at each x, which has the label.

    Rows whose y is None are left out; `style` is of the line, whose colour the points have too.
    """
    known = [row for row in rows if row[y] is not None]
    at = dict(sorted(grouped(known, x).items()))
    (line,) = axes.plot(list(at), [mean_of(of, y) for of in at.values()], **style)
    axes.plot([row[x] for row in known], [row[y] for row in known], ".", color=line.get_color(), alpha=0.6)


def _draw(folder: Path, metric: str, rows: list[dict], baselines: dict[str, float]) -> Path:
    path = folder / "plots" / f"{metric}.png"
    with saved_figure(path, figsize=(7, 4.2)) as figure:
        _draw_on(figure, metric, rows, baselines)
    return path


def _draw_on(figure: Figure, metric: str, rows: list[dict], baselines: dict[str, float]) -> None:
    axes = figure.subplots()
    tokens = all("tokens" in row for row in rows)
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row.get(metric) is not None:
            curves.setdefault(row["split"], []).append((row["tokens" if tokens else "step"], row[metric]))
    parts = dict.fromkeys(part for split in curves if (part := split.partition("/")[2]))
    many = len(parts) > len(PARTS)  # then a colour each, and the legend beside
    colors = dict(zip(parts, itertools.cycle(MANY if many else PARTS), strict=False))
    for split, points in curves.items():
        kind, _, part = split.partition("/")
        color = colors[part] if part else COLORS.get(kind, "#7a5195")
        _curve(axes, kind == "train", split, color, *np.asarray(points, float).T)
    for style, (name, value) in zip(itertools.cycle(("--", ":", "-.")), baselines.items(), strict=False):
        axes.axhline(value, color="0.35", linewidth=1, linestyle=style, label=f"{name}  {value:.3g}")
    axes.set_xlabel("training tokens" if tokens else "training step")
    axes.set_ylabel(LABELS[metric] + (" (nats per token)" if metric == "loss" and tokens else ""))
    axes.xaxis.set_major_formatter(EngFormatter(sep=" ") if tokens else "{x:,.0f}")
    if many:
        figure.set_figwidth(10)
        figure.legend(frameon=False, loc="outside right center", fontsize=6)
    else:
        axes.legend(frameon=False)


def _curve(axes, training: bool, split: str, color: str, x: np.ndarray, y: np.ndarray) -> None:
    if not training:
        axes.plot(x, y, "o-", color=color, markersize=4, linewidth=1, label=split)
        return
    axes.plot(x, y, color=color, alpha=0.25, linewidth=0.8)
    axes.plot(x, _smooth(y), color=color, linewidth=1.6, label=f"{split} (smoothed)")


def _smooth(y: np.ndarray) -> np.ndarray:
    """The mean over a centred window of a thirtieth of the curve, cut off where the curve ends."""
    half = len(y) // 60
    total = np.concatenate([[0.0], np.cumsum(y)])
    at = np.arange(len(y))
    reach = np.minimum(np.minimum(at, len(y) - 1 - at), half)  # symmetric, so that the ends are not biased
    return (total[at + reach + 1] - total[at - reach]) / (2 * reach + 1)
