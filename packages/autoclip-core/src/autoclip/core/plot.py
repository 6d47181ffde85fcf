"""Pictures of a history: norms over time, their distribution, and the parameters clipped most.

They need matplotlib: `pip install "autoclip-core[plot]"`. Each function takes a clipper of any
framework, a `State`, a `Summary`, or the path of a file that `autoclip.core.read_states` reads, and
returns a matplotlib figure:

>>> from autoclip.core import History, Quantile, plot
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

from autoclip.core._diagnostics import CANDIDATES, Rows, Source, rows_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["clipped", "distribution", "norms", "overview"]

_BLUE, _ORANGE, _RED, _GRAY = "#4c78a8", "#e67e22", "#d62728", "#888888"
_DECADES = 1.5
"""Norms that span more powers of ten get a logarithmic axis."""
_LONGEST_NAME = 80
_LONGEST_LABEL = 56
_FEWEST_BARS = 10


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
        ax: where to draw; None for a new figure.

    Raises:
        KeyError: there is no such row.
        StateError, OSError: the file cannot be read; see `autoclip.core.summarize`.
        ImportError: matplotlib is not installed.
    """
    rows = rows_of(source)
    figure, ax = _axes(ax, (8.0, 4.0))
    _draw_norms(rows, _index(rows, row), ax)
    return figure


def distribution(
    source: Source,
    row: int | str | None = None,
    *,
    quantiles: Sequence[float] = CANDIDATES,
    ax: Axes | None = None,
) -> Figure:
    """Draw how the norms in a window are distributed, with quantiles marked.

    It helps to choose `quantile`: what lies to the right of a mark would be clipped to it.

    Args:
        source: a clipper, a `State`, a `Summary`, or the path of a file.
        row: the name or the number of the row; None for the one that is clipped hardest.
        quantiles: which to mark, in [0, 1].
        ax: where to draw; None for a new figure.

    Raises:
        KeyError: there is no such row.
        StateError, OSError: the file cannot be read; see `autoclip.core.summarize`.
        ImportError: matplotlib is not installed.
    """
    rows = rows_of(source)
    figure, ax = _axes(ax, (8.0, 4.0))
    _draw_distribution(rows, _index(rows, row), quantiles, ax)
    return figure


def clipped(source: Source, *, max_rows: int = 40, ax: Axes | None = None) -> Figure:
    """Draw for each row the share of its norms that were clipped, the most often clipped on top.

    The shares are those of `autoclip.core.Summary`.

    Args:
        source: a clipper, a `State`, a `Summary`, or the path of a file.
        max_rows: how many rows to draw at most.
        ax: where to draw; None for a new figure whose height follows the number of rows.

    Raises:
        StateError, OSError: the file cannot be read; see `autoclip.core.summarize`.
        ImportError: matplotlib is not installed.
    """
    rows = rows_of(source)
    figure, ax = _axes(ax, (8.0, 1.3 + 0.2 * min(max(len(rows), 4), max_rows)))
    _draw_clipped(rows, max_rows, ax)
    return figure


def overview(
    source: Source,
    row: int | str | None = None,
    *,
    quantiles: Sequence[float] = CANDIDATES,
) -> Figure:
    """Draw `norms` and `distribution` of one row above each other, and `clipped` beside them.

    Args:
        source: a clipper, a `State`, a `Summary`, or the path of a file.
        row: the name or the number of the row; None for the one that is clipped hardest.
        quantiles: which to mark, in [0, 1].

    Raises:
        KeyError: there is no such row.
        StateError, OSError: the file cannot be read; see `autoclip.core.summarize`.
        ImportError: matplotlib is not installed.
    """
    rows = rows_of(source)
    index = _index(rows, row)
    if len(rows) == 1:
        figure, axes = _pyplot().subplots(2, 1, figsize=(8.0, 7.0), layout="constrained")
        above, below = axes
    else:
        height = max(7.0, 1.3 + 0.2 * min(len(rows), 40))
        figure, axes = _pyplot().subplot_mosaic(
            [["norms", "clipped"], ["distribution", "clipped"]],
            figsize=(14.0, height),
            width_ratios=[1.3, 1.0],
            layout="constrained",
        )
        above, below = axes["norms"], axes["distribution"]
        _draw_clipped(rows, 40, axes["clipped"])
    _draw_norms(rows, index, above)
    _draw_distribution(rows, index, quantiles, below)
    return figure  # type: ignore[no-any-return]


def use_files_only() -> None:
    """Switch to matplotlib's Agg backend, which needs no display; for the command line."""
    _pyplot().switch_backend("Agg")


def _pyplot() -> Any:
    try:
        from matplotlib import pyplot
    except ModuleNotFoundError as error:
        raise ImportError(
            f"autoclip.core.plot needs matplotlib, which cannot be imported here: {error}. Install "
            'it with: pip install "autoclip-core[plot]"'
        ) from error
    return pyplot


def _axes(ax: Axes | None, size: tuple[float, float]) -> tuple[Figure, Axes]:
    if ax is None:
        figure, ax = _pyplot().subplots(figsize=size, layout="constrained")
        return figure, ax
    return ax.figure, ax  # type: ignore[return-value]


def _index(rows: Rows, row: int | str | None) -> int:
    if not len(rows):
        raise KeyError("The history has no rows, and there is nothing to draw.")
    return rows.index(row)


def _draw_norms(rows: Rows, row: int, ax: Axes) -> None:
    window = rows.windows[row].astype(np.float64)
    ax.set_title(_short(rows.names[row], _LONGEST_NAME), loc="left", fontsize="medium")
    ax.set_xlabel("norms recorded")
    ax.set_ylabel("gradient norm")
    if not len(window):
        _say(ax, "nothing was recorded yet")
        return
    one = rows.only(row)
    replay = one.replay
    newest = int(rows.recorded[row])
    steps = np.arange(newest - len(window), newest) + 1
    ax.plot(steps, window, ".", color=_BLUE, markersize=3, label="norm")
    if replay is not None:
        shown = len(replay.thresholds[0])
        thresholds = np.where(np.isfinite(replay.thresholds[0]), replay.thresholds[0], np.nan)
        exact = replay.counts[0]
        ax.plot(
            steps[-shown:], np.where(exact, thresholds, np.nan), color=_ORANGE, label="threshold"
        )
        if not exact.all():
            # One step more, so that the two lines meet.
            older = thresholds[: int(np.argmax(exact)) + 1]
            ax.plot(
                steps[-shown:][: len(older)],
                older,
                ":",
                color=_ORANGE,
                label="threshold, from few norms",
            )
        if one.shows_clipping:
            spikes = replay.clipped[0] & exact
            share = 100 * replay.shares[0]
            ax.plot(
                steps[-shown:][spikes],
                window[-shown:][spikes],
                ".",
                color=_RED,
                markersize=5,
                label=f"clipped ({share:.3g} %)",
            )
    if _spans_decades(window):
        ax.set_yscale("log")
    ax.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=4, frameon=False, fontsize="small"
    )
    ax.grid(alpha=0.25)


def _draw_distribution(rows: Rows, row: int, quantiles: Sequence[float], ax: Axes) -> None:
    window = rows.windows[row].astype(np.float64)
    title = f"{_short(rows.names[row], _LONGEST_NAME - 20)}: the last {len(window)} norms"
    ax.set_xlabel("gradient norm")
    ax.set_ylabel("number of norms")
    if not len(window):
        ax.set_title(title, loc="left", fontsize="medium")
        _say(ax, "nothing was recorded yet")
        return
    low, high = float(window.min()), float(window.max())
    count = int(np.clip(np.sqrt(len(window)) * 1.5, 10, 60))
    if _spans_decades(window):
        ax.set_xscale("log")
        bins: Any = np.geomspace(low, high, count + 1)
    else:
        bins = np.linspace(low, high, count + 1) if high > low else 1
    ax.hist(window, bins, color=_BLUE, alpha=0.6)
    places = np.quantile(window, quantiles)
    for place in places:
        ax.axvline(place, color=_ORANGE, linewidth=1.0)
    labels = _spaced(ax, [f"{q:g}" for q in quantiles], places)
    longest = max((len(text) for text, _ in labels), default=0)
    ax.set_title(title, loc="left", pad=9.0 + 4.5 * longest, fontsize="medium")
    for text, place in labels:
        ax.annotate(
            text,
            (place, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            rotation=60,
            rotation_mode="anchor",
            ha="left",
            va="center",
            fontsize="small",
            color=_ORANGE,
        )
    threshold = rows.thresholds[row]
    if np.isfinite(threshold):
        ax.axvline(threshold, color=_RED, linestyle="--", label=f"threshold now: {threshold:.4g}")
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), frameon=False, fontsize="small")


def _draw_clipped(rows: Rows, max_rows: int, ax: Axes) -> None:
    ax.set_xlabel("share of norms clipped, %")
    replay = rows.replay
    if replay is None or not rows.shows_clipping:
        _say(
            ax,
            f"the rule {rows.state.rule!r} is not registered here"
            if replay is None
            else "norms were recorded after clipping",
        )
        return
    shares = 100 * np.nan_to_num(replay.shares)
    order = np.argsort(-shares, kind="stable")[:max_rows]
    places = np.arange(len(order))
    ax.barh(places, shares[order], color=_BLUE, height=0.7)
    prefix = _common_prefix(rows.names)
    labels = ["…" * bool(prefix) + rows.names[row][len(prefix) :] for row in order]
    ax.set_yticks(places, [_short(each, _LONGEST_LABEL) for each in labels], fontsize="small")
    ax.set_ylim(max(len(order), _FEWEST_BARS) - 0.4, -0.6)
    ax.axvline(float(shares.mean()), color=_GRAY, linestyle="--", linewidth=1.0)
    ax.set_xlim(0.0, max(1.0, 1.1 * float(shares.max(initial=0.0))))
    left_out = len(rows) - len(order)
    title = f"{len(order)} of {len(rows)} rows" if left_out else f"{len(rows)} rows"
    title += f"; mean of all: {shares.mean():.3g} %"
    ax.set_title(title, loc="left", fontsize="medium")
    ax.grid(axis="x", alpha=0.25)


def _say(ax: Axes, text: str) -> None:
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", color=_GRAY)
    ax.set_xticks([])
    ax.set_yticks([])


def _short(name: str, longest: int) -> str:
    """A name without its middle, if it is long: both ends tell parameters apart."""
    if len(name) <= longest:
        return name
    half = (longest - 1) // 2
    return f"{name[:half]}…{name[-half:]}"


def _common_prefix(names: Sequence[str]) -> str:
    """The modules that all names begin with, if that makes them much shorter."""
    first, last = min(names), max(names)  # what these two share, all names share
    same = [a == b for a, b in zip(first, last)]
    common = first[: same.index(False)] if False in same else ""
    prefix = common[: 1 + max(common.rfind("."), common.rfind("/"))]
    return prefix if len(prefix) > 10 else ""


def _spans_decades(values: npt.NDArray[np.float64]) -> bool:
    return bool(values.max() / values.min() > 10**_DECADES)


def _spaced(
    ax: Axes, texts: Sequence[str], places: npt.NDArray[np.float64]
) -> list[tuple[str, float]]:
    """Labels at their places, with those that would overlap joined into one."""
    left, right = ax.get_xlim()
    logarithmic = ax.get_xscale() == "log"
    scale = np.log if logarithmic else np.asarray
    width = float(scale(right) - scale(left))
    found: list[tuple[list[str], list[float]]] = []
    for text, place in sorted(zip(texts, places.tolist()), key=lambda each: each[1]):
        if found and float(scale(place) - scale(found[-1][1][-1])) < 0.025 * width:
            found[-1][0].append(text)
            found[-1][1].append(place)
        else:
            found.append(([text], [place]))
    return [(", ".join(group), float(np.median(where))) for group, where in found]
