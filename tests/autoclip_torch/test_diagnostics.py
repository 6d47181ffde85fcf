"""Values and summaries of torch's clippers, with parameters' names, in loops and in TensorBoard."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from autoclip.core.inspect import plot
from autoclip.torch import QuantileClip
from autoclip.torch.logging import log_values, summarize


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def train(model: nn.Module, clipper: QuantileClip, steps: int = 12) -> None:
    generator = torch.Generator().manual_seed(0)
    for i in range(steps):
        model.zero_grad()
        (model(torch.randn(5, 4, generator=generator)) * (1 + i % 3)).square().mean().backward()
        clipper.step()


@pytest.mark.parametrize("named", [False, True])
def test_values_by_parameter_name(named: bool) -> None:
    model = make_model()
    given: Any = model.named_parameters() if named else model.parameters()
    clipper = QuantileClip(given, quantile=0.5)
    assert log_values(clipper, True, model=model) == {}
    train(model, clipper)
    last = clipper.last
    names = [name for name, _ in model.named_parameters()]
    three = log_values(clipper)
    expected = dict(three)
    for row, name in enumerate(names):
        expected[f"autoclip/norm/{name}"] = float(last.norms[row])
        expected[f"autoclip/threshold/{name}"] = float(last.thresholds[row])
    assert log_values(clipper, True, model=model) == expected
    weights = log_values(clipper, r"weight$", model=model)
    assert weights.keys() - three == {
        f"autoclip/{what}/{name}" for what in ("norm", "threshold") for name in names[::2]
    }
    if not named:
        numbered = log_values(clipper, True)
        assert "autoclip/norm/group 0 parameter 3" in numbered
        # MLflow accepts no other names.
        assert all(re.fullmatch(r"[/\w.\- ]*", name) for name in numbered)


def test_a_pattern_that_only_the_models_names_would_match_warns_once() -> None:
    model = make_model()
    clipper = QuantileClip(model.parameters(), quantile=0.5)
    train(model, clipper)
    with pytest.warns(UserWarning, match=r"'weight\$' matches no name such as 'group 0 param"):
        assert log_values(clipper, r"weight$") == log_values(clipper)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log_values(clipper, r"weight$")
        log_values(clipper, r"weight$", model=model)
        log_values(clipper, r"parameter 3")
        groups = QuantileClip(model.parameters(), quantile=0.5, group_clipping=True)
        train(model, groups)
        log_values(groups, r"weight$", model=model)  # these have no other names


@pytest.mark.parametrize("part", ["whole", "layer", "checkpoint"])
def test_wrappers_leave_no_trace_in_names(part: str) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model: Any = make_model()
    clipper = QuantileClip(model.parameters(), quantile=0.5)
    train(model, clipper)
    names = [name for name, _ in model.named_parameters()]
    if part == "whole":
        model = torch.compile(model)  # nothing is compiled before the first call
    else:
        model[0] = torch.compile(model[0]) if part == "layer" else checkpoint_wrapper(model[0])
    assert [row.name for row in summarize(clipper, model=model).rows] == names


@pytest.mark.parametrize("mode", ["group_clipping", "global_clipping"])
def test_values_by_group_and_of_all(mode: str) -> None:
    model = make_model()
    groups = [{"params": list(layer.parameters())} for layer in (model[0], model[2])]
    clipper = QuantileClip(groups, quantile=0.5, **{mode: True})
    train(model, clipper)
    own = log_values(clipper, True, model=model).keys() - log_values(clipper).keys()
    names = [f"group {i}" for i in range(2)] if mode == "group_clipping" else []
    assert own == {f"autoclip/{what}/{name}" for what in ("norm", "threshold") for name in names}
    assert [row.name for row in summarize(clipper, model=model).rows] == list(clipper.last.names)


@pytest.mark.parametrize("on_spike", ["clip", "zero", "skip"])
def test_the_mean_coefficient_is_that_of_the_steps(on_spike: Any) -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    clipper = QuantileClip.as_optimizer(optimizer, quantile=0.6, on_spike=on_spike).clipper
    coefficients = []
    generator = torch.Generator().manual_seed(0)
    for i in range(12):
        optimizer.zero_grad()
        (model(torch.randn(5, 4, generator=generator)) * (1 + i % 3)).square().mean().backward()
        optimizer.step()
        coefficients.append(clipper.last.coefficients)
    found = torch.tensor([row.coefficient for row in summarize(clipper).rows])
    torch.testing.assert_close(found, torch.stack(coefficients).mean(0))


def test_a_summary_of_the_history_and_the_last_step() -> None:
    model = make_model()
    clipper = QuantileClip(model.parameters(), quantile=0.5)
    counts, steps = torch.zeros(4), 12
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        model.zero_grad()
        model(torch.randn(5, 4, generator=generator)).square().mean().backward()
        clipper.step()
        counts += clipper.last.spikes
    summary = summarize(clipper, model=model)
    names = [name for name, _ in model.named_parameters()]
    assert [row.name for row in summary.rows] == names
    assert [row.shape for row in summary.rows] == [(8, 4), (8,), (1, 8), (1,)]
    assert [row.clipped for row in summary.rows] == (counts.double() / steps).tolist()
    assert counts.sum() > 0
    assert [row.newest for row in summary.rows] == clipper.last.norms.tolist()
    assert summary.last == log_values(clipper)
    coefficients = dict(zip(names, clipper.last.coefficients.tolist()))
    assert summary.last_coefficients == coefficients
    [ax] = plot.norms(summary, names[2]).axes
    assert ax.get_title("left") == names[2]
    assert "group 0 parameter 2" in str(summarize(clipper))


def test_a_clipper_that_has_made_no_step() -> None:
    summary = summarize(QuantileClip(make_model().parameters()))
    assert summary.last == {}
    assert [row.length for row in summary.rows] == [0] * 4


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is not part of this environment")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    model = make_model()
    clipper = QuantileClip(model.named_parameters(), quantile=0.5)
    expected = []
    with SummaryWriter(str(tmp_path)) as writer:
        for step in range(3):
            train(model, clipper, steps=1)
            expected.append(log_values(clipper, True))
            for name, value in expected[-1].items():
                writer.add_scalar(name, value, step)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["scalars"]) == set(expected[0])
    for name in expected[0]:
        found = [event.value for event in events.Scalars(name)]
        assert found == pytest.approx([values[name] for values in expected], rel=1e-6)


def test_weights_that_another_optimizer_updates_are_warned_about_once() -> None:
    model = make_model()
    clipped: Any = QuantileClip.as_optimizer(torch.optim.Adam(model.parameters()))
    other = type(clipped)(clipped.param_groups)  # as torchrl's group_optimizers
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(30):
            other.zero_grad()
            model(torch.ones(5, 4)).square().mean().backward()
            if step % 2:
                other.step()
            assert log_values(clipped.clipper) == {}
    [warning] = caught
    assert "changed 9 times, but this QuantileClip has made no step" in str(warning.message)
    assert warning.filename == __file__


def test_a_clipper_that_waits_for_its_first_step_is_not_warned_about() -> None:
    model = make_model()
    optimizer: Any = QuantileClip.as_optimizer(torch.optim.Adam(model.parameters()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(64):  # gradients are accumulated, and each batch is logged
            model(torch.ones(5, 4)).square().mean().backward()
            log_values(optimizer.clipper)
        optimizer.step()
        assert log_values(optimizer.clipper)
        assert log_values(QuantileClip(nn.LazyLinear(1).parameters())) == {}
