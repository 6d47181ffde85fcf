"""Plots of a history: norms over time, their distribution, and the parameters clipped most.

They need matplotlib: `pip install "autoclip-core[plot]"`. Each function takes a clipper of any
framework, a `State`, a `Summary`, or the path of a file that `read_states` reads, and returns a
matplotlib figure:

>>> from autoclip.core import History, Quantile
>>> from autoclip.core.inspect import plot
>>> history = History(rows=1, rule=Quantile(0.9))
>>> for norm in range(1, 100):
...     report = history.record([1000.0 / norm])
>>> plot.norms(history).savefig("norms.png")
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from autoclip.core.inspect._rows import Rows
from autoclip.core.inspect._summary import CANDIDATES, Source, rows_of
from autoclip.core.inspect._text import printable, without_common_prefix, without_middle

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["clipped", "distribution", "norms", "overview"]

# They stand out on white and on black.
_BLUE, _ORANGE, _RED, _GRAY = "#4c78a8", "#e67e22", "#e03131", "#8a8a8a"
_MOST_SPREAD = 10.0
"""A larger ratio of the largest norm to the smallest gets a logarithmic axis."""
_FAR = 3.0
"""Norms above all marks and a gap of this factor are counted in one bar."""
_LONGEST_NAME = 72
_LONGEST_LABEL = 44
_FEWEST_BARS = 5
_CHARACTER = 0.012
"""The width of a character above the distribution, as a share of the width of the axes."""


def norms(source: Source, row: int | str | None = None, *, ax: Axes | None = None) -> Figure:
    """Draw the norms in a window over time, with the threshold and the steps that were clipped.

    A history holds norms, not thresholds. They are recomputed from the norms in the window under
    the saved settings, and so go back no further than the window. If it has lost its oldest norms,
    thresholds in the older half come from few norms and are dotted: they may differ from those in
    training. Nor does a history know of settings that changed during training.

    Args:
        source: a clipper, a `State`, a `Summary`, or the path of a file.
        row: the name or the number of the row, such as `"layer1.weight"`; None for the one that is
            clipped hardest.
        ax: the axes to draw on; None for a new figure.

    Raises:
        KeyError: there is no such row.
        StateError, OSError: the file cannot be read; see `autoclip.core.inspect.summarize`.
        ImportError: matplotlib is not installed.
    """
    rows = _rows(source)
    figure, ax = _axes(ax, (8.0, 4.0))
    _draw_norms(rows, rows.index(row), ax)
    return figure


def distribution(
    source: Source,
    row: int | str | None = None,
    *,
    quantiles: Sequence[float] = CANDIDATES,
    ax: Axes | None = None,
) -> Figure:
    """Draw how the norms in a window are distributed, with quantiles marked.

    It helps to choose `quantile`: norms to the right of a mark would be clipped to it.

    Args:
        source: a clipper, a `State`, a `Summary`, or the path of a file.
        row: the name or the number of the row; None for the one that is clipped hardest.
        quantiles: the quantiles to mark, in [0, 1].
        ax: the axes to draw on; None for a new figure.

    Raises:
        KeyError: there is no such row.
        StateError, OSError: the file cannot be read; see `autoclip.core.inspect.summarize`.
        ImportError: matplotlib is not installed.
    """
    rows = _rows(source)
    figure, ax = _axes(ax, (8.0, 4.0))
    _draw_distribution(rows, rows.index(row), quantiles, ax)
    return figure


def clipped(source: Source, *, max_rows: int = 40, ax: Axes | None = None) -> Figure:
    """Draw for each row the share of its norms that were clipped, the most often clipped on top.

    The shares are those of `autoclip.core.inspect.Summary`.

    Args:
        source: a clipper, a `State`, a `Summary`, or the path of a file.
        max_rows: the maximum number of rows to draw.
        ax: the axes to draw on; None for a new figure whose height follows the number of rows.

    Raises:
        StateError, OSError: the file cannot be read; see `autoclip.core.inspect.summarize`.
        ImportError: matplotlib is not installed.
    """
    rows = _rows(source)
    figure, ax = _axes(ax, (8.0, 1.3 + 0.2 * min(max(len(rows), _FEWEST_BARS), max_rows)))
    _draw_clipped(rows, max_rows, ax)
    return figure


def overview(
    source: Source,
    row: int | str | None = None,
    *,
    quantiles: Sequence[float] = CANDIDATES,
) -> Figure:
    """Draw `norms` and `distribution` of one row above each other, and `clipped` to their right.

    Args:
        source: a clipper, a `State`, a `Summary`, or the path of a file.
        row: the name or the number of the row; None for the one that is clipped hardest.
        quantiles: the quantiles to mark, in [0, 1].

    Raises:
        KeyError: there is no such row.
        StateError, OSError: the file cannot be read; see `autoclip.core.inspect.summarize`.
        ImportError: matplotlib is not installed.
    """
    rows = _rows(source)
    index = rows.index(row)
    mosaic, size, widths = [["norms"], ["distribution"]], (8.0, 7.0), [1.0]
    if len(rows) > 1:
        mosaic, widths = [["norms", "clipped"], ["distribution", "clipped"]], [1.3, 1.0]
        size = 14.0, max(7.0, 1.3 + 0.2 * min(len(rows), 40))
    figure: Figure
    figure, axes = _pyplot().subplot_mosaic(
        mosaic, figsize=size, width_ratios=widths, layout="constrained"
    )
    _draw_norms(rows, index, axes["norms"])
    _draw_distribution(rows, index, quantiles, axes["distribution"])
    if "clipped" in axes:
        _draw_clipped(rows, 40, axes["clipped"])
    return figure


def use_files_only() -> None:
    """Switch to matplotlib's Agg backend, which needs no display; for the command line."""
    _pyplot().switch_backend("Agg")


def _pyplot() -> Any:
    try:
        from matplotlib import pyplot
    except ModuleNotFoundError as error:
        raise ImportError(
            f"autoclip.core.inspect.plot needs matplotlib, which cannot be imported here: {error}. "
            'Install it with: pip install "autoclip-core[plot]"'
        ) from error
    return pyplot


def _axes(ax: Axes | None, size: tuple[float, float]) -> tuple[Figure, Axes]:
    if ax is None:
        figure, ax = _pyplot().subplots(figsize=size, layout="constrained")
        return figure, ax
    return ax.figure, ax  # type: ignore[return-value]


def _rows(source: Source) -> Rows:
    rows = rows_of(source)
    if not len(rows):
        raise KeyError("The history has no rows, so there is nothing to draw.")
    return rows


def _draw_norms(rows: Rows, row: int, ax: Axes) -> None:
    window = rows.windows[row].astype(np.float64)
    _title(ax, _name(rows, row, _LONGEST_NAME))
    ax.set_xlabel("norms recorded")
    ax.set_ylabel("gradient norm")
    if not len(window):
        _say(ax, "nothing was recorded yet")
        return
    one = rows.only(row)
    newest = int(rows.recorded[row])
    steps = np.arange(newest - len(window), newest) + 1
    ax.plot(steps, window, ".", color=_BLUE, markersize=3, label="norm")
    if one.replay is not None:
        [thresholds], [exact], [spikes] = (
            one.replay.thresholds,
            one.replay.counts,
            one.replay.clipped,
        )
        recent = steps[-len(thresholds) :]
        limits = np.where(np.isfinite(thresholds), thresholds, np.nan)
        ax.plot(recent, np.where(exact, limits, np.nan), color=_ORANGE, label="threshold")
        if not exact.all():
            older = slice(int(np.argmax(exact)) + 1)  # one step more, so that the two lines meet
            label = "threshold, from few norms"
            ax.plot(recent[older], limits[older], ":", color=_ORANGE, label=label)
        if one.shows_clipping:
            clipped = np.flatnonzero(spikes & exact)
            ax.plot(
                recent[clipped],
                window[-len(recent) :][clipped],
                ".",
                color=_RED,
                markersize=5,
                label=f"clipped ({100 * one.shares[0]:.3g} %)",
            )
    if window.max() > _MOST_SPREAD * window.min():
        ax.set_yscale("log")
        _plain_numbers(ax.yaxis, window)
    _legend_below(ax)
    ax.grid(alpha=0.25)


def _draw_distribution(rows: Rows, row: int, quantiles: Sequence[float], ax: Axes) -> None:
    window = np.sort(rows.windows[row].astype(np.float64))
    ax.set_xlabel("gradient norm")
    ax.set_ylabel("number of norms")
    title = f"{_name(rows, row, _LONGEST_NAME - 22)}: the last {len(window)} norms"
    if not len(window):
        _title(ax, title)
        _say(ax, "nothing was recorded yet")
        return
    _title(ax, title, pad=24.0 if len(quantiles) else None)
    marks = np.quantile(window, quantiles)
    threshold = rows.thresholds[row]
    inside = [window[0], *marks, *([threshold] if np.isfinite(threshold) else [])]
    near = np.searchsorted(window, max(inside), side="right")
    gaps = np.flatnonzero(window[near:] > _FAR * window[near - 1 : -1])
    shown = window[: near + gaps[0]] if len(gaps) else window
    logarithmic = max(shown[-1], *inside) > _MOST_SPREAD * min(inside)
    edges = _edges(shown[0], shown[-1], len(window), logarithmic)
    if logarithmic:
        ax.set_xscale("log")
        _plain_numbers(ax.xaxis, np.array([edges[0], edges[-1], *inside]))
    counts, _, _ = ax.hist(shown, edges.tolist(), color=_BLUE, alpha=0.85)
    far = window[len(shown) :]
    if len(far):
        _draw_far(far, edges, max(edges[-1], *inside), float(max(counts)), ax)
    for mark in marks:
        ax.axvline(mark, color=_GRAY, linewidth=1.0, linestyle=":")
    ax.set_xlim(*ax.get_xlim())  # labels are placed within these limits
    _label_marks(ax, [f"{q:g}" for q in quantiles], marks)
    if np.isfinite(threshold):
        ax.axvline(threshold, color=_ORANGE, label=f"threshold now: {threshold:.4g}")
    if np.isfinite(threshold) or len(far):
        _legend_below(ax)


def _plain_numbers(axis: Any, values: npt.NDArray[np.float64]) -> None:
    """Label a logarithmic axis of one or two decades at 1, 2 and 5 times a power of ten."""
    from matplotlib import ticker

    if values.max() < 100 * values.min():
        axis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(ticker.NullFormatter())


def _edges(low: float, high: float, count: int, logarithmic: bool) -> npt.NDArray[np.float64]:
    """The edges of bins for a number of norms between two, which may be equal."""
    bins = int(np.clip(np.sqrt(count) * 1.5, 10, 60))
    if high - low < 1e-6 * high:
        low, high, bins = 0.95 * low, 1.05 * high, 15  # an odd number: they are in the middle
    return (np.geomspace if logarithmic else np.linspace)(low, high, bins + 1)


def _draw_far(
    far: npt.NDArray[np.float64],
    edges: npt.NDArray[np.float64],
    last: float,
    highest: float,
    ax: Axes,
) -> None:
    """Draw one bar for norms far above the others, behind the last mark."""
    scale, inverse = (np.log, np.exp) if ax.get_xscale() == "log" else (np.asarray, np.asarray)
    [width] = np.diff(scale(edges[-2:]))
    begin, middle, end = inverse(scale(last) + width * np.array([3, 4, 5]))
    number = f"{len(far)} norm{'s' * (len(far) != 1)}"
    reach = f"{far[0]:.3g}" if far[0] == far[-1] else f"{far[0]:.3g} to {far[-1]:.3g}"
    label = f"{number} far above: {reach}"
    ax.bar(begin, len(far), end - begin, align="edge", color=_RED, label=label)
    ax.annotate(
        "≫",
        (middle, len(far)),
        xytext=(0, 2),
        textcoords="offset points",
        ha="center",
        color=_RED,
    )
    if highest > 20 * len(far):
        ax.set_yscale("log")
        ax.set_ylim(bottom=0.7)


def _label_marks(ax: Axes, texts: Sequence[str], marks: npt.NDArray[np.float64]) -> None:
    """Label marks above the axes, side by side even where the marks are close together."""
    if not texts:
        return
    scale = np.log if ax.get_xscale() == "log" else np.asarray
    left, right = scale(ax.get_xlim())
    order = np.argsort(marks, kind="stable")
    space = _CHARACTER * (max(map(len, texts)) + 1)
    order = order[:: int(np.ceil(len(order) * space))]  # as many as there is space for
    shares = (scale(marks[order]) - left) / (right - left)
    for index, share, position in zip(order, shares, _space_out(shares, space)):
        ax.annotate(
            texts[index],
            (float(share), 1.0),
            xycoords="axes fraction",
            xytext=(float(position), 1.045),
            textcoords="axes fraction",
            ha="center",
            va="bottom",
            fontsize="small",
            color=_GRAY,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": _GRAY,
                "linewidth": 0.7,
                "shrinkA": 0.0,
                "shrinkB": 0.0,
            },
        )


def _space_out(positions: npt.NDArray[np.float64], space: float) -> npt.NDArray[np.float64]:
    """Move increasing positions between 0 and 1 until each two are `space` apart."""
    spread = positions.copy()
    for i in range(1, len(spread)):
        spread[i] = max(spread[i], spread[i - 1] + space)
    spread -= (spread - positions).mean()  # all moved to the right
    steps = space * np.arange(len(spread))
    return np.clip(spread, steps, 1.0 - steps[::-1])


def _draw_clipped(rows: Rows, max_rows: int, ax: Axes) -> None:
    ax.set_xlabel("share of norms clipped, %")
    if not rows.shows_clipping:
        unknown = f"the rule {rows.state.rule!r} is not registered here"
        _say(ax, unknown if rows.settings is None else "norms were recorded after clipping")
        return
    shares = 100 * rows.shares
    known = shares[~np.isnan(shares)]
    if not len(known):
        _say(ax, "nothing was recorded yet")
        return
    order = np.argsort(-shares, kind="stable")[: min(max_rows, len(known))]  # NaN comes last
    positions = np.arange(len(order))
    ax.barh(positions, shares[order], color=_BLUE, height=0.7)
    names = without_common_prefix([printable(name) for name in rows.names])
    labels = [without_middle(names[row], _LONGEST_LABEL) for row in order]
    ax.set_yticks(positions, labels, fontsize="small", parse_math=False)
    ax.set_ylim(max(len(order), _FEWEST_BARS) - 0.4, -0.6)
    ax.axvline(float(known.mean()), color=_GRAY, linestyle="--", linewidth=1.0)
    ax.set_xlim(0.0, max(1.0, 1.1 * float(known.max())))
    if not known.any():
        ax.text(0.5, 0.5, "no norm was clipped", transform=ax.transAxes, ha="center", color=_GRAY)
    left_out = len(rows) - len(order)
    title = f"{len(order)} of {len(rows)} rows" if left_out else f"{len(rows)} rows"
    _title(ax, f"{title}; mean of all: {known.mean():.3g} %")
    ax.grid(axis="x", alpha=0.25)


def _title(ax: Axes, text: str, pad: float | None = None) -> None:
    # A name may have a dollar sign, which is none of a formula.
    ax.set_title(text, loc="left", fontsize="medium", pad=pad, parse_math=False)


def _name(rows: Rows, row: int, longest: int) -> str:
    return without_middle(printable(rows.names[row]), longest)


def _legend_below(ax: Axes) -> None:
    ax.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=4, frameon=False, fontsize="small"
    )


def _say(ax: Axes, text: str) -> None:
    ax.text(
        *(0.5, 0.5, text),
        transform=ax.transAxes,
        ha="center",
        va="center",
        color=_GRAY,
        parse_math=False,
    )
    ax.set_xticks([])
    ax.set_yticks([])
