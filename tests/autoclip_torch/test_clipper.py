"""The clippers in a loop of one's own, over both paths, for each parameter and globally."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from paths import TensorHistory, kinds_of_history, numpy_path, room, windows_of
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.optim import SGD

from autoclip.core import History, Quantile, Standard
from autoclip.core.adapter import GroupSettings
from autoclip.torch import Clipper, QuantileClip, StandardClip

SHAPES = [(3,), (4, 70), ()]
LENGTH = 5
# Every step counts: the rules' behavior towards warm-up and the past is tested in test_settings.
PRESENT: dict[str, Any] = {"include_current": True, "warmup_steps": 0}
RULES: dict[str, tuple[Callable[..., Clipper], Any]] = {
    "quantile": (
        lambda parameters, **s: QuantileClip(parameters, 0.3, LENGTH, **PRESENT, **s),
        Quantile(0.3),
    ),
    "standard": (
        lambda parameters, **s: StandardClip(parameters, 0.5, LENGTH, **PRESENT, **s),
        Standard(0.5),
    ),
}

# `path` is the same for all examples of a test.
examples = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
each_mode = pytest.mark.parametrize("global_clipping", [False, True], ids=["each", "global"])
each_rule = pytest.mark.parametrize("rule", RULES)

usual = st.floats(2.0**-20, 2.0**20, width=32)
strange = st.sampled_from([None, 0.0, math.nan, math.inf])
steps = st.tuples(*[st.one_of(usual, usual, usual, strange)] * len(SHAPES))
streams = st.lists(steps, min_size=1, max_size=15)
clean_streams = st.lists(st.tuples(*[usual] * len(SHAPES)), min_size=1, max_size=12)


def parameter(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    # Made wide first: torch fills nothing with 8 bits.
    return torch.zeros(shape, dtype=torch.float32).to(dtype).requires_grad_()


def parameters() -> list[Tensor]:
    return [parameter(*shape) for shape in SHAPES]


def gradients_of(norms: Sequence[float | None]) -> list[Tensor | None]:
    """Gradients of SHAPES, in directions that never change, with these norms."""
    generator = torch.Generator().manual_seed(0)
    gradients: list[Tensor | None] = []
    for shape, norm in zip(SHAPES, norms):
        direction = torch.randn(shape, generator=generator, dtype=torch.float64)
        direction /= direction.norm()
        gradients.append(None if norm is None else (direction * norm).float())
    return gradients


def give(ours: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    for mine, gradient in zip(ours, gradients, strict=True):
        mine.grad = None if gradient is None else gradient.clone()


def norm_of(gradient: Tensor | None) -> float:
    return 0.0 if gradient is None else float(gradient.double().norm())


def windows(clipper: Clipper) -> list[list[float]]:
    """The recorded norms of each row, oldest first."""
    groups = clipper.export_state().groups
    return [window.tolist() for group in groups for window in group.windows()]


def run(clipper: Clipper, ours: Sequence[Tensor], stream: Sequence[Sequence[float | None]]) -> None:
    for norms in stream:
        give(ours, gradients_of(norms))
        clipper.step()


@pytest.fixture(autouse=True)
def no_warnings() -> Any:
    """A step does not warn unless a test expects it; steps without any gradient aside."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="autoclip")
        warnings.filterwarnings("ignore", "QuantileClip.step|StandardClip.step")
        yield


# -- properties --------------------------------------------------------------------------------


@each_mode
@examples
@given(stream=streams, quantile=st.floats(0.0, 1.0), length=st.integers(1, 8))
def test_thresholds_are_numpys_quantiles_of_the_last_usable_norms(
    path: str,
    global_clipping: bool,
    stream: list[tuple[float | None, ...]],
    quantile: float,
    length: int,
) -> None:
    ours = parameters()
    clipper = QuantileClip(ours, quantile, length, global_clipping)
    kept: list[list[float]] = [[] for _ in range(1 if global_clipping else len(ours))]
    for norms in stream:
        give(ours, gradients_of(norms))
        clipper.step()
        true = [norm_of(gradient) for gradient in gradients_of(norms)]
        if global_clipping:
            true = [math.sqrt(sum(norm * norm for norm in true))]
        for history, norm in zip(kept, true):
            history += [norm] if 0.0 < norm < math.inf else []
        if any(norm is not None for norm in norms):
            expected = [np.quantile(h[-length:], quantile) if h else math.inf for h in kept]
            np.testing.assert_allclose(clipper.last.thresholds, expected, rtol=1e-6)


@each_rule
@each_mode
@examples
@given(stream=clean_streams)
def test_a_clipped_norm_is_at_most_the_threshold(
    path: str, rule: str, global_clipping: bool, stream: list[tuple[float, ...]]
) -> None:
    ours = parameters()
    clipper = RULES[rule][0](ours, global_clipping=global_clipping)
    for norms in stream:
        give(ours, gradients_of(norms))
        clipper.step()
        after = torch.tensor([norm_of(mine.grad) for mine in ours], dtype=torch.float64)
        if global_clipping:
            after = after.square().sum(0, keepdim=True).sqrt()
        assert (after <= clipper.last.thresholds.double() * (1 + 1e-6)).all()


@each_rule
@examples
@given(stream=clean_streams, data=st.data())
def test_storms_leave_the_history_of_the_clean_steps(
    path: str, rule: str, stream: list[tuple[float, ...]], data: st.DataObject
) -> None:
    """Steps of NaN, infinity, zero and None, and globally also those with only one such."""
    for global_clipping in (False, True):
        storm = st.tuples(*[strange] * len(SHAPES))
        if global_clipping:
            bad = st.sampled_from([math.nan, math.inf])
            storm = st.one_of(storm, st.tuples(usual, bad, usual), st.tuples(bad, usual, usual))
        ours, theirs = parameters(), parameters()
        clipper, clean = (
            RULES[rule][0](some, global_clipping=global_clipping) for some in (ours, theirs)
        )
        run(clean, theirs, stream)
        for norms in stream:
            for bad_norms in data.draw(st.lists(storm, max_size=2)):
                before = gradients_of(bad_norms)
                give(ours, before)
                clipper.step()
                for mine, gradient in zip(ours, before):
                    if gradient is not None:
                        np.testing.assert_array_equal(mine.grad, gradient)
            run(clipper, ours, [norms])
        assert clipper.state_dict() == clean.state_dict()


@each_rule
@examples
@given(
    histories=st.tuples(*[st.lists(usual, max_size=8)] * len(SHAPES)),
    orders=st.tuples(st.randoms(use_true_random=False), st.randoms(use_true_random=False)),
)
def test_rows_do_not_leak_into_each_other_whoever_records_when(
    path: str, rule: str, histories: tuple[list[float], ...], orders: Any
) -> None:
    states, thresholds = [], []
    for order in orders:
        ours = parameters()
        clipper = RULES[rule][0](ours)
        turns = [row for row, history in enumerate(histories) for _ in history]
        order.shuffle(turns)
        ahead = [iter(history) for history in histories]
        while turns:
            together = set(turns[: order.randint(1, 3)])
            for row in together:
                turns.remove(row)
            run(clipper, ours, [[next(ahead[i]) if i in together else None for i in range(3)]])
        # One more for all: the thresholds follow from all that was recorded.
        run(clipper, ours, [(1.0, 1.0, 1.0)])
        states.append(clipper.state_dict())
        thresholds.append(clipper.last.thresholds)
    assert states[0] == states[1]
    assert torch.equal(thresholds[0], thresholds[1])


@each_rule
@each_mode
@settings(max_examples=40)
@given(
    stream=st.lists(
        st.one_of(usual, usual.map(lambda x: -x), st.sampled_from([0.0, math.nan, -math.inf])),
        min_size=1,
        max_size=20,
    )
)
def test_both_paths_agree(rule: str, global_clipping: bool, stream: list[float]) -> None:
    """Of one element the norm is exact on both, so that the rest must be too."""
    results = []
    for numpy in (True, False):
        with numpy_path(numpy):
            weight = parameter(1)
            clipper = RULES[rule][0]([weight], global_clipping=global_clipping)
            gradients = []
            for value in stream:
                weight.grad = torch.tensor([value])
                clipper.step()
                gradients.append(weight.grad)
            assert kinds_of_history(clipper) == {History if numpy else TensorHistory}
            results.append((clipper.state_dict(), clipper.last, torch.cat(gradients)))
    (state, report, gradients), (other_state, other_report, other_gradients) = results
    assert state == other_state
    # Standard deviations are summed up in another order.
    tolerance = 0.0 if rule == "quantile" else 1e-6
    np.testing.assert_allclose(report.thresholds, other_report.thresholds, rtol=tolerance)
    np.testing.assert_allclose(gradients, other_gradients, rtol=tolerance)


# -- long histories on the device path -----------------------------------------------------------


@each_rule
@pytest.mark.parametrize("length", [1, 16, 17, 40])
def test_a_long_history_on_a_device_grows_with_use_and_stays_right(rule: str, length: int) -> None:
    settings_of_rows = [GroupSettings(RULES[rule][1], length)] * 3
    with room(at_once=0):
        ours = TensorHistory(settings_of_rows, torch.device("cpu"))
    core = History.of(settings_of_rows)
    capacities = []
    generator = np.random.default_rng(0)
    for step in range(100):
        # One row now and then, one half of the time, one always.
        norms = generator.lognormal(0, 3, 3)
        norms[0] = norms[0] if step % 7 == 3 else math.nan
        norms[1] = norms[1] if step % 2 else 0.0
        report, expected = ours.record(torch.from_numpy(norms)), core.record(norms)
        np.testing.assert_allclose(report.thresholds, expected.thresholds, rtol=1e-12)
        np.testing.assert_allclose(report.coefficients, expected.coefficients, rtol=1e-12)
        capacities.append(windows_of(ours).values.shape[1])
        if step == 50:  # written in another order of the ring, and it goes on
            ours.write(range(3), *ours.read(range(3)))
    (found, counts), (wanted, wanted_counts) = ours.read(range(3)), core.read(range(3))
    for window, other in zip(found, wanted):
        np.testing.assert_array_equal(window, other)
    np.testing.assert_array_equal(counts, wanted_counts)
    assert capacities[0] == min(16, length)
    assert capacities[-1] == length
    assert capacities == sorted(capacities)


def test_a_loaded_history_stays_in_place_where_there_is_room() -> None:
    """A captured CUDA graph goes on writing where the history was."""
    history = TensorHistory([GroupSettings(Quantile(0.5), 8)] * 2, torch.device("cpu"))

    def places() -> list[int]:
        windows = windows_of(history)
        return [each.data_ptr() for each in (windows.values, windows.ordered, windows.counts)]

    before = places()
    history.write([0, 1], [np.float32([1, 2, 3]), np.float32([4])], [3, 1])
    assert places() == before
    report = history.record(torch.tensor([5.0, 6.0], dtype=torch.float64))
    assert report.thresholds.tolist() == [2.5, 5.0]


@pytest.mark.parametrize("rows", [[0], [0, 1]])
def test_a_replayed_step_follows_settings_that_change(rows: list[int]) -> None:
    """A traced step reads its tensors where they are, as a captured CUDA graph does."""
    used = {"max_norm": 2.0, "warmup_steps": 1000, "on_spike": "zero"}
    first, rest = GroupSettings(Quantile(1.0), 8, **used), GroupSettings(Quantile(1.0), 8)
    history = TensorHistory([first] * 2, torch.device("cpu"))
    norms = torch.tensor([4.0, 8.0], dtype=torch.float64)
    replay = make_fx(lambda norms: history.record(norms).coefficients)(norms)
    assert replay(norms).tolist() == [0.0, 0.0]
    history.settings = [rest if row in rows else first for row in range(2)]
    assert replay(norms).tolist() == [1.0, 1.0 if 1 in rows else 0.0]
    history.settings = [first] * 2
    assert replay(norms).tolist() == [0.0, 0.0]


def test_a_history_that_grows_is_refused_in_a_cuda_graph_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Replays go past the room that there was when the graph was captured."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for length, fits in ((25, True), (26, False)):
        with room(at_once=100):
            history = TensorHistory([GroupSettings(Quantile(0.5), length)], torch.device("cpu"))
            history.device = torch.device("cuda")  # as if
            if fits:
                history.record(torch.ones(1, dtype=torch.float64))
            else:
                with pytest.raises(RuntimeError, match=r"CUDA graph.*up to 25"):
                    history.record(torch.ones(1, dtype=torch.float64))


# -- what a step returns and reports -------------------------------------------------------------


@each_mode
def test_step_returns_the_total_norm_as_clip_grad_norm_does(
    path: str, global_clipping: bool
) -> None:
    ours = parameters()
    clipper = QuantileClip(ours, global_clipping=global_clipping)
    for norms in ([3.0, 4.0, 12.0], [5.0, None, 12.0], [None, 0.0, None], [1.0, math.nan, 1.0]):
        give(ours, gradients_of(norms))
        theirs = torch.nn.utils.clip_grad_norm_(ours, math.inf)
        total = clipper.step()
        assert (total.dtype, total.shape, total.device) == (
            torch.float32,
            theirs.shape,
            theirs.device,
        )
        torch.testing.assert_close(total, theirs, equal_nan=True)


@each_mode
def test_without_any_gradient_nothing_happens(path: str, global_clipping: bool) -> None:
    ours = parameters()
    clipper = QuantileClip(ours, 0.5, global_clipping=global_clipping)
    with pytest.raises(RuntimeError, match="nothing to report"):
        _ = clipper.last
    run(clipper, ours, [[1.0] * 3])
    state = clipper.state_dict()
    give(ours, [None] * 3)
    total = clipper.step()
    assert torch.equal(total, torch.nn.utils.clip_grad_norm_(ours, 1.0))
    assert (total.item(), total.dtype, total.shape) == (0.0, torch.float32, ())
    assert clipper.state_dict() == state
    with pytest.raises(RuntimeError, match="nothing to report"):
        _ = clipper.last


def test_last_is_in_the_order_of_the_groups(path: str) -> None:
    """Also where histories of different lengths are kept apart."""
    ours = [parameter(1) for _ in range(5)]
    clipper = QuantileClip(
        [
            {"params": ours[:2], "history_length": 3},
            {"params": ours[2], "history_length": 9, "quantile": 0.0},
            {"params": ours[3:], "history_length": 3, "quantile": 1.0},
        ],
        quantile=0.5,
    )
    for norms in ([1.0, 2.0, 3.0, 4.0, 5.0], [3.0, 4.0, 9.0, 10.0, 0.0]):
        give(ours, [torch.tensor([norm]) for norm in norms])
        clipper.step()
    last = clipper.last
    assert last.norms.tolist() == [3.0, 4.0, 9.0, 10.0, 0.0]
    assert last.thresholds.tolist() == [2.0, 3.0, 3.0, 10.0, 5.0]
    torch.testing.assert_close(last.coefficients, torch.tensor([2 / 3, 3 / 4, 1 / 3, 1.0, 1.0]))
    for values in (last.norms, last.thresholds, last.coefficients):
        assert (values.dtype, values.shape) == (torch.float32, (5,))


def test_a_row_that_has_recorded_nothing_has_no_threshold(path: str) -> None:
    ours = [parameter(1), parameter(1)]
    clipper = QuantileClip(ours)
    ours[1].grad = torch.tensor([2.0])
    clipper.step()
    assert clipper.last.norms.tolist() == [0.0, 2.0]
    assert clipper.last.thresholds.tolist() == [math.inf, 2.0]
    assert clipper.last.coefficients.tolist() == [1.0, 1.0]


# -- NaN and infinity ----------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@each_mode
def test_on_nonfinite(path: str, global_clipping: bool, bad: float) -> None:
    for choice in ("keep", "zero", "raise"):
        ours = parameters()
        clipper = QuantileClip(
            list(zip(["a", "b", "c"], ours)),
            0.5,
            global_clipping=global_clipping,
            on_nonfinite=choice,  # type: ignore[arg-type]
        )
        run(clipper, ours, [[1.0, 1.0, 1.0]])
        before = gradients_of([1.0, 1.0, 9.0])
        assert before[1] is not None
        before[1][2, 5] = bad
        give(ours, before)
        state = clipper.state_dict()
        if choice == "raise":
            with pytest.raises(FloatingPointError, match="gradient of b holds"):
                clipper.step()
            assert clipper.state_dict() == state
        elif choice == "keep":
            assert not math.isfinite(clipper.step())
        else:  # of what is left
            assert clipper.step().item() == pytest.approx(math.hypot(1.0, 9.0))
        # The others are treated as ever, unless the error came before.
        factors = [1.0, 1.0, 5 / 9]
        if choice == "raise" or (global_clipping and choice == "keep"):
            factors = [1.0, 1.0, 1.0]
        elif global_clipping:
            factors = [(math.sqrt(3) + math.hypot(1.0, 9.0)) / 2 / math.hypot(1.0, 9.0)] * 3
        for i, (mine, gradient, factor) in enumerate(zip(ours, before, factors)):
            if choice == "zero" and i == 1:
                assert mine.grad is not None and not mine.grad.any()
            else:
                assert gradient is not None
                np.testing.assert_allclose(mine.grad, gradient * factor, rtol=1e-6)
        lengths = [len(window) for window in windows(clipper)]
        if global_clipping:
            assert lengths == [2 if choice == "zero" else 1]
        else:
            assert lengths == ([1, 1, 1] if choice == "raise" else [2, 1, 2])
        run(clipper, ours, [[3.0] * 3])  # and it goes on


def test_the_error_calls_parameters_without_a_name_by_their_place(path: str) -> None:
    ours = parameters()
    clipper = QuantileClip([{"params": ours[:1]}, {"params": ours[1:]}], on_nonfinite="raise")
    give(ours, gradients_of([math.nan, 1.0, math.inf]))
    words = "gradients of group 0 parameter 0, group 1 parameter 1 hold NaN or infinity"
    with pytest.raises(FloatingPointError, match=words):
        clipper.step()


@pytest.mark.parametrize("choice", ["keep", "zero", "raise"])
@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float32, 3e38),  # the norm leaves float32's range
        (torch.float32, 1e-42),
        (torch.float64, 1e150),
        (torch.float64, 1.7e308),  # and float64's
        (torch.float64, 1e-200),
        (torch.bfloat16, 3e38),
        (torch.complex64, 3e38),
    ],
)
@each_mode
def test_a_finite_gradient_with_a_norm_beyond_float32_is_never_altered(
    path: str, global_clipping: bool, dtype: torch.dtype, size: float, choice: Any
) -> None:
    weight = parameter(100, dtype=dtype)
    clipper = QuantileClip([weight], 0.0, global_clipping=global_clipping, on_nonfinite=choice)
    weight.grad = torch.ones(100, dtype=dtype)
    clipper.step()
    weight.grad = torch.full((100,), size, dtype=torch.float64).to(dtype)
    before = weight.grad.clone()
    clipper.step()
    assert torch.equal(weight.grad, before)
    assert windows(clipper) == [[10.0]]


@pytest.mark.parametrize("max_norm", [1.0, 1e20])
@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float32, 1e38),
        (torch.bfloat16, 1e38),
        (torch.complex64, 1e38),
        (torch.float64, 1e38),
        (torch.float64, 1e150),
    ],
)
@each_mode
def test_a_norm_beyond_float32_is_clipped_to_max_norm_and_not_recorded(
    path: str, global_clipping: bool, dtype: torch.dtype, size: float, max_norm: float
) -> None:
    weight, other = parameter(1000, dtype=dtype), parameter(3)
    clipper = QuantileClip(
        [weight, other], max_norm=max_norm, global_clipping=global_clipping, on_nonfinite="raise"
    )
    weight.grad = torch.full((1000,), size, dtype=torch.float64).to(dtype)
    other.grad = torch.zeros(3)
    norm = math.sqrt(1000) * size
    assert clipper.step() == math.inf
    # On a device, coefficients of gradients that are not float64 end at float32's smallest number.
    is_exact = path == "numpy" or dtype is torch.float64
    expected = max_norm if is_exact else max(max_norm, norm * torch.finfo(torch.float32).tiny)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    rtol = 1e-2 if dtype is torch.bfloat16 else 1e-5
    assert float(weight.grad.to(wide).norm()) == pytest.approx(expected, rel=rtol)
    assert float(clipper.last.thresholds[0]) == pytest.approx(max_norm)
    assert not any(windows(clipper))


# -- gradients of every kind ---------------------------------------------------------------------

DTYPES = [
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
]


def set_gradients(ours: Sequence[Tensor], size: float) -> None:
    for mine in ours:
        wide = torch.complex64 if mine.dtype.is_complex else torch.float32
        mine.grad = torch.full(mine.shape, size, dtype=wide).to(mine.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@each_mode
def test_any_dtype(path: str, global_clipping: bool, dtype: torch.dtype) -> None:
    weight = parameter(4, dtype=dtype)
    clipper = QuantileClip([weight], 0.5, global_clipping=global_clipping)
    set_gradients([weight], 0.5)
    clipper.step()
    set_gradients([weight], 1.5)
    gradient = weight.grad
    assert gradient is not None
    place = gradient.data_ptr()
    assert clipper.step().item() == pytest.approx(3.0, rel=1e-6)
    assert weight.grad is gradient
    assert (gradient.dtype, gradient.data_ptr()) == (dtype, place)  # in place
    assert clipper.last.thresholds.tolist() == [2.0]
    expected = torch.ones(4, dtype=torch.complex128 if dtype.is_complex else torch.float64)
    torch.testing.assert_close(gradient.to(expected.dtype), expected, rtol=1e-6, atol=0)


@each_mode
def test_dtypes_mixed_in_one_clipper(path: str, global_clipping: bool) -> None:
    ours = [parameter(4, dtype=dtype) for dtype in DTYPES]
    clipper = QuantileClip(ours, 0.5, global_clipping=global_clipping)
    for size in (0.5, 1.5):
        set_gradients(ours, size)
        total = clipper.step()
    assert total.item() == pytest.approx(3.0 * math.sqrt(len(ours)), rel=1e-6)
    for mine in ours:
        assert mine.grad is not None
        wide = mine.grad.to(torch.complex128)
        torch.testing.assert_close(wide, torch.ones_like(wide), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_gradients_are_multiplied_in_float32(path: str, dtype: torch.dtype) -> None:
    """A coefficient of 0.9995 that is rounded to float16 is 0.9995117, to bfloat16 1."""
    weight = parameter(256, dtype=dtype)
    clipper = QuantileClip([weight], 0.0)
    values = torch.linspace(1.0, 3.0, 256).to(dtype)
    weight.grad = torch.zeros(256, dtype=dtype)
    weight.grad[0] = 0.9995
    threshold = norm_of(weight.grad)
    clipper.step()
    weight.grad = values.clone()
    clipper.step()
    coefficient = np.float32(threshold / norm_of(values))
    assert torch.equal(weight.grad, (values.float() * coefficient).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
@each_mode
def test_sparse_gradients(path: str, global_clipping: bool, dtype: torch.dtype) -> None:
    """Row 1 twice, row 4 once: the dense gradient has rows (4, 6) and (0, 12), a norm of 14."""

    def gradient(factor: float) -> Tensor:
        values = torch.tensor([[1.0, 2.0], [0.0, 12.0], [3.0, 4.0]]).mul(factor).to(dtype)
        return torch.sparse_coo_tensor([[1, 4, 1]], values, (6, 2), check_invariants=True)

    weight = parameter(6, 2, dtype=dtype)
    clipper = QuantileClip([weight], 0.5, global_clipping=global_clipping)
    for factor in (1.0, 3.0):
        weight.grad = gradient(factor)
        total = clipper.step()
    assert total.item() == pytest.approx(42.0)
    assert weight.grad is not None and weight.grad.layout is torch.sparse_coo
    assert weight.grad._indices().tolist() == [[1, 4, 1]]
    torch.testing.assert_close(weight.grad.to_dense(), gradient(2.0).to_dense())


def test_an_embedding_beside_dense_layers(path: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Linear(4, 1))
    clipper = QuantileClip(model.parameters(), 0.0)
    for words in ([1, 2, 2], [3, 3, 3]):
        model.zero_grad()
        model(torch.tensor(words)).square().sum().backward()
        norms = [norm_of(p.grad.to_dense()) for p in model.parameters() if p.grad is not None]
        clipper.step()
        np.testing.assert_allclose(clipper.last.norms, norms, rtol=1e-6)
    after = [norm_of(p.grad.to_dense()) for p in model.parameters() if p.grad is not None]
    expected = torch.minimum(clipper.last.thresholds, torch.tensor(norms))
    np.testing.assert_allclose(after, expected, rtol=1e-6)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.T,
    "every other": lambda x: x[::2],
    "a slice": lambda x: x[1:4, 2:5],
    "conjugate": lambda x: torch.complex(x, 2 * x).conj(),
    "conjugate transpose": lambda x: torch.complex(x, 2 * x).mH,
    "imaginary part of a conjugate": lambda x: torch.complex(x, 2 * x).conj().imag,
    "channels last": lambda x: x.reshape(1, 2, 4, 6).contiguous(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("name", VIEWS)
@each_mode
def test_gradients_that_are_views_are_scaled_in_place(
    path: str, global_clipping: bool, name: str
) -> None:
    base = torch.arange(48.0).reshape(8, 6) + 1
    gradient = VIEWS[name](base)
    weight = torch.zeros_like(gradient).resolve_conj().resolve_neg().requires_grad_()
    clipper = QuantileClip([weight], 0.5, global_clipping=global_clipping)
    weight.grad = VIEWS[name](base / 3)
    clipper.step()
    weight.grad = gradient
    expected, place = gradient.clone() * (2 / 3), gradient.data_ptr()
    clipper.step()
    assert weight.grad is gradient
    assert gradient.data_ptr() == place
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=0)


@each_mode
def test_gradients_that_autograd_negates_lazily(path: str, global_clipping: bool) -> None:
    """The imaginary part of a conjugate: of a scalar it is contiguous, of others not."""
    norms = []
    for conjugates in (True, False):
        ours = [parameter(), parameter(), parameter(7), parameter(7)]
        optimizer = SGD(ours, lr=0.1)
        QuantileClip.as_optimizer(optimizer, quantile=0.5, global_clipping=global_clipping)
        for size in (1.0, 5.0, 2.0):
            optimizer.zero_grad()
            for real, imaginary in (ours[:2], ours[2:]):
                number = torch.complex(real, imaginary) + (0.5 + 0.3j)
                if conjugates:
                    number = number.conj()
                (number * (2 + 1j if conjugates else 2 - 1j) * size).abs().square().sum().backward()
            if conjugates:
                assert ours[1].grad.is_neg() and ours[1].grad.is_contiguous()  # type: ignore[union-attr]
            optimizer.step()
        norms.append([ours, optimizer.clipper.last.norms, optimizer.clipper.last.coefficients])
    torch.testing.assert_close(*norms)


def test_frozen_and_empty_parameters_and_those_that_are_seldom_used(path: str) -> None:
    ours = [parameter(2), parameter(0, 3), parameter(2), torch.zeros(2)]
    clipper = QuantileClip(ours, 0.5)
    for step in range(6):
        ours[0].grad = torch.tensor([3.0, 4.0])
        ours[1].grad = torch.zeros(0, 3)
        ours[2].grad = torch.tensor([6.0, 8.0]) if step == 4 else None
        assert clipper.step().item() == pytest.approx(math.hypot(5.0, 10.0 if step == 4 else 0.0))
        if step == 4:  # the first one in its history: not clipped to nothing
            assert ours[2].grad is not None and ours[2].grad.tolist() == [6.0, 8.0]
    assert windows(clipper) == [[5.0] * 6, [], [10.0], []]


def test_parameters_that_are_converted_keep_their_history(path: str) -> None:
    """`module.to` exchanges what is in a parameter, not the parameter."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    clipper = QuantileClip(model.parameters(), 0.5)
    ours = list(model.parameters())
    norms = []
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        model.to(dtype)
        assert [*map(id, model.parameters())] == [*map(id, ours)]
        model.zero_grad()
        model(torch.ones(2, 4, dtype=dtype)).square().sum().backward()
        norms.append([norm_of(p.grad) for p in ours])
        clipper.step()
        assert all(p.grad is not None and p.grad.dtype is dtype for p in ours)
    np.testing.assert_allclose(windows(clipper), np.transpose(norms), rtol=1e-5)
    ours[0].data = torch.ones(3, 4, dtype=torch.float64)
    clipper.step()
    assert [len(window) for window in windows(clipper)] == [4, 4]


@each_mode
def test_gradients_on_the_cpu_are_written_only_where_they_are_clipped(
    global_clipping: bool,
) -> None:
    ours = parameters()
    clipper = QuantileClip(ours, 0.5, global_clipping=global_clipping)
    for norms, written in (
        ([1.0, 1.0, 1.0], [False, False, False]),
        ([0.5, 0.5, 0.5], [False, False, False]),
        ([0.5, 4.0, 0.25], [global_clipping, True, global_clipping]),
        ([math.nan, 0.1, 0.0], [False, False, False]),
    ):
        give(ours, gradients_of(norms))
        gradients = [mine.grad for mine in ours]
        before = [(g._version, g.data_ptr()) for g in gradients if g is not None]
        clipper.step()
        for mine, gradient, (version, place), changed in zip(ours, gradients, before, written):
            assert gradient is not None
            assert mine.grad is gradient
            assert gradient.data_ptr() == place
            assert (gradient._version != version) is changed


def test_gradients_that_themselves_have_a_graph(path: str) -> None:
    """As `backward(create_graph=True)` leaves them."""
    weight = torch.tensor([3.0, 4.0], requires_grad=True)
    clipper = QuantileClip([weight], 0.5)
    for factor in (0.5, 1.5):
        weight.grad = None
        (weight.square().sum() * factor / 2).backward(create_graph=True)
        clipper.step()
    assert weight.grad is not None and weight.grad.requires_grad
    torch.testing.assert_close(weight.grad.detach(), torch.tensor([3.0, 4.0]))
    assert not clipper.last.norms.requires_grad


# -- groups and settings -------------------------------------------------------------------------


def test_groups_names_and_settings() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    clipper = StandardClip(
        [
            {"params": model[0].named_parameters(), "deviations": 1},
            {"params": model[1].parameters(), "history_length": 7},
        ],
        deviations=3.0,
        history_length=50,
    )
    clipper.add_param_group({"params": parameter(2)})
    clipper.add_param_group({"params": [parameter(1)], "param_names": ["extra"]})
    groups = clipper.param_groups
    assert [group["deviations"] for group in groups] == [1.0, 3.0, 3.0, 3.0]
    assert [group["history_length"] for group in groups] == [50, 7, 50, 50]
    assert [group.get("param_names") for group in groups] == [
        ["weight", "bias"],
        None,
        None,
        ["extra"],
    ]
    assert [len(group["params"]) for group in groups] == [2, 2, 1, 1]
    assert groups[0]["params"][0] is model[0].weight
    assert clipper.defaults["deviations"] == 3.0
    assert clipper.defaults["history_length"] == 50
    assert (clipper.global_clipping, clipper.group_clipping) == (False, False)


@each_mode
def test_a_group_that_is_added_later_leaves_the_others_alone(
    path: str, global_clipping: bool
) -> None:
    ours = [parameter(1) for _ in range(3)]
    clipper = QuantileClip(ours[:2], 0.5, global_clipping=global_clipping)
    give(ours[:2], [torch.tensor([3.0]), torch.tensor([4.0])])
    clipper.step()
    clipper.add_param_group({"params": ours[2]})
    assert windows(clipper) == ([[5.0]] if global_clipping else [[3.0], [4.0], []])
    give(ours, [torch.tensor([3.0]), torch.tensor([4.0]), torch.tensor([12.0])])
    clipper.step()
    assert windows(clipper) == (
        [[5.0, 13.0]] if global_clipping else [[3.0, 3.0], [4.0, 4.0], [12.0]]
    )


def test_parameters_from_a_generator_and_an_empty_group() -> None:
    clipper = QuantileClip({"params": (p for p in some)} for some in (parameters(), []))
    assert [len(group["params"]) for group in clipper.param_groups] == [3, 0]
    assert windows(clipper) == [[], [], []]


@pytest.mark.parametrize("make", [QuantileClip, StandardClip])
def test_a_global_clipper_has_one_history_and_refuses_settings_of_groups(make: Any) -> None:
    setting = "quantile" if make is QuantileClip else "deviations"
    ours = parameters()
    for settings_of_group in ({setting: 0.5}, {"history_length": 3}):
        with pytest.raises(ValueError, match=f"one history.*{next(iter(settings_of_group))}"):
            make([{"params": ours, **settings_of_group}], global_clipping=True)
    clipper = make([{"params": ours[:1]}, {"params": ours[1:]}], global_clipping=True)
    with pytest.raises(ValueError, match="one history"):
        clipper.add_param_group({"params": parameter(1), setting: 0.5})
    assert len(clipper.param_groups) == 2
    assert windows(clipper) == [[]]


# -- errors: those of torch's optimizers -----------------------------------------------------------

shared = parameter(2)
MISTAKES: dict[str, tuple[Any, str]] = {
    "nothing": (list, "empty parameter list"),
    "a tensor": (lambda: shared, "single"),
    "a model": (lambda: nn.Linear(1, 1), r"such as model\.parameters\(\), but got Linear"),
    "a number": (lambda: 3, "but got int"),
    "None": (lambda: None, "but got NoneType"),
    "a group without a list": (lambda: {"params": [shared]}, "is str"),
    "a number in the list": (lambda: [1.0], "is float"),
    "a set in a group": (lambda: [{"params": {shared}}], "set"),
    "no leaf": (lambda: [shared * 2], "leaf"),
    "one in two groups": (
        lambda: [{"params": [shared]}, {"params": [shared]}],
        "more than one parameter group",
    ),
    "no params": (lambda: [{"history_length": 3}], "params"),
    "a group, then a tensor": (lambda: [{"params": [shared]}, shared], "Tensor"),
    "a tensor, then a group": (lambda: [shared, {"params": [shared]}], "is dict"),
    "names for some": (lambda: [("a", shared), parameter(1)], "names"),
    "too few names": (
        lambda: [{"params": [shared, parameter(1)], "param_names": ["a"]}],
        "names",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_raise_what_torchs_optimizers_raise(mistake: str) -> None:
    make, words = MISTAKES[mistake]
    kinds: list[type[Exception]] = []
    takes_names = torch.__version__ >= "2.6" or mistake != "names for some"
    if takes_names and mistake != "too few names":  # torch does not notice
        with pytest.raises((TypeError, ValueError, KeyError)) as theirs:
            SGD(make(), lr=0.1)
        kinds.append(theirs.type)
    for clip in (QuantileClip, StandardClip):
        with pytest.raises((TypeError, ValueError, KeyError), match=words) as ours:
            clip(make())
        kinds.append(ours.type)
    assert len(set(kinds)) == 1


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: {shared}, TypeError),  # torch takes it in whatever order
        (lambda: frozenset([shared]), TypeError),
        (lambda: [shared, shared], ValueError),  # torch only warns
        (lambda: [(1, shared)], TypeError),
        (lambda: [{"params": [shared], "quantil": 0.5}], ValueError),
        (lambda: [{"params": [shared], "lr": 0.5}], ValueError),
        (lambda: [{"params": [shared], "quantile": 2}], ValueError),
        (lambda: [{"params": [shared], "quantile": "0.5"}], TypeError),
        (lambda: [{"params": [shared], "history_length": 2.0}], TypeError),
    ],
)
def test_where_we_are_stricter_than_torch(make: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind):
        QuantileClip(make())


@pytest.mark.parametrize(
    ("group", "kind"),
    [
        (3, TypeError),
        ([3], TypeError),
        ({}, KeyError),
        ({"params": {parameter(1)}}, TypeError),
        ({"params": [parameter(1), 3]}, TypeError),
        ({"params": [parameter(1), shared]}, ValueError),
        ({"params": [parameter(1)] * 2}, ValueError),
        ({"params": [parameter(1)], "quantile": 3}, ValueError),
        ({"params": [parameter(1)], "speed": 3}, ValueError),
    ],
)
def test_a_group_that_is_refused_leaves_the_clipper_as_it_was(
    path: str, group: Any, kind: type[Exception]
) -> None:
    clipper = QuantileClip([shared], 0.5)
    shared.grad = torch.tensor([3.0, 4.0])
    clipper.step()
    state, text = clipper.state_dict(), repr(clipper)
    with pytest.raises(kind):
        clipper.add_param_group(group)
    assert clipper.state_dict() == state
    assert repr(clipper) == text
    clipper.step()
    assert windows(clipper) == [[5.0, 5.0]]
    shared.grad = None


# -- warnings ------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [QuantileClip, StandardClip])
@pytest.mark.parametrize("value", [False, True])
def test_the_old_name_of_global_clipping_works_and_warns(make: Any, value: bool) -> None:
    with pytest.warns(DeprecationWarning, match="global_clipping") as caught:
        clipper = make(parameters(), global_threshold=value)
    with pytest.warns(DeprecationWarning, match="global_clipping") as caught_too:
        optimizer = make.as_optimizer(SGD(parameters(), lr=0.1), global_threshold=value)
    assert {warning.filename for warning in [*caught, *caught_too]} == {__file__}
    assert clipper.global_clipping is value
    assert optimizer.clipper.global_clipping is value


def lines_of(caught: Any) -> list[tuple[str, int]]:
    return [(warning.filename, warning.lineno) for warning in caught]


def test_a_clipper_that_never_sees_a_gradient_says_so_once() -> None:
    stale, real = parameters(), parameters()
    clipper = QuantileClip(stale)
    give(real, gradients_of([1.0, 1.0, 1.0]))
    with pytest.warns(UserWarning, match="found no gradient on any parameter") as caught:
        clipper.step()
    line = _line_of(test_a_clipper_that_never_sees_a_gradient_says_so_once, "clipper.step()")
    assert lines_of(caught) == [(__file__, line)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clipper.step()
        # One that has seen a gradient may well meet none at times.
        other = QuantileClip(real)
        other.step()
        give(real, [None] * 3)
        other.step()


def test_an_attached_one_says_where_the_optimizers_step_was_called() -> None:
    optimizer = QuantileClip.as_optimizer(SGD(parameters(), lr=0.1))
    torch.optim.lr_scheduler.StepLR(optimizer, 1)  # it wraps the optimizer's step
    with pytest.warns(UserWarning, match="found no gradient on any parameter") as caught:
        optimizer.step()
    test = test_an_attached_one_says_where_the_optimizers_step_was_called
    assert lines_of(caught) == [(__file__, _line_of(test, "optimizer.step()"))]


def _line_of(function: Any, code: str) -> int:
    """The first line of a function that is this code."""
    import inspect

    lines, start = inspect.getsourcelines(function)
    return start + [line.strip() for line in lines].index(code)
