"""Saved and loaded clippers: the same bytes everywhere, and training that goes on bit by bit."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from paths import numpy_path, room
from torch import Tensor, nn
from torch.optim import SGD

from autoclip.core import GroupState, History, ParameterInfo, Quantile, State
from autoclip.core.adapter import GroupSettings
from autoclip.torch import Clipper, QuantileClip, StandardClip, StateError

LENGTH = 6
SHAPES = [(3,), (4, 70), (1,)]
RULES: dict[str, Callable[..., Clipper]] = {
    "quantile": lambda parameters, **s: QuantileClip(parameters, 0.3, **{**USUAL, **s}),
    "standard": lambda parameters, **s: StandardClip(parameters, 0.5, **{**USUAL, **s}),
}
USUAL: dict[str, Any] = {"history_length": LENGTH}

# `path` is the same for all examples of a test.
examples = settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
each_mode = pytest.mark.parametrize("global_clipping", [False, True], ids=["each", "global"])
each_rule = pytest.mark.parametrize("rule", RULES)

usual = st.floats(2.0**-20, 2.0**20, width=32)
strange = st.sampled_from([None, 0.0, math.nan, math.inf])
steps = st.tuples(*[st.one_of(usual, usual, usual, strange)] * len(SHAPES))


@pytest.fixture(autouse=True)
def no_warnings() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="autoclip")
        warnings.filterwarnings("error", "state_dict was saved")
        warnings.filterwarnings("ignore", "QuantileClip.step|StandardClip.step")
        yield


def parameters(shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[Tensor]:
    return [torch.zeros(shape, requires_grad=True) for shape in shapes]


def step(clipper: Clipper, norms: Sequence[float | None]) -> list[Tensor | None]:
    """One step on gradients with these norms; what became of the gradients."""
    ours = [p for group in clipper.param_groups for p in group["params"]]
    generator = torch.Generator().manual_seed(0)
    for mine, norm in zip(ours, norms, strict=True):
        direction = torch.randn(mine.shape, generator=generator, dtype=torch.float64)
        direction /= direction.norm()
        mine.grad = None if norm is None else (direction * norm).float()
    clipper.step()
    return [mine.grad for mine in ours]


def windows(clipper: Clipper) -> list[list[float]]:
    groups = clipper.export_state().groups
    return [window.tolist() for group in groups for window in group.windows()]


def saved(value: Any) -> Any:
    """Through torch.save and torch.load, which takes no pickled code by default since torch 2.6."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# -- what is saved -------------------------------------------------------------------------------


@each_rule
@each_mode
def test_a_state_dict_is_the_files_bytes(
    path: str, rule: str, global_clipping: bool, tmp_path: Path
) -> None:
    clipper = RULES[rule](parameters(), global_clipping=global_clipping)
    for norms in ([1.0, 2.0, 3.0], [4.0, None, 5.0]):
        step(clipper, norms)
    state = clipper.state_dict()
    assert list(state) == ["format", "version", "data"]
    assert (state["format"], state["version"]) == ("autoclip", 1)
    assert type(state["data"]) is bytes
    clipper.save(tmp_path / "clipper")
    assert (tmp_path / "clipper").read_bytes() == state["data"]
    assert saved(state) == state
    # And it says what it should of the clipper.
    read = State.from_bytes(state["data"])
    mode = "global" if global_clipping else "parameter"
    assert (read.rule, read.mode, read.framework) == (rule, mode, "torch")
    (group,) = read.groups
    assert [p.shape for p in group.parameters] == SHAPES
    expected = [2] if global_clipping else [2, 1, 2]
    assert (group.recorded.tolist(), group.lengths.tolist()) == (expected, expected)


def test_names_shapes_and_settings_of_groups_are_in_it() -> None:
    first, second = nn.Linear(3, 2), nn.Conv2d(3, 2, 5)
    clipper = QuantileClip(
        [
            {"params": first.named_parameters(), "quantile": 0.25},
            {"params": second.parameters(), "history_length": 7},
        ]
    )
    groups = clipper.export_state().groups
    assert [dict(group.settings) for group in groups] == [
        {**clipper.defaults, "quantile": 0.25},
        {**clipper.defaults, "history_length": 7},
    ]
    assert groups[0].parameters == (ParameterInfo("weight", (2, 3)), ParameterInfo("bias", (2,)))
    assert groups[1].parameters == (
        ParameterInfo(None, (2, 3, 5, 5)),
        ParameterInfo(None, (2,)),
    )


def test_lazy_parameters_have_no_shape_as_yet() -> None:
    model = nn.LazyLinear(2)
    clipper = QuantileClip(model.parameters())
    before = clipper.state_dict()
    assert clipper.export_state().groups[0].parameters[0].shape is None
    model(torch.ones(1, 3)).sum().backward()
    clipper.step()
    assert clipper.export_state().groups[0].parameters[0].shape == (2, 3)
    clipper.load_state_dict(before)  # an unknown shape fits any
    assert windows(clipper) == [[], []]


@each_rule
@each_mode
@examples
@given(stream=st.lists(steps, min_size=1, max_size=20), data=st.data())
def test_the_same_past_gives_the_same_bytes(
    path: str,
    rule: str,
    global_clipping: bool,
    stream: list[tuple[float | None, ...]],
    data: st.DataObject,
) -> None:
    """Whoever was loaded in between, into whatever was there, and however memory grew."""
    clipper = RULES[rule](parameters(), global_clipping=global_clipping)
    others = [RULES[rule](parameters(), global_clipping=global_clipping) for _ in range(2)]
    for norms in stream:
        step(clipper, norms)
    with room(at_once=0, first=1):
        current = RULES[rule](parameters(), global_clipping=global_clipping)
        for norms in stream:
            step(current, norms)
            if data.draw(st.booleans()):
                other = others[data.draw(st.integers(0, 1))]
                if other is not current:
                    step(other, [7.0, 8.0, 9.0])  # with a past of its own, which is replaced
                    other.load_state_dict(current.state_dict())
                    current = other
    assert current.state_dict() == clipper.state_dict()


# -- going on ------------------------------------------------------------------------------------


@each_rule
@each_mode
@examples
@given(stream=st.lists(steps, min_size=2, max_size=20), data=st.data())
def test_to_save_load_and_go_on_is_never_to_have_stopped(
    path: str,
    rule: str,
    global_clipping: bool,
    stream: list[tuple[float | None, ...]],
    data: st.DataObject,
) -> None:
    cuts = data.draw(st.sets(st.integers(1, len(stream) - 1), min_size=1, max_size=3))
    whole = RULES[rule](parameters(), global_clipping=global_clipping)
    parts = RULES[rule](parameters(), global_clipping=global_clipping)
    for i, norms in enumerate(stream):
        if i in cuts:
            state = saved(parts.state_dict())
            parts = RULES[rule](parameters(), global_clipping=global_clipping)
            parts.load_state_dict(state)
        for mine, other in zip(step(parts, norms), step(whole, norms)):
            np.testing.assert_array_equal(mine, other)
        if any(norm is not None for norm in norms):
            assert torch.equal(parts.last.thresholds, whole.last.thresholds)
            assert torch.equal(parts.last.coefficients, whole.last.coefficients)
    assert parts.state_dict() == whole.state_dict()


@each_rule
@each_mode
@settings(max_examples=30)
@given(stream=st.lists(usual, min_size=2, max_size=20), data=st.data())
def test_it_goes_on_on_the_other_path(
    rule: str, global_clipping: bool, stream: list[float], data: st.DataObject
) -> None:
    """A run on an accelerator that is resumed on a CPU, and the other way round."""
    cut = data.draw(st.integers(1, len(stream) - 1))
    starts_in_numpy = data.draw(st.booleans())
    whole = RULES[rule](parameters([(1,)]), global_clipping=global_clipping)
    expected = [step(whole, [norm])[0] for norm in stream]
    found = []
    state = None
    for part, in_numpy in (
        (stream[:cut], starts_in_numpy),
        (stream[cut:], not starts_in_numpy),
    ):
        with numpy_path(in_numpy):
            clipper = RULES[rule](parameters([(1,)]), global_clipping=global_clipping)
            if state is not None:
                clipper.load_state_dict(state)
            found += [step(clipper, [norm])[0] for norm in part]
            state = clipper.state_dict()
    assert state == whole.state_dict()
    # Of one element both paths know the exact norm; deviations they sum up in another order.
    tolerance = 0.0 if rule == "quantile" else 1e-6
    for mine, other in zip(found, expected):
        np.testing.assert_allclose(mine, other, rtol=tolerance)


@each_mode
def test_files_too(path: str, global_clipping: bool, tmp_path: Path) -> None:
    clipper = QuantileClip(parameters(), 0.3, 6, global_clipping)
    for size in range(1, 9):
        step(clipper, [size, 2 * size, 3 * size])
    clipper.save(tmp_path / "clipper")
    other = QuantileClip(parameters(), 0.3, 6, global_clipping)
    other.load(str(tmp_path / "clipper"))
    for one, another in zip(step(clipper, [9.0, 1.0, 5.0]), step(other, [9.0, 1.0, 5.0])):
        np.testing.assert_array_equal(one, another)
    assert other.state_dict() == clipper.state_dict()


# -- other settings ------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 3, 6, 100])
def test_another_history_length(path: str, length: int) -> None:
    clipper = QuantileClip(parameters(), 0.5, 6)
    for size in range(1, 10):
        step(clipper, [size, None if size < 8 else 2.0 * size, 0.0])
    other = QuantileClip(parameters(), 0.5, length)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other.load_state_dict(clipper.state_dict())
    kept = [[float(i) for i in range(4, 10)][-length:], [16.0, 18.0][-length:], []]
    assert windows(other) == [pytest.approx(window) for window in kept]
    recorded = [group.recorded.tolist() for group in other.export_state().groups]
    assert recorded == [[9, 2, 0]]
    step(other, [10.0, 20.0, 30.0])
    assert windows(other) == [
        pytest.approx([*window, size][-length:]) for window, size in zip(kept, (10.0, 20.0, 30.0))
    ]
    expected = [np.median(window) for window in windows(other)]
    np.testing.assert_allclose(other.last.thresholds, expected, rtol=1e-6)


@pytest.mark.parametrize("how", ["dict", "file", "global dict"])
def test_other_settings_are_said_in_one_warning_at_the_callers_line(
    how: str, tmp_path: Path
) -> None:
    groups = [{"params": parameters()}, {"params": parameters(), "quantile": 0.2}]
    if how.startswith("global"):
        groups = [{"params": parameters()}]
    mode = how.startswith("global")
    clipper = QuantileClip(copy.copy(groups), 0.3, 6, mode)
    other = QuantileClip(copy.copy(groups), 0.4, 7, mode, on_nonfinite="zero")
    clipper.save(tmp_path / "clipper")
    state = clipper.state_dict()
    with pytest.warns(UserWarning, match="quantile=0.3 there and 0.4 here") as caught:
        other.load(tmp_path / "clipper") if how == "file" else other.load_state_dict(state)
    assert [warning.filename for warning in caught] == [__file__]
    assert str(caught[0].message).count("history_length=6 there and 7 here") == 1
    assert (other.defaults["quantile"], other.defaults["history_length"]) == (0.4, 7)


# -- what does not fit ---------------------------------------------------------------------------


def damaged(state: dict[str, Any]) -> dict[str, Any]:
    data = bytearray(state["data"])
    data[len(data) // 2] ^= 1
    return {**state, "data": bytes(data)}


def named(*shapes: tuple[int, ...], prefix: str = "layer") -> list[tuple[str, Tensor]]:
    return [(f"{prefix}.{i}", p) for i, p in enumerate(parameters(shapes))]


def state_of(clipper: Clipper) -> dict[str, Any]:
    return clipper.state_dict()


MISFITS: dict[str, tuple[Callable[[dict[str, Any]], Any], list[str]]] = {
    "another shape": (
        lambda state: state_of(QuantileClip(named((3,), (7, 4), prefix="other"))),
        ["'other.1'", "'layer.1'", r"\(7, 4\)", r"\(4, 7\)", "Parameter 1 of group 0"],
    ),
    "another mode": (
        lambda state: state_of(QuantileClip(named((3,), (4, 7)), global_clipping=True)),
        ["one history for all parameters", "global_clipping=True"],
    ),
    "more groups": (
        lambda state: state_of(
            QuantileClip([{"params": parameters()[:1]}, {"params": parameters()[1:]}]),
        ),
        ["2 parameter groups", "clipper has 1"],
    ),
    "fewer parameters": (
        lambda state: state_of(QuantileClip(parameters()[:1])),
        ["1 parameters in group 0", "clipper has 2"],
    ),
    "damaged": (damaged, ["damaged"]),
    "cut off": (lambda state: {**state, "data": state["data"][:-1]}, ["damaged"]),
    "empty": (lambda state: {**state, "data": b""}, ["0 bytes"]),
    "no bytes": (lambda state: {**state, "data": "text"}, ["bytes", "str"]),
    "no data": (lambda state: {k: state[k] for k in ("format", "version")}, ["data"]),
    "a later version": (lambda state: {**state, "version": 2}, ["version 2", "Upgrade"]),
    "another format": (lambda state: {**state, "format": "other"}, ["format"]),
    "an optimizer's": (
        lambda state: SGD(parameters(), lr=0.1).state_dict(),
        ["0.2.1", "autoclip convert"],
    ),
    "a model's": (lambda state: nn.Linear(2, 2).state_dict(), ["format", "weight"]),
    "nothing": (lambda state: {}, ["format"]),
    "no dict": (lambda state: None, ["format"]),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_what_does_not_fit_changes_nothing(path: str, misfit: str) -> None:
    make, words = MISFITS[misfit]
    clipper = QuantileClip(named((3,), (4, 7)), history_length=5)
    for size in range(1, 8):
        step(clipper, [size, size / 3])
    before = clipper.state_dict()
    with pytest.raises(StateError) as error:
        clipper.load_state_dict(make(before))
    for word in words:
        error.match(word)
    assert clipper.state_dict() == before
    twin = QuantileClip(named((3,), (4, 7)), history_length=5)
    twin.load_state_dict(before)
    for mine, other in zip(step(clipper, [5.0, 5.0]), step(twin, [5.0, 5.0])):
        assert mine is not None and other is not None
        assert torch.equal(mine, other)


def test_a_file_that_does_not_fit_is_named(path: str, tmp_path: Path) -> None:
    clipper = QuantileClip(parameters())
    step(clipper, [1.0, 2.0, 3.0])
    before = clipper.state_dict()
    QuantileClip(parameters(), global_clipping=True).save(tmp_path / "global")
    with pytest.raises(StateError, match=f"{tmp_path}/global"):
        clipper.load(tmp_path / "global")
    with pytest.raises(FileNotFoundError, match="absent"):
        clipper.load(tmp_path / "absent")
    (tmp_path / "text").write_text("no state, but some words that are long enough")
    with pytest.raises(StateError, match=f"{tmp_path}/text"):
        clipper.load(tmp_path / "text")
    assert clipper.state_dict() == before


# -- names ---------------------------------------------------------------------------------------


def test_names_decide_not_the_order_and_not_the_groups(path: str) -> None:
    names = named((3,), (4, 7), (3,))
    clipper = QuantileClip(names)
    step(clipper, [1.0, 2.0, 3.0])
    other = QuantileClip([{"params": names[2:]}, {"params": names[1::-1]}])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.load_state_dict(clipper.state_dict())
    assert other.thresholds.tolist() == pytest.approx([3.0, 2.0, 1.0])


@pytest.mark.parametrize("attached", [False, True])
def test_a_compiled_layer_keeps_the_names_of_its_parameters(path: str, attached: bool) -> None:
    """Compiled when the history was saved, and not when it is loaded: names without the wrapper."""

    def make(compiled: bool) -> tuple[Any, Any, list[tuple[str, nn.Parameter]]]:
        first: Any = nn.Linear(3, 3, bias=False)
        model = nn.Sequential(torch.compile(first) if compiled else first, nn.Linear(3, 1))
        names = [*model.named_parameters()]
        if not attached:
            clipper = QuantileClip(names)
            return clipper, clipper, names
        # Groups as torch ≥ 2.6 makes them of named parameters, one of them added later.
        groups = [{"params": [p], "param_names": [name]} for name, p in names]
        optimizer: Any = QuantileClip.as_optimizer(torch.optim.SGD(groups[:2], lr=0.0))
        optimizer.add_param_group(groups[2])
        return optimizer.clipper, optimizer, names

    clipper, stepped, names = make(compiled=True)
    assert names[0][0] == "0._orig_mod.weight"
    for norm, (_, parameter) in enumerate(names, start=1):
        parameter.grad = torch.full_like(parameter, norm / parameter.numel() ** 0.5)
    stepped.step()
    other, _, _ = make(compiled=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.load_state_dict(clipper.state_dict())
    assert other.thresholds.tolist() == pytest.approx([1.0, 2.0, 3.0])
    assert clipper.last.names == ("0.weight", "1.weight", "1.bias")


def test_a_parameter_that_was_frozen_when_saving_starts_empty(path: str) -> None:
    names = named((3,), (4, 7))
    clipper, other = QuantileClip(names[1:]), QuantileClip(names)
    step(clipper, [2.0])
    with pytest.warns(UserWarning, match=r"start empty: 'layer.0' of shape \(3,\). .* none"):
        other.load_state_dict(clipper.state_dict())
    assert other.thresholds.tolist() == [math.inf, pytest.approx(2.0)]


@pytest.mark.parametrize("attached", [False, True])
def test_two_clippers_of_a_gan_that_are_exchanged_are_named(path: str, attached: bool) -> None:
    """Equal shapes: nothing else tells that they are not the same parameters."""

    def made(name: str) -> tuple[SGD, QuantileClip]:
        parameters = named((3,), (4, 7), prefix=name)
        optimizer = SGD([parameter for _, parameter in parameters], lr=0.1)
        clipper = QuantileClip(parameters)
        if attached:
            clipper.attach(optimizer)
        for _, parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        if not attached:
            clipper.step()
        return optimizer, clipper

    generator, discriminator = made("generator"), made("discriminator")
    says = (
        "matched by order: 'discriminator.0' → 'generator.0'; 'discriminator.1' → 'generator.1'. "
        "Make sure"
    )
    which = 0 if attached else 1
    with pytest.warns(UserWarning, match=says):
        generator[which].load_state_dict(discriminator[which].state_dict())


# -- the other framework -------------------------------------------------------------------------


def from_tensorflow(*shapes: tuple[int, ...]) -> dict[str, Any]:
    """The state that the TensorFlow clipper saves of variables with these shapes."""
    group = GroupState.from_windows(
        GroupSettings(Quantile(0.3), LENGTH).settings,
        [ParameterInfo(f"dense/{i}", shape) for i, shape in enumerate(shapes)],
        [np.float32([i + 1, i + 2]) for i in range(len(shapes))],
        [2] * len(shapes),
    )
    return State("quantile", "parameter", "tensorflow", (group,), "0.3.0").to_dict()


def test_a_state_of_tensorflow_loads_with_its_kernels_transposed(path: str) -> None:
    clipper = RULES["quantile"](nn.Linear(5, 2).named_parameters())
    clipper.load_state_dict(saved(from_tensorflow((5, 2), (2,))))
    assert windows(clipper) == [[1.0, 2.0], [2.0, 3.0]]
    step(clipper, [3.0, 1.0])
    np.testing.assert_allclose(clipper.last.thresholds, [1.6, 1.6], rtol=1e-6)
    # From now on it is a state of torch.
    with pytest.raises(StateError, match="shapes differ"):
        RULES["quantile"](parameters([(5, 2), (2,)])).load_state_dict(clipper.state_dict())


def test_a_state_of_tensorflow_with_other_numbers_of_elements_does_not(path: str) -> None:
    clipper = RULES["quantile"](nn.Linear(5, 2).named_parameters())
    with pytest.raises(StateError, match=r"'dense/0'.*\(5, 3\).*'weight'.*\(2, 5\).*elements"):
        clipper.load_state_dict(from_tensorflow((5, 3), (2,)))
    assert windows(clipper) == [[], []]


def test_a_history_of_numpy_alone_loads_as_well() -> None:
    history = History(2, Quantile(0.3), LENGTH)
    history.record([3.0, 4.0])
    clipper = RULES["quantile"](parameters([(5, 2), (2,)]))
    clipper.load_state_dict(history.state_dict())
    assert windows(clipper) == [[3.0], [4.0]]


# -- copies --------------------------------------------------------------------------------------

COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("attached", [False, True])
@each_rule
@each_mode
def test_copies_go_on_by_themselves(
    path: str, rule: str, global_clipping: bool, attached: bool, how: str
) -> None:
    ours = parameters()
    clipper = RULES[rule](
        list(zip("abc", ours)), global_clipping=global_clipping, on_nonfinite="zero"
    )
    for size in range(1, 9):
        step(clipper, [size, 3.0, 1.0 / size])
    optimizer = SGD(ours, lr=0.1)
    if attached:
        clipper.attach(optimizer)
    twin = COPIES[how](clipper)
    assert type(twin) is type(clipper)
    assert repr(twin) == repr(clipper)
    assert twin.state_dict() == clipper.state_dict()
    assert torch.equal(twin.last.thresholds, clipper.last.thresholds)
    before = clipper.state_dict()
    theirs = [p for group in twin.param_groups for p in group["params"]]
    assert not set(map(id, theirs)) & set(map(id, ours))
    clipped = step(twin, [2.0, 9.0, 1.0])
    assert clipper.state_dict() == before
    # The copy of an attached one is attached to nothing, and can be.
    assert hasattr(optimizer, "clipper") is attached
    clipper.detach()
    for mine, other in zip(step(clipper, [2.0, 9.0, 1.0]), clipped):
        assert mine is not None and other is not None
        assert torch.equal(mine, other)
    assert twin.state_dict() == clipper.state_dict()
    twin.attach(SGD(theirs, lr=0.1))


def test_a_model_and_its_clipper_copied_together_stay_together() -> None:
    model = nn.Linear(3, 2)
    clipper = QuantileClip(model.parameters(), 0.5)
    other_model, twin = copy.deepcopy((model, clipper))
    assert [*map(id, twin.param_groups[0]["params"])] == [*map(id, other_model.parameters())]


def test_repr() -> None:
    clipper = QuantileClip(
        [{"params": parameters()}, {"params": parameters()[:1], "quantile": 0.5}],
        history_length=20,
        on_nonfinite="zero",
    )
    assert repr(clipper) == (
        "QuantileClip(\n"
        "    quantile=0.9, factor=1.0, history_length=20, on_nonfinite='zero'\n"
        "    group 0: 3 parameters\n"
        "    group 1: 1 parameter, quantile=0.5\n"
        ")"
    )
    other = repr(StandardClip(parameters(), global_clipping=True))
    assert "deviations=2.0" in other
    assert "global_clipping=True" in other
