"""Every setting, every mode and rules of one's own, over both paths."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from paths import TensorHistory, numpy_path, windows_of
from rules import MODES, RULES, Mad, Recent, each_mode, each_rule
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from autoclip.core import History, Quantile, Rule, Standard
from autoclip.core.adapter import GroupSettings
from autoclip.torch import Clipper, QuantileClip, StandardClip

CPU = torch.device("cpu")


examples = settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])

# Of two norms of different steps none is within the rounding of the other's threshold, also if the
# same number is drawn for both.
norms = st.one_of(
    st.floats(0.5, 2.0).map(lambda x: x * math.e), st.sampled_from([0.0, math.nan, math.inf])
)
streams = st.lists(st.tuples(norms, norms, norms), min_size=1, max_size=14).map(
    lambda steps: [[x * math.exp(i / 100) for x in step] for i, step in enumerate(steps)]
)
options = st.fixed_dictionaries(
    {
        "history_length": st.integers(1, 6),
        "max_norm": st.sampled_from([None, 2.5]),
        "warmup_steps": st.sampled_from([None, 0, 3]),
        "include_current": st.sampled_from([None, False, True]),
        "record": st.sampled_from(["raw", "raw", "clipped"]),
        "on_spike": st.sampled_from(["clip", "zero"]),
    }
)


def checked(rule: Rule, given_options: dict[str, Any]) -> GroupSettings:
    if given_options["record"] == "clipped":
        given_options = {**given_options, "include_current": False}
        if rule.thresholds_only_fall:
            given_options = {**given_options, "record": "raw"}
    if getattr(rule, "log", False) and given_options["include_current"]:
        # A norm that is alone in its window lies within the rounding of exp(log(norm)).
        given_options = {**given_options, "on_spike": "clip"}
    return GroupSettings(rule, **given_options)


# -- histories on a device -----------------------------------------------------------------------


@each_rule
@examples
@given(stream=streams, given_options=options)
def test_tensors_give_the_cores_numbers_for_any_rule_and_setting(
    rule: Rule, stream: Any, given_options: Any
) -> None:
    of_rows = [checked(rule, given_options)] * 3
    ours, core = TensorHistory(of_rows, CPU), History.of(of_rows)
    for step in stream:
        np.testing.assert_allclose(ours.thresholds, core.thresholds, rtol=1e-12)
        report, expected = ours.record(torch.tensor(step, dtype=torch.float64)), core.record(step)
        np.testing.assert_allclose(report.thresholds, expected.thresholds, rtol=1e-12)
        np.testing.assert_allclose(report.coefficients, expected.coefficients, rtol=1e-9)
    (found, counts), (wanted, wanted_counts) = ours.read(range(3)), core.read(range(3))
    for window, other in zip(found, wanted):
        np.testing.assert_allclose(window, other, rtol=2e-7)
    np.testing.assert_array_equal(counts, wanted_counts)


def test_only_rules_that_ask_for_quantiles_of_the_norms_keep_them_in_order() -> None:
    for rule, kept in ((Quantile(0.5), True), (Mad(), True), (Standard(), False)):
        history = TensorHistory([GroupSettings(rule, 10)] * 2, CPU)
        assert (windows_of(history).ordered is not None) is kept


# -- through a clipper ---------------------------------------------------------------------------


def parameters(count: int = 3) -> list[Tensor]:
    return [torch.zeros(4, dtype=torch.float32, requires_grad=True) for _ in range(count)]


def give(ours: Sequence[Tensor], sizes: Sequence[float | None]) -> None:
    """Gradients with these norms."""
    for mine, size in zip(ours, sizes, strict=True):
        mine.grad = None if size is None else torch.full((4,), size / 2, dtype=torch.float32)


def norm_of(parameter: Tensor) -> float:
    assert parameter.grad is not None
    return float(parameter.grad.norm())


def recorded(clipper: Clipper) -> list[list[float]]:
    groups = clipper.export_state().groups
    return [window.tolist() for group in groups for window in group.windows()]


@pytest.mark.parametrize(
    ("path", "mode", "rule"),
    [
        # On a device each rule in one mode, and each mode with three of them.
        pytest.param(
            path,
            mode,
            rule,
            marks=[pytest.mark.nightly] * (path == "device" and mode != [*MODES][k % 3]),
            id=f"{path}-{mode}-{name}",
        )
        for path in ("numpy", "device")
        for mode in MODES
        for k, (name, rule) in enumerate(RULES.items())
    ],
    indirect=["path"],
)
@examples
@given(stream=streams, given_options=options)
def test_a_clipper_does_what_the_core_says_in_every_mode(
    path: str, mode: str, rule: Rule, stream: Any, given_options: Any
) -> None:
    own = checked(rule, given_options)
    chosen = {name: getattr(own, name) for name in given_options}
    ours = parameters()
    groups = [{"params": ours[:2]}, {"params": ours[2:]}]
    modes = {"group_clipping": mode == "group", "global_clipping": mode == "global"}
    clipper = Clipper(groups, rule, **chosen, **modes)
    members = {"parameter": [[0], [1], [2]], "group": [[0, 1], [2]], "global": [[0, 1, 2]]}[mode]
    core = History.of([own] * len(members))
    for step in stream:
        give(ours, step)
        before = [mine.grad.clone() for mine in ours if mine.grad is not None]
        clipper.step()
        joint = [math.sqrt(sum(step[i] ** 2 for i in row)) for row in members]
        expected = core.record(joint)
        np.testing.assert_allclose(clipper.last.thresholds, expected.thresholds, rtol=1e-5)
        np.testing.assert_allclose(clipper.thresholds, core.thresholds, rtol=1e-5)
        for row, coefficient in zip(members, expected.coefficients):
            for i in row:
                np.testing.assert_allclose(ours[i].grad, before[i] * coefficient, rtol=1e-4)
    assert (
        clipper.last.names
        == {
            "parameter": tuple(f"group {i} parameter {k}" for i, k in ((0, 0), (0, 1), (1, 0))),
            "group": ("group 0", "group 1"),
            "global": ("all parameters",),
        }[mode]
    )
    state = clipper.state_dict()
    twin = copy.deepcopy(clipper)
    twin.reset()
    assert [window for window in recorded(twin) if window] == []
    twin.load_state_dict(state)
    assert twin.state_dict() == state
    np.testing.assert_array_equal(twin.thresholds, clipper.thresholds)


def test_names_of_parameters_are_in_the_report(path: str) -> None:
    model = nn.Linear(3, 2)
    clipper = QuantileClip(model.named_parameters())
    model(torch.ones(1, 3)).sum().backward()
    clipper.step()
    assert clipper.last.names == ("weight", "bias")


def test_every_setting_can_differ_between_groups(path: str) -> None:
    ours = parameters(4)
    clipper = QuantileClip(
        [
            {"params": ours[:1], "max_norm": 1.5},
            {"params": ours[1:2], "warmup_steps": 3},
            {"params": ours[2:3], "include_current": False, "history_length": 2},
            {"params": ours[3:], "on_spike": "zero", "factor": 0.5},
        ],
        quantile=0.5,
    )
    for size in (1.0, 2.0, 4.0):
        give(ours, [size] * 4)
        clipper.step()
    assert clipper.last.thresholds.tolist() == [1.5, math.inf, 1.5, 1.0]
    assert [norm_of(mine) for mine in ours] == [1.5, 4.0, 1.5, 0.0]
    assert clipper.last.spikes.tolist() == [True, False, True, True]
    assert clipper.thresholds.tolist() == [1.5, 2.0, 3.0, 1.0]


def test_on_nonfinite_can_differ_between_groups(path: str) -> None:
    ours = parameters(3)
    clipper = QuantileClip(
        [
            {"params": ours[:1], "on_nonfinite": "zero"},
            {"params": ours[1:2]},
            {"params": ours[2:], "on_nonfinite": "raise"},
        ]
    )
    give(ours, [math.nan, math.nan, 1.0])
    clipper.step()
    assert norm_of(ours[0]) == 0.0
    assert math.isnan(norm_of(ours[1]))
    give(ours, [math.nan, 1.0, math.nan])
    before = clipper.state_dict()
    with pytest.raises(FloatingPointError, match="group 2 parameter 0"):
        clipper.step()
    assert clipper.state_dict() == before
    assert math.isnan(norm_of(ours[0]))


@pytest.mark.parametrize("how", ["global_clipping", "group_clipping"])
def test_one_nan_that_is_zeroed_does_not_let_the_others_pass(path: str, how: Any) -> None:
    ours = parameters(2)
    clipper = QuantileClip(ours, 0.0, on_nonfinite="zero", **{how: True})
    give(ours, [3.0, 4.0])
    clipper.step()
    give(ours, [math.nan, 10.0])
    assert clipper.step().item() == 10.0
    assert [norm_of(mine) for mine in ours] == [0.0, 5.0]
    assert recorded(clipper) == [[5.0, 10.0]]


# -- writing settings ----------------------------------------------------------------------------


@each_mode
def test_param_groups_can_be_written(path: str, mode: Any) -> None:
    ours = parameters(1)
    clipper = QuantileClip(ours, 1.0, **mode)
    for size in (1.0, 2.0, 9.0):
        give(ours, [size])
        clipper.step()
    assert norm_of(ours[0]) == 9.0
    clipper.param_groups[0]["quantile"] = 0
    assert clipper.thresholds.tolist() == [1.0]
    give(ours, [9.0])
    clipper.step()
    assert norm_of(ours[0]) == 1.0
    clipper.param_groups[0].update(max_norm=0.5, history_length=2)  # another structure
    give(ours, [9.0])
    clipper.step()
    assert norm_of(ours[0]) == 0.5
    assert recorded(clipper) == [[9.0, 9.0]]
    before, text = clipper.state_dict(), repr(clipper)
    for name, value, kind in (
        ("quantile", 2.0, ValueError),
        ("history_length", "3", TypeError),
        ("lr", 0.1, KeyError),
        ("params", [], KeyError),
    ):
        with pytest.raises(kind):
            clipper.param_groups[0][name] = value
    assert (clipper.state_dict(), repr(clipper)) == (before, text)


def test_one_group_that_is_written_leaves_the_others_alone(path: str) -> None:
    ours = parameters(2)
    clipper = QuantileClip([{"params": ours[:1]}, {"params": ours[1:]}], 1.0)
    give(ours, [1.0, 1.0])
    clipper.step()
    clipper.param_groups[1]["quantile"] = 0.0
    give(ours, [2.0, 2.0])
    clipper.step()
    assert [norm_of(mine) for mine in ours] == [2.0, 1.0]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    writes=st.lists(
        st.tuples(
            st.integers(0, 3),
            st.sampled_from(
                [
                    ("quantile", 0.0),
                    ("quantile", 0.5),
                    ("max_norm", 2.0),
                    ("max_norm", None),
                    ("warmup_steps", 5),
                    ("warmup_steps", 0),
                    ("on_spike", "zero"),
                    ("on_spike", "clip"),
                ]
            ),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_written_settings_are_those_of_a_clipper_made_with_them(
    path: str, writes: list[tuple[int, tuple[str, Any]]]
) -> None:
    ours, own = parameters(4), [dict[str, Any]() for _ in range(4)]
    clipper = QuantileClip([{"params": [mine]} for mine in ours])
    for sizes in ([1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0], [5.0, 1.0, 5.0, 1.0]):
        give(ours, sizes)
        clipper.step()
    groups = clipper.param_groups
    for i, (name, value) in writes:
        groups[i][name] = own[i][name] = value
        other = QuantileClip([{"params": [p], **chosen} for p, chosen in zip(ours, own)])
        other.load_state_dict(clipper.state_dict())
        assert torch.equal(clipper.thresholds, other.thresholds)
    found = []
    for each in (clipper, other):
        give(ours, [9.0, 0.5, 7.0, 6.0])
        each.step()
        found.append([norm_of(mine) for mine in ours])
    assert found[0] == found[1]


@pytest.mark.parametrize("rule", [Mad(1.0), Recent(0.5)], ids=str)
def test_a_rule_of_ones_own_is_attached_saved_and_loaded(rule: Rule) -> None:
    def train(optimizer: Any, sizes: Sequence[float]) -> None:
        for size in sizes:
            give(optimizer.param_groups[0]["params"], [size, 2 * size])
            optimizer.step()

    optimizer = Clipper.as_optimizer(Adam(parameters(2)), rule)
    train(optimizer, [1.0, 3.0, 2.0])
    other = Clipper.as_optimizer(Adam(parameters(2)), rule)
    other.load_state_dict(optimizer.state_dict())
    train(optimizer, [9.0])
    train(other, [9.0])
    assert other.state_dict()["autoclip"] == optimizer.state_dict()["autoclip"]
    assert (other.clipper.last.coefficients < 1).all()  # type: ignore[attr-defined]
    under_another_rule = QuantileClip.as_optimizer(Adam(parameters(2)))
    with pytest.warns(UserWarning, match=rf"rule='{rule.name}' there and 'quantile' here"):
        under_another_rule.load_state_dict(optimizer.state_dict())


# -- spikes --------------------------------------------------------------------------------------


def spiky(
    make: Any, ours: list[Tensor], mode: dict[str, Any], how: str
) -> tuple[Any, list[Tensor | None]]:
    optimizer: Optimizer = make(ours)
    clipper = QuantileClip(ours, 0.0, on_spike="skip", **mode)
    if how == "attached":
        clipper.attach(optimizer)
    gradients: list[Tensor | None] = []
    for sizes in ([1.0, 1.0], [1.0, 5.0]):
        give(ours, sizes)
        gradients = [mine.grad for mine in ours]
        if how == "by hand":
            clipper.step()
        optimizer.step()
    return optimizer, gradients


@pytest.mark.parametrize("how", ["attached", "by hand"])
@each_mode
@pytest.mark.parametrize("fused", [False, True])
def test_a_skipped_parameter_is_left_untouched(
    path: str, how: str, mode: dict[str, Any], fused: bool
) -> None:
    """No momentum, no weight decay, no count of steps."""

    def make(some: list[Tensor]) -> Optimizer:
        return AdamW(some, lr=0.1, weight_decay=0.5, fused=fused)

    ours, theirs = parameters(2), parameters(2)
    optimizer, gradients = spiky(make, ours, mode, how)
    plain = make(theirs)
    for sizes in ([1.0, 1.0], [None, None] if mode else [1.0, None]):
        give(theirs, sizes)
        plain.step()
    for mine, other in zip(ours, theirs):
        assert torch.equal(mine, other)
        for name, value in plain.state[other].items():
            assert torch.equal(optimizer.state[mine][name], value), name
    assert not hasattr(optimizer, "found_inf")
    gradient = gradients[1]
    assert gradient is not None
    if how == "attached":  # it is there again after the step, as it was
        assert ours[1].grad is gradient
        assert norm_of(ours[1]) == 5.0
    else:
        assert ours[1].grad is None


def test_zero_on_spike_keeps_what_was_recorded(path: str) -> None:
    ours = parameters(1)
    clipper = StandardClip(ours, 0.0, warmup_steps=1, on_spike="zero", factor=2.0, record="clipped")
    for size, left, threshold in ((1.0, 1.0, math.inf), (4.0, 0.0, 2.0), (2.0, 2.0, 3.0)):
        give(ours, [size])
        clipper.step()
        assert norm_of(ours[0]) == left
        assert clipper.last.thresholds.tolist() == [threshold]
    assert recorded(clipper) == [[1.0, 2.0, 2.0]]


# -- the rest ------------------------------------------------------------------------------------


def test_the_class_of_an_optimizer_is_not_an_optimizer() -> None:
    with pytest.raises(TypeError, match=r"as_optimizer\(torch\.optim\.SGD\(model"):
        QuantileClip.as_optimizer(SGD)  # type: ignore[type-var]


class WithoutInit(SGD):
    def __init__(self, params: Any) -> None:
        self.param_groups = [{"params": list(params), "lr": 0.1}]


class WithoutSomeHooks(SGD):
    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        del self._optimizer_load_state_dict_post_hooks


@pytest.mark.parametrize("make", [WithoutInit, WithoutSomeHooks])
def test_a_failed_attach_leaves_everything_as_it_was(make: Any) -> None:
    SGD(parameters(), lr=0.1)  # so that torch has wrapped SGD.step
    ours = parameters()
    optimizer = make(ours)
    before = copy.copy(optimizer.__dict__)
    hooks = {k: dict(v) for k, v in before.items() if "hooks" in k}
    clipper = QuantileClip(ours)
    for attach in (lambda: clipper.attach(optimizer), lambda: QuantileClip.as_optimizer(optimizer)):
        with pytest.raises(TypeError, match=r"super\(\).__init__"):
            attach()
    assert optimizer.__dict__ == before
    assert {k: dict(v) for k, v in optimizer.__dict__.items() if "hooks" in k} == hooks
    give(ours, [1.0] * 3)
    clipper.step()
    clipper.attach(SGD(ours, lr=0.1))


def test_groups_as_autoclip_0_2_1_added_them() -> None:
    ours = parameters(3)
    clipper = QuantileClip(ours[:1])
    with pytest.warns(DeprecationWarning, match="takes a dict") as caught:
        clipper.add_param_group(ours[1], quantile=0.5, history_length=7)
    with pytest.warns(DeprecationWarning, match="takes a dict") as caught_too:
        clipper.add_param_group({"params": ours[2]}, quantile=0.2)
    assert {warning.filename for warning in [*caught, *caught_too]} == {__file__}
    assert [group["quantile"] for group in clipper.param_groups] == [0.9, 0.5, 0.2]
    assert [group["history_length"] for group in clipper.param_groups] == [1000, 7, 1000]


def test_many_groups_are_arranged_in_one_go(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many batches as there are structures, made once and not for each group."""
    ours = parameters(300)
    optimizer = SGD([{"params": [mine]} for mine in ours], lr=0.1)
    made = []
    for kind in (History, TensorHistory):
        name = "_set_up" if kind is History else "__init__"
        original = getattr(kind, name)

        def counted(self: Any, *args: Any, original: Any = original) -> None:
            made.append(self)
            original(self, *args)

        monkeypatch.setattr(kind, name, counted)
    QuantileClip.as_optimizer(optimizer)
    give(ours, [1.0] * 300)
    optimizer.step()
    assert len(made) == 1


class Operations(TorchDispatchMode):
    """Notes the operations that run under it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


# They read a number, or how many there are, from the device; or write numbers of the host to it.
WAITING = {"_local_scalar_dense", "item", "nonzero", "masked_select", "lift_fresh", "equal"}


@each_rule
@each_mode
@pytest.mark.parametrize("choice", [{}, {"on_nonfinite": "zero", "on_spike": "zero"}])
def test_a_step_on_a_device_waits_for_nothing(
    mode: dict[str, Any], choice: dict[str, Any], rule: Rule
) -> None:
    ours = parameters(4)
    groups = [{"params": ours[:1], "max_norm": 3.0}, {"params": ours[1:]}]
    if mode.get("global_clipping"):
        groups = [{"params": ours}]
    with numpy_path(False):
        clipper = Clipper(groups, rule, 5, warmup_steps=2, **mode, **choice)
        for size in (1.0, 2.0):
            give(ours, [size] * 4)
            clipper.step()
        give(ours, [3.0] * 4)
        with Operations() as seen:
            clipper.step()
    assert seen.names
    assert not WAITING & set(seen.names)


def test_a_step_without_gradients_is_float32_whatever_the_default() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        ours = parameters(1)
        clipper = QuantileClip(ours)
        with pytest.warns(UserWarning, match="no gradient"):
            assert clipper.step().dtype is torch.float32
        give(ours, [1.0])
        assert clipper.step().dtype is torch.float32
        assert clipper.last.norms.dtype is torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "settings",
    [{}, {"global_clipping": True}, {"group_clipping": True}, {"on_nonfinite": "zero"}],
    ids=str,
)
def test_the_default_device_has_no_say(path: str, settings: dict[str, Any]) -> None:
    """Parameters elsewhere, as when some are offloaded: nothing goes to the default device."""

    def run(device: str | None) -> list[Tensor]:
        ours = parameters(3)
        # Large, 16-bit and complex gradients each have a way of their own.
        dtypes = (torch.float32, torch.bfloat16, torch.complex64)
        ours += [torch.zeros(2**17, dtype=dtype, requires_grad=True) for dtype in dtypes]
        torch.set_default_device(device)
        try:
            clipper = QuantileClip(ours, 0.0, **settings)
            with pytest.warns(UserWarning, match="no gradient"):
                results = [clipper.step()]
            for size in (1.0, 3.0, math.inf, 2.0):
                for parameter in ours:
                    parameter.grad = torch.full_like(parameter, size)
                results.append(clipper.step())
            clipper.load_state_dict(clipper.state_dict())
            last = clipper.last
            results += [last.norms, last.thresholds, last.coefficients, clipper.thresholds]
            return results + [p.grad for p in ours if p.grad is not None]
        finally:
            torch.set_default_device(None)

    for ours, theirs in zip(run("meta"), run(None), strict=True):
        assert ours.device.type == "cpu"
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("settings", [{}, {"global_clipping": True}, {"on_nonfinite": "raise"}])
def test_fake_tensors_pass(settings: dict[str, Any]) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        ours = parameters(2)
        clipper = QuantileClip(ours, **settings)
        give(ours, [1.0, 2.0])
        assert clipper.step().shape == ()


@pytest.mark.parametrize("global_clipping", [False, True])
def test_a_tiny_coefficient_zeroes_no_gradient(path: str, global_clipping: bool) -> None:
    weight = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    clipper = QuantileClip([weight], 0.0, global_clipping=global_clipping)
    for size in (2e-38, 3e38):
        weight.grad = torch.tensor([size], dtype=torch.float64)
        clipper.step()
    assert weight.grad is not None
    np.testing.assert_allclose(weight.grad, [2e-38], rtol=1e-6)
