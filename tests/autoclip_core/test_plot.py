"""Plots draw the numbers that the history holds."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.figure import Figure

from autoclip.core import GroupState, History, ParameterInfo, Quantile, Standard, State
from autoclip.core.adapter import GroupSettings
from autoclip.core.inspect import plot

mpl.use("Agg")


@pytest.fixture(autouse=True)
def close() -> Any:
    yield
    pyplot.close("all")


def make(
    rows: int = 3,
    steps: int = 60,
    rule: Any = Quantile(0.8),  # noqa: B008
    spread: float = 0.2,
    names: list[str] | None = None,
    **settings: Any,
) -> tuple[State, list[Any]]:
    """A state with names, and what its steps reported."""
    made = GroupSettings(rule, **settings)
    history = History.of([made] * rows)
    norms = np.random.default_rng(0).lognormal(0, spread, (steps, rows))
    reports = [history.record(each) for each in norms]
    windows, recorded = history.read(range(rows))
    names = names or [f"encoder.layers.{row}.weight" for row in range(rows)]
    infos = [ParameterInfo(name, (2, 2)) for name in names]
    group = GroupState.from_windows(made.settings, infos, windows, recorded)
    return State(made.rule.name, "parameter", "numpy", (group,)), reports


def lines(ax: Any) -> dict[str, Any]:
    return {line.get_label(): line for line in ax.get_lines()}


def texts(ax: Any) -> list[str]:
    return [each.get_text() for each in ax.texts]


@pytest.mark.parametrize("rule", [Quantile(0.8), Standard(1.0)])
def test_norms_thresholds_and_clipped_steps(rule: Any) -> None:
    state, reports = make(rule=rule)
    figure = plot.norms(state, "encoder.layers.1.weight")
    assert isinstance(figure, Figure)
    [ax] = figure.axes
    drawn = lines(ax)
    norms = np.float32([report.norms[1] for report in reports])
    thresholds = np.array([report.thresholds[1] for report in reports])
    clipped = np.flatnonzero([report.coefficients[1] < 1 for report in reports])
    np.testing.assert_array_equal(drawn["norm"].get_ydata(), norms)
    np.testing.assert_array_equal(drawn["norm"].get_xdata(), np.arange(60) + 1)
    thresholds[np.isinf(thresholds)] = np.nan
    np.testing.assert_allclose(drawn["threshold"].get_ydata(), thresholds, rtol=1e-9)
    [marked] = [line for name, line in drawn.items() if name.startswith("clipped")]
    np.testing.assert_array_equal(marked.get_xdata(), clipped + 1)
    assert ax.get_title("left") == "encoder.layers.1.weight"


def test_thresholds_of_a_full_window_begin_dotted() -> None:
    state, reports = make(history_length=20)
    drawn = lines(plot.norms(state, 0).axes[0])
    np.testing.assert_array_equal(drawn["norm"].get_xdata(), np.arange(41, 61))
    older, newer = drawn["threshold, from few norms"], drawn["threshold"]
    assert np.isfinite(newer.get_ydata()).sum() == 10
    assert older.get_ydata()[-1] == newer.get_ydata()[10]  # they meet
    assert newer.get_ydata()[-1] == pytest.approx(reports[-1].thresholds[0])
    [marked] = [line for name, line in drawn.items() if name.startswith("clipped")]
    assert len(marked.get_xdata()) > 0
    assert min(marked.get_xdata()) > 50  # only where the line is solid


def test_the_row_that_is_clipped_hardest_is_the_default() -> None:
    state, reports = make()
    hardest = int(np.mean([report.coefficients for report in reports], axis=0).argmin())
    assert plot.norms(state).axes[0].get_title("left") == f"encoder.layers.{hardest}.weight"
    assert plot.norms(state, -1).axes[0].get_title("left") == "encoder.layers.2.weight"
    assert plot.norms(state, "layers.2").axes[0].get_title("left") == "encoder.layers.2.weight"
    for missing in ("decoder", 3):
        with pytest.raises(KeyError, match=r"no row .*, only 'encoder\.layers\.0\.weight', "):
            plot.norms(state, missing)
    with pytest.raises(KeyError, match="3 rows have 'encoder' in their names"):
        plot.norms(state, "encoder")


def test_the_distribution_marks_quantiles_and_the_threshold() -> None:
    state, reports = make()
    [ax] = plot.distribution(state, 2, quantiles=[0.1, 0.5, 0.9]).axes
    norms = np.float64(np.float32([report.norms[2] for report in reports]))
    places = [line.get_xdata()[0] for line in ax.get_lines()]
    expected = [*np.quantile(norms, [0.1, 0.5, 0.9]), np.quantile(norms, 0.8)]
    np.testing.assert_allclose(places, expected)
    assert sum(patch.get_height() for patch in ax.patches) == 60
    assert texts(ax) == ["0.1", "0.5", "0.9"]


def window_of(norms: Any, name: str = "weight") -> State:
    settings = GroupSettings(Quantile(0.9)).settings
    group = GroupState.from_windows(settings, [ParameterInfo(name, (2,))], [norms], [len(norms)])
    return State("quantile", "parameter", "numpy", (group,))


def overlaps(figure: Any, artists: list[Any]) -> bool:
    figure.canvas.draw()
    # Of an annotation without its line.
    boxes = [
        mpl.text.Text.get_window_extent(each)
        if isinstance(each, mpl.text.Text)
        else each.get_window_extent()
        for each in artists
    ]
    return any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


BODY = 1 + 0.05 * np.random.default_rng(1).standard_normal(500)
WINDOWS = {
    "calm": BODY,
    "rare spikes": np.concatenate([BODY, [9.0, 200.0, 12.0]]),
    "decades": np.geomspace(1e-3, 1e3, 300),
    "all that float32 has": np.geomspace(2e-38, 3e38, 200),
    "equal and large": np.full(50, 1e30),
    "nearly equal": 1 + 1e-7 * np.arange(30),
    "one": [2.0],
}
QUANTILES = {
    "default": [0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99],
    "close": [0.0, 0.9, 0.901, 0.902, 0.903, 1.0],
    "many": np.linspace(0, 1, 60).tolist(),
}


@pytest.mark.parametrize("quantiles", QUANTILES)
@pytest.mark.parametrize("window", WINDOWS)
def test_labels_of_quantiles_do_not_overlap(window: str, quantiles: str) -> None:
    norms = WINDOWS[window]
    figure = plot.distribution(window_of(norms), quantiles=QUANTILES[quantiles])
    [ax] = figure.axes
    labels = [each for each in ax.texts if each.get_text() != "≫"]
    assert not overlaps(figure, [*labels, ax.get_legend()])
    assert sum(patch.get_height() for patch in ax.patches) == len(norms)
    if len(QUANTILES[quantiles]) < 10:
        assert [each.get_text() for each in labels] == [f"{q:g}" for q in QUANTILES[quantiles]]


def test_rare_spikes_leave_the_rest_visible() -> None:
    """The usual case of one history for all parameters."""
    norms = WINDOWS["rare spikes"]
    figure = plot.distribution(window_of(norms))
    [ax] = figure.axes
    *_, far = ax.patches
    body = [patch for patch in ax.patches[:-1] if patch.get_height()]
    left, right = ax.get_xlim()
    extent = max(patch.get_x() + patch.get_width() for patch in body) - body[0].get_x()
    assert extent > 0.6 * (right - left)  # nothing like a blank third
    assert far.get_height() == 3
    words = [text.get_text() for text in ax.get_legend().get_texts()]
    assert words[-1] == "3 norms far above: 9 to 200"
    [ax] = plot.distribution(window_of([*BODY, 9.0])).axes
    assert ax.get_yscale() == "log"  # or a bar of 1 would not be seen beside one of 50
    assert plot.norms(window_of(norms)).axes[0].get_yscale() == "log"


@pytest.mark.parametrize(
    ("rows", "spikes", "style"),
    [
        (1, True, "default"),
        (6, False, "default"),
        (6, True, "dark_background"),
        pytest.param(160, True, "default", marks=pytest.mark.nightly),
    ],
)
def test_overviews_have_no_overlaps(rows: int, spikes: bool, style: str) -> None:
    stream = np.random.default_rng(0).lognormal(0, 0.3, (300, rows))
    stream[np.random.default_rng(1).random((300, rows)) < 0.01 * spikes] *= 50
    names = [f"transformer.encoder.layers.{row}.attention.weight" for row in range(rows)]
    infos = [ParameterInfo(name, (2,)) for name in names]
    settings = GroupSettings(Quantile(0.9)).settings
    group = GroupState.from_windows(settings, infos, list(stream.T), [300] * rows)
    state = State("quantile", "parameter", "numpy", (group,))
    with pyplot.style.context(style):
        figure = plot.overview(state)
        figure.canvas.draw()
    texts_drawn = figure.findobj(mpl.text.Text)
    names_drawn = {ax.get_title("left") for ax in figure.axes}
    titles = [each for each in texts_drawn if each.get_text() in names_drawn]
    labels = [text for ax in figure.axes for text in ax.texts if text.get_text() != "≫"]
    legends = [ax.get_legend() for ax in figure.axes if ax.get_legend()]
    assert not overlaps(figure, [*titles, *labels, *legends])
    for ax in figure.axes:
        ticks = [each for each in ax.get_yticklabels() if each.get_text()]
        assert not overlaps(figure, ticks)
    background = np.array(figure.get_facecolor()[:3])
    for line in (line for ax in figure.axes for line in ax.get_lines()):
        color = np.array(mpl.colors.to_rgb(line.get_color()))
        assert np.abs(color - background).max() > 0.3


@pytest.mark.parametrize(
    "name", ["a$b", "$a^2$", "$\\frac", "two\nlines", "\x1b[31m", "\udc80", "层.weight"]
)
@pytest.mark.filterwarnings("ignore:Glyph")
def test_names_are_drawn_as_text(name: str, tmp_path: Path) -> None:
    state = make(rows=2, names=[f"{name}.0", f"{name}.1"])[0]
    figure = plot.overview(state)
    figure.savefig(tmp_path / "run.svg")
    shown = plot.norms(state, 1).axes[0].get_title("left")
    assert shown.isprintable()
    if name.isprintable():
        assert shown == f"{name}.1"
        labels = [each.get_text() for each in figure.axes[1].get_yticklabels()]
        assert sorted(labels) == [f"{name}.0", f"{name}.1"]
    assert not any(text.get_parse_math() for text in figure.axes[1].get_yticklabels())


@pytest.mark.parametrize(("spread", "scale"), [(0.2, "linear"), (3.0, "log")])
def test_norms_over_decades_get_a_logarithmic_axis(spread: float, scale: str) -> None:
    state, _ = make(spread=spread)
    assert plot.norms(state).axes[0].get_yscale() == scale
    assert plot.distribution(state).axes[0].get_xscale() == scale


def test_shares_by_parameter_the_largest_on_top() -> None:
    state, reports = make()
    [ax] = plot.clipped(state).axes
    shares = 100 * np.mean([report.coefficients < 1 for report in reports], axis=0)
    order = np.argsort(-shares, kind="stable")
    np.testing.assert_allclose([patch.get_width() for patch in ax.patches], shares[order])
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert labels == [f"…{row}.weight" for row in order]
    assert ax.yaxis_inverted()


def test_many_rows_and_long_names() -> None:
    names = [f"model.decoder.{'block.' * 20}{row}.weight" for row in range(60)]
    names[7] = "model." + "x" * 200 + ".bias"
    state, _ = make(60, names=names)
    [ax] = plot.clipped(state, max_rows=25).axes
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert len(labels) == 25
    assert max(map(len, labels)) <= 56
    assert "25 of 60 rows" in ax.get_title("left")
    figure = plot.overview(state)
    figure.canvas.draw()
    # No label lies outside of the figure.
    for axes in figure.axes:
        for label in axes.get_yticklabels():
            assert label.get_window_extent().x0 >= 0


def test_the_figure_of_given_axes_is_returned() -> None:
    figure, axes = pyplot.subplots(3)
    state, _ = make()
    assert plot.norms(state, ax=axes[0]) is figure
    assert plot.distribution(state, ax=axes[1]) is figure
    assert plot.clipped(state, ax=axes[2]) is figure
    assert all(ax.has_data() for ax in axes)
    assert len(pyplot.get_fignums()) == 1


def test_overview_of_one_row_and_of_many() -> None:
    assert len(plot.overview(make(1)[0]).axes) == 2
    assert len(plot.overview(make(4)[0], 1, quantiles=[0.5]).axes) == 3


def test_what_has_nothing_to_draw_says_so() -> None:
    empty = History(rows=2, rule=Quantile(0.9))
    assert texts(plot.norms(empty).axes[0]) == ["nothing was recorded yet"]
    assert texts(plot.distribution(empty).axes[0]) == ["nothing was recorded yet"]
    assert texts(plot.clipped(empty).axes[0]) == ["nothing was recorded yet"]
    plot.overview(empty).canvas.draw()
    [ax] = plot.clipped(make(rule=Standard(), record="clipped")[0]).axes
    assert texts(ax) == ["norms were recorded after clipping"]
    group = make()[0].groups[0]
    settings = {name: value for name, value in group.settings.items() if name != "quantile"}
    infos, windows = group.parameters, group.windows()
    unknown = State(
        "somebodys_rule",
        "parameter",
        "numpy",
        (GroupState.from_windows(settings, infos, windows, group.recorded),),
    )
    assert texts(plot.clipped(unknown).axes[0]) == [
        "the rule 'somebodys_rule' is not registered here"
    ]
    assert list(lines(plot.norms(unknown).axes[0])) == ["norm"]


@pytest.mark.parametrize("draw", [plot.overview, plot.norms, plot.distribution, plot.clipped])
@pytest.mark.parametrize("groups", [0, 1])
def test_a_history_without_rows(draw: Any, groups: int) -> None:
    settings = GroupSettings(Quantile(0.9)).settings
    group = GroupState.from_windows(settings, [], [], [])
    with pytest.raises(KeyError, match="has no rows, so there is nothing to draw"):
        draw(State("quantile", "parameter", "numpy", (group,) * groups))


def test_rows_that_recorded_nothing_have_no_share() -> None:
    norms = [1.0, 2.0, 3.0]
    settings = GroupSettings(Quantile(0.5)).settings
    infos = [ParameterInfo(name, ()) for name in ("empty", "full")]
    group = GroupState.from_windows(settings, infos, [[], norms], [0, 3])
    [ax] = plot.clipped(State("quantile", "parameter", "numpy", (group,))).axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["full"]
    assert "1 of 2 rows; mean of all: 66.7 %" in ax.get_title("left")


def test_from_a_file(tmp_path: Path) -> None:
    state, _ = make()
    (tmp_path / "run.autoclip").write_bytes(state.to_bytes())
    plot.overview(tmp_path / "run.autoclip").savefig(tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "autoclip-core\[plot\]"'):
        plot.norms(make()[0])
