"""One random course of events for core, torch and TensorFlow, and for the algorithm in float64.

Gradients of all kinds, some missing; dtypes, settings and groups that change; histories that are
saved by one framework and loaded by all, damaged files and files that do not fit. After each event
all have the same thresholds, windows and counts. The nightly profile takes 10,000 steps, and one
of its clippers runs in a `tf.function`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from in_tensorflow import exact_report
from paths import exact_reports, exact_thresholds, numpy_path
from reference import Row

import autoclip.tf
import autoclip.torch
from autoclip.core import GroupState, History, ParameterInfo, Quantile, Standard, State, StateError
from autoclip.core.adapter import GroupSettings

MOST_GROUPS = 4
DTYPES = ("float32", "float64", "float16", "bfloat16")

# Norms that all dtypes hold exactly, and float32 the squares of.
norms = st.builds(lambda k, e: k * 2.0**e, st.integers(1, 255), st.integers(-8, 5))
wide_norms = st.builds(lambda k, e: k * 2.0**e, st.integers(1, 255), st.integers(-40, 40))
nothing = st.sampled_from([None, 0.0, np.nan, np.inf])

rules = (
    st.builds(Quantile, st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]), st.sampled_from([1.25, 1.5]))
    | st.builds(
        Standard,
        st.sampled_from([0.7, 1.3]),
        # Weights that float64 adds up exactly: equal norms have no deviation.
        decay=st.sampled_from([None, 0.5]),
        factor=st.sampled_from([1.0, 1.5]),
        shrink=st.booleans(),
    )
    | st.builds(Standard, st.just(1.3), decay=st.sampled_from([None, 0.5]), log=st.just(True))
)
modes = st.sampled_from([(True, "raw"), (False, "raw"), (False, "clipped")])
# What a traced graph can follow, too.
changes = {
    "quantile": st.floats(0, 1),
    "deviations": st.sampled_from([0.4, 1.7]),
    "factor": st.sampled_from([1.0, 2.0]),
    "max_norm": st.sampled_from([1e-3, 2.0, 1e6]),
    "warmup_steps": st.integers(0, 4),
    "on_spike": st.sampled_from(["clip", "zero"]),
}


class Side:
    """A clipper of one backend, with one row a group."""

    clipper: Any
    build: Callable[[list[GroupSettings]], None]

    def active(self) -> AbstractContextManager[Any]:
        """Check all that must hold whenever the clipper is used."""
        return nullcontext()

    def add(self, groups: list[GroupSettings]) -> None:
        """Make a new clipper that goes on with the histories of the present one."""
        state = State.from_dict(self.clipper.state_dict())
        nameless = [ParameterInfo(None, None)]
        empty = GroupState.from_windows(groups[-1].settings, nameless, [[]], [0])
        self.build(groups)
        self.clipper.load_state_dict(replace(state, groups=(*state.groups, empty)).to_dict())


class Core(Side):
    """One history."""

    def __init__(self, groups: list[GroupSettings]) -> None:
        self.build(groups)

    def build(self, groups: list[GroupSettings]) -> None:
        self.clipper = History.of(groups)

    def step(self, gradients: list[float | None], dtype: str) -> tuple[Any, Any]:
        report = self.clipper.record([each or 0.0 for each in gradients])
        return report.thresholds, report.coefficients

    def change(self, group: int, name: str, value: Any) -> None:
        changed = list(self.clipper.settings)
        changed[group] = changed[group].merged({name: value})
        self.clipper.settings = changed

    def thresholds(self) -> Any:
        return self.clipper.thresholds


class Torch(Side):
    """A clipper that a parameter can be added to."""

    def __init__(self, groups: list[GroupSettings]) -> None:
        self.parameters = [torch.zeros(1, requires_grad=True) for _ in groups]
        self.clipper = autoclip.torch.Clipper(
            [{"params": [p], **each.settings} for p, each in zip(self.parameters, groups)],
            groups[0].rule,
        )

    def step(self, gradients: list[float | None], dtype: str) -> tuple[Any, Any]:
        for parameter, value in zip(self.parameters, gradients):
            parameter.grad = None
            parameter.data = parameter.data.to(getattr(torch, dtype))
            if value is not None:
                parameter.grad = torch.full_like(parameter, value)
        thresholds, coefficients = self.thresholds(), np.ones(len(gradients))
        self.clipper.step()
        for rows, report in exact_reports(self.clipper):
            thresholds[rows] = report.thresholds
            coefficients[rows] = report.coefficients
        return thresholds, coefficients

    def change(self, group: int, name: str, value: Any) -> None:
        self.clipper.param_groups[group][name] = value

    def add(self, groups: list[GroupSettings]) -> None:
        parameter = torch.zeros(1, dtype=self.parameters[0].dtype, requires_grad=True)
        self.parameters.append(parameter)
        self.clipper.add_param_group({"params": [parameter], **groups[-1].settings})

    def thresholds(self) -> Any:
        found = np.empty(len(self.parameters))
        for rows, values in exact_thresholds(self.clipper):
            found[rows] = values
        return found


class TorchOnDevice(Torch):
    """As on an accelerator, see `path` in conftest.py."""

    def active(self) -> AbstractContextManager[Any]:
        return numpy_path(False)


class TensorFlow(Side):
    """A clipper that is fixed by its variables: a new one for a new group."""

    in_graph = False

    def __init__(self, groups: list[GroupSettings]) -> None:
        self.build(groups)

    def build(self, groups: list[GroupSettings]) -> None:
        self.variables = [tf.Variable([0.0], name=f"row{i}_") for i in range(len(groups))]
        self.clipper = autoclip.tf.Clipper(
            groups[0].rule,
            group_settings=[
                {"match": f"row{i}_", **each.settings} for i, each in enumerate(groups)
            ],
        )
        self.clipper.build(self.variables)
        self.call = tf.function(self._call) if self.in_graph else self._call

    def _call(self, gradients: Any) -> Any:
        self.clipper(zip(gradients, self.variables))
        report = exact_report(self.clipper)
        return tf.where(report < 1e250, report, tf.constant(np.inf, tf.float64))

    def step(self, gradients: list[float | None], dtype: str) -> tuple[Any, Any]:
        if self.in_graph:
            gradients = [0.0 if value is None else value for value in gradients]
        given = [None if each is None else tf.constant([each], dtype) for each in gradients]
        before = self.thresholds()
        _, thresholds, coefficients = self.call(given).numpy().T
        if all(value is None for value in given):
            return before, np.ones(len(given))
        return thresholds, coefficients

    def change(self, group: int, name: str, value: Any) -> None:
        self.clipper.param_groups[group][name] = value

    def thresholds(self) -> Any:
        return self.clipper.thresholds.numpy()


class TensorFlowGraph(TensorFlow):
    """In a `tf.function`, with zeros for missing gradients."""

    in_graph = True


@contextmanager
def other_settings_allowed() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* was saved with other settings")
        yield


def without_names(saved: Any) -> dict[str, Any]:
    """A state whose parameters have no names, so it fits the same number of groups only."""
    state = State.from_dict(saved)
    groups = [
        replace(group, parameters=tuple(replace(each, name=None) for each in group.parameters))
        for group in state.groups
    ]
    return replace(state, groups=tuple(groups)).to_dict()


class Machine(RuleBasedStateMachine):
    """The events; `sides` are the clippers, `rows` the algorithm."""

    kinds: tuple[type[Any], ...] = (Core, Torch, TorchOnDevice, TensorFlow)
    snapshots: Bundle[Any] = Bundle("snapshots")

    @initialize(chosen=rules, length=st.integers(1, 6), mode=modes, count=st.integers(1, 3))
    def start(self, chosen: Any, length: int, mode: tuple[bool, Any], count: int) -> None:
        if mode[1] == "clipped" and chosen.thresholds_only_fall:
            mode = (False, "raw")
        self.rule, self.common = chosen, (length, *mode)
        self.groups = [self.new_group(i) for i in range(count)]
        self.rows = [Row(chosen.name, **each.settings) for each in self.groups]
        self.sides = [kind(self.groups) for kind in self.kinds]

    def new_group(self, i: int) -> GroupSettings:
        length, include_current, record = self.common
        # Each is different, so that each is a group of the core's; the first uses all settings.
        return GroupSettings(
            self.rule,
            length,
            max_norm=1e6 + i,
            warmup_steps=1,
            include_current=include_current,
            record=record,
            on_spike="zero" if i == 0 else "clip",
        )

    def everywhere(self, do: Any) -> None:
        for side in self.sides:
            with side.active(), other_settings_allowed():
                do(side)

    @rule(dtype=st.sampled_from(DTYPES), steps=st.integers(1, 3), data=st.data())
    def step(self, dtype: str, steps: int, data: st.DataObject) -> None:
        values = (norms if "16" in dtype else wide_norms) | nothing
        size = len(self.groups)
        for _ in range(steps):
            self.compare(data.draw(st.lists(values, min_size=size, max_size=size)), dtype)

    def compare(self, gradients: list[float | None], dtype: str) -> None:
        expected = [row.step(each or 0.0) for row, each in zip(self.rows, gradients)]
        thresholds, coefficients = np.array(expected).T
        drops = np.array([group.on_spike != "clip" for group in self.groups])
        sizes = np.array([each or 0.0 for each in gradients])
        # The last bit of a threshold decides whether a spike that equals it is dropped.
        tied = drops & np.isclose(sizes, thresholds, rtol=1e-9, atol=0)

        def check(side: Side) -> None:
            found = side.step(gradients, dtype)
            np.testing.assert_allclose(found[0], thresholds, rtol=1e-12)
            np.testing.assert_allclose(found[1][~tied], coefficients[~tied], rtol=1e-12)

        self.everywhere(check)

    @rule(data=st.data())
    def change_a_setting(self, data: st.DataObject) -> None:
        group = data.draw(st.integers(0, len(self.groups) - 1))
        known = [name for name in changes if name in self.groups[0].settings]
        if group == 0:  # where graphs that are traced keep what settings they use
            known = [name for name in known if name not in ("warmup_steps", "on_spike")]
        if self.groups[0].record == "clipped" or self.groups[0].settings.get("shrink"):
            known.remove("factor")
        name = data.draw(st.sampled_from(known))
        value = data.draw(changes[name])
        if name == "max_norm":
            value += group * 1e-6
        self.groups[group] = self.groups[group].merged({name: value})
        self.rows[group].settings[name] = value
        self.everywhere(lambda side: side.change(group, name, value))

    @precondition(lambda self: len(self.groups) < MOST_GROUPS)
    @rule()
    def add_a_group(self) -> None:
        self.groups.append(self.new_group(len(self.groups)))
        self.rows.append(Row(self.rule.name, **self.groups[-1].settings))
        self.everywhere(lambda side: side.add(self.groups))

    @rule()
    def reset(self) -> None:
        for row in self.rows:
            row.window, row.recorded = [], 0
        self.everywhere(lambda side: side.clipper.reset())

    @rule(target=snapshots, side=st.integers(0, 99))
    def save(self, side: int) -> Any:
        saved = self.sides[side % len(self.sides)].clipper.state_dict()
        return saved, [(row.window, row.recorded) for row in self.rows]

    @rule(snapshot=snapshots)
    def load(self, snapshot: Any) -> None:
        saved, contents = snapshot
        if len(contents) != len(self.rows):
            self.refused(without_names(saved))
            return
        for row, (window, recorded) in zip(self.rows, contents):
            row.window, row.recorded = window, recorded
        self.everywhere(lambda side: side.clipper.load_state_dict(saved))

    @rule(snapshot=snapshots, place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
    def load_a_damaged_file(self, snapshot: Any, place: float, bit: int) -> None:
        data = bytearray(snapshot[0]["data"])
        data[int(place * len(data))] ^= 1 << bit
        self.refused({**snapshot[0], "data": bytes(data)})

    def refused(self, saved: Any) -> None:
        def check(side: Any) -> None:
            with pytest.raises(StateError):
                side.clipper.load_state_dict(saved)

        self.everywhere(check)

    @invariant()
    def same_histories(self) -> None:
        limits = [row.compare(0.0)[0] for row in self.rows] if hasattr(self, "rows") else []

        def check(side: Any) -> None:
            groups = State.from_dict(side.clipper.state_dict()).groups
            assert [group.windows()[0].tolist() for group in groups] == [
                row.window for row in self.rows
            ]
            assert [group.recorded.tolist() for group in groups] == [
                [row.recorded] for row in self.rows
            ]
            np.testing.assert_allclose(side.thresholds(), limits, rtol=1e-12)

        if limits:
            self.everywhere(check)


class NightlyMachine(Machine):
    """With a graph besides."""

    kinds = (*Machine.kinds, TensorFlowGraph)


@pytest.mark.hypothesis
def test_all_follow_the_same_course_of_events() -> None:
    if settings.get_current_profile_name() == "nightly":
        run_state_machine_as_test(
            NightlyMachine, settings=settings(max_examples=200, stateful_step_count=50)
        )
    else:
        run_state_machine_as_test(
            Machine, settings=settings(max_examples=10, stateful_step_count=20)
        )
