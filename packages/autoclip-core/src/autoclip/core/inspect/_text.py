"""A summary as text that fits a terminal, and text from files without control characters."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from autoclip.core._rules.quantile import Quantile
from autoclip.core._rules.rule import RULES
from autoclip.core._settings.settings import CLIPPER_SETTINGS, GroupSettings
from autoclip.core._state.state import GroupState, State
from autoclip.core.inspect._reading import settings_of

if TYPE_CHECKING:
    from autoclip.core.inspect._summary import RowSummary, Summary

_SHORTEST_NAME = 28
_TIE = "\N{NO-BREAK SPACE}"  # `printable` leaves none in names
# The columns of the table, in the order in which a narrow one loses them.
_LESS_IMPORTANT = ("shape", "recorded", "newest", "median", "filled")


def printable(text: str) -> str:
    """Text with all characters escaped that do not print: control characters, lone surrogates."""
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in text
    )


def without_middle(name: str, longest: int) -> str:
    """A name without its middle, if it is long: both ends tell parameters apart."""
    if len(name) <= longest:
        return name
    kept = max(longest - 1, 0)
    return f"{name[: kept // 2]}…{name[len(name) - (kept - kept // 2) :]}"


def without_common_prefix(names: Sequence[str]) -> list[str]:
    """Names without the modules that all of them begin with, if that makes them much shorter."""
    first, last = min(names), max(names)  # a prefix of these two is one of all names
    same = [a == b for a, b in zip(first, last)]
    common = first[: same.index(False)] if False in same else ""
    prefix = common[: 1 + max(common.rfind("."), common.rfind("/"))]
    return [f"…{name[len(prefix) :]}" for name in names] if len(prefix) > 10 else list(names)


def describe(summary: Summary, max_rows: int | None, width: int) -> str:
    """See `Summary.describe`."""
    state = summary.state
    saved_by = printable(f"saved by {state.framework}")
    if state.library_version:
        saved_by += f", autoclip {printable(state.library_version)}"
    lines = _wrapped(f"rule {printable(state.rule)}, {state.mode.description}; {saved_by}", width)
    for i, group in enumerate(state.groups):
        count = len(group.parameters)
        lines += _wrapped(
            f"group {i}: {count} parameter{'s' * (count != 1)}, {_settings(state.rule, group)}",
            width,
        )
    lines += ["", *_rows(summary, max_rows, width)]
    clipped_at = summary.clipped_at()
    if summary.rows and not all(map(math.isnan, clipped_at.values())):
        shares = ", ".join(f"{q:g}:{_TIE}{_percent(share)}" for q, share in clipped_at.items())
        lines += ["", *_wrapped(f"clipped at other quantiles  {shares}", width)]
    if summary.last:
        values = ", ".join(
            f"{name.removeprefix('autoclip/')} {value:.4g}" for name, value in summary.last.items()
        )
        hardest = sorted(summary.last_coefficients.items(), key=lambda each: each[1])
        names = [f"{printable(name)} * {value:.3g}" for name, value in hardest if value < 1.0][:5]
        lines += ["", *_wrapped(f"last step  {values}", width)]
        lines += _wrapped(f"clipped hardest  {', '.join(names)}", width) if names else []
    for notice in summary.notices:
        lines += ["", *_wrapped(f"notice  {printable(notice)}", width)]
    return "\n".join(lines)


def _settings(rule: str, group: GroupState) -> str:
    """The settings of a group: the rule's, `history_length`, and those that are not the default."""
    own = RULES[rule].setting_names() if rule in RULES else ()
    known = settings_of(rule, group)
    defaults = GroupSettings(Quantile() if known is None else known.rule).settings
    usual = {name: defaults[name] for name in CLIPPER_SETTINGS if name != "history_length"}
    order = [*own, "history_length", *CLIPPER_SETTINGS, *sorted(group.settings)]
    return ", ".join(
        f"{printable(name)}={group.settings[name]!r}"
        for name in dict.fromkeys(order)
        if name in group.settings and (name not in usual or group.settings[name] != usual[name])
    )


def _rows(summary: Summary, max_rows: int | None, width: int) -> list[str]:
    rows = summary.rows
    title = f"{len(rows)} row{'s' * (len(rows) != 1)}"
    shown = list(rows)
    if max_rows is not None and len(rows) > max_rows:
        if any(row.coefficient < 1.0 for row in rows):
            shown.sort(key=lambda row: (math.isnan(row.coefficient), row.coefficient))
            title += f", the {max_rows} clipped hardest (the lowest coefficient first)"
        else:
            title += f", the first {max_rows}"
        shown = shown[:max_rows]
    lines = [*_wrapped(f"{title}:", width), *_table(shown, summary.state, width)]
    if rows and all(math.isnan(row.threshold) for row in rows):
        lines.append(
            f"The rule {summary.state.rule!r} is not registered in this process: no thresholds."
        )
    elif not summary.shows_clipping:
        lines.append('Norms are recorded after clipping (record="clipped"): no shares.')
    return lines


def _table(rows: Sequence[RowSummary], state: State, width: int) -> list[str]:
    if not rows:
        return []
    lengths = [group.settings.get("history_length", "?") for group in state.groups]
    columns: dict[str, Callable[[RowSummary], str]] = {
        "shape": lambda row: _shape(row.shape),
        "filled": lambda row: f"{row.length}/{lengths[row.group]}",
        "recorded": lambda row: str(row.recorded),
        "newest": lambda row: _number(row.newest, 3),
        "median": lambda row: _number(row.median, 3),
        "threshold": lambda row: _number(row.threshold),
        "clipped": lambda row: _percent(row.clipped),
        "coefficient": lambda row: _number(row.coefficient),
    }
    cells = {name: [name, *map(cell, rows)] for name, cell in columns.items()}
    # A number that all rows share is named once.
    same = [name for name in ("filled", "recorded") if len({*cells[name][1:]}) == 1 < len(rows)]
    common = [f"{name} {cells.pop(name)[1]}" for name in same]
    names = [printable(row.name) for row in rows]
    for name in ("", *_LESS_IMPORTANT):
        cells.pop(name, None)
        left = width - sum(2 + max(map(len, column)) for column in cells.values())
        if left >= _SHORTEST_NAME or left >= max(map(len, names)):
            break
    longest = max(left, 10)
    if longest < max(map(len, names)):
        names = without_common_prefix(names)
    first = ["row", *(without_middle(name, longest) for name in names)]
    indent = max(map(len, first))
    lines = [
        name.ljust(indent)
        + "".join("  " + column[k].rjust(max(map(len, column))) for column in cells.values())
        for k, name in enumerate(first)
    ]
    return [*lines, f"in all rows: {', '.join(common)}"] if common else lines


def _wrapped(text: str, width: int) -> list[str]:
    lines = textwrap.wrap(
        text.replace(" %", f"{_TIE}%"),
        max(width, 40),
        subsequent_indent="    ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [line.replace(_TIE, " ") for line in lines]


def _shape(shape: tuple[int, ...] | None) -> str:
    return "" if shape is None else "x".join(map(str, shape)) or "scalar"


def _number(value: float, digits: int = 4) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}g}"


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.1f} %"
