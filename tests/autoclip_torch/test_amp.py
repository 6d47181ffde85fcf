"""Mixed precision: what is recorded is the unscaled norm, whoever unscales, and whenever."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from autoclip.torch import QuantileClip

IMPLEMENTATIONS = {
    "ordinary": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
OPTIMIZERS = ["SGD", "Adam", "AdamW"]
SCALE = 2.0**10
OVERFLOWS = (2, 5)  # the steps whose loss is infinite
STEPS = 8


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def make_optimizer(name: str, implementation: str, model: nn.Module) -> Optimizer:
    make = getattr(torch.optim, name)
    optimizer: Optimizer = make(model.parameters(), lr=0.1, **IMPLEMENTATIONS[implementation])
    return optimizer


def loss_of(model: nn.Module, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    batch = torch.randn(5, 4, generator=generator) * (1 + step % 3)
    loss: Tensor = model(batch).square().mean()
    return loss


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().clone().flatten() for p in model.parameters()])


def windows(clipper: QuantileClip) -> list[list[float]]:
    groups = clipper.export_state().groups
    return [window.tolist() for group in groups for window in group.windows()]


def unscaled_by_hand(
    name: str, implementation: str, overflows: tuple[int, ...] = OVERFLOWS, **settings: Any
) -> tuple[Tensor, list[list[float]]]:
    """The oracle: no scaler at all, and no step where there is an overflow."""
    model = make_model()
    optimizer = make_optimizer(name, implementation, model)
    clipper = QuantileClip(model.parameters(), quantile=0.5, **settings)
    for step in range(STEPS):
        optimizer.zero_grad()
        if step not in overflows:
            loss_of(model, step).backward()
            clipper.step()
            optimizer.step()
    return weights(model), windows(clipper)


def scaled(
    name: str,
    implementation: str,
    unscale: bool,
    overflows: tuple[int, ...] = OVERFLOWS,
    attached: bool = True,
    **settings: Any,
) -> tuple[Tensor, list[list[float]], list[float]]:
    """Train under a GradScaler; return the weights, the histories, and the scale at each step."""
    model = make_model()
    optimizer = make_optimizer(name, implementation, model)
    clipper = QuantileClip(model.parameters(), quantile=0.5, **settings)
    if attached:
        clipper.attach(optimizer)
    scaler = GradScaler("cpu", init_scale=SCALE, growth_interval=2)
    scales = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, step)
        if step in overflows:
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        if unscale:
            scaler.unscale_(optimizer)
        before = weights(model)
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(weights(model), before) == (step in overflows)
        scales.append(scaler.get_scale())
        assert not {"grad_scale", "found_inf"} & set(optimizer.__dict__)
    return weights(model), windows(clipper), scales


@pytest.mark.parametrize("global_clipping", [False, True], ids=["each", "global"])
@pytest.mark.parametrize("unscale", [False, True], ids=["scaler unscales", "user unscales"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_history_and_weights_are_those_without_a_scaler(
    name: str, implementation: str, unscale: bool, global_clipping: bool
) -> None:
    expected = unscaled_by_hand(name, implementation, global_clipping=global_clipping)
    found = scaled(name, implementation, unscale, global_clipping=global_clipping)
    # The scale is a power of two, so unscaling loses no bit. A fused kernel unscales after
    # clipping, the oracle clips alone: the same products, of which none is rounded twice.
    assert found[1] == expected[1]
    assert torch.equal(found[0], expected[0])
    assert [len(window) for window in found[1]] == [STEPS - len(OVERFLOWS)] * len(found[1])


@pytest.mark.parametrize("on_nonfinite", ["keep", "zero", "raise"])
@pytest.mark.parametrize("unscale", [False, True], ids=["scaler unscales", "user unscales"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_scaler_skips_and_backs_off_whatever_on_nonfinite_says(
    implementation: str, unscale: bool, on_nonfinite: str
) -> None:
    plain = scaled("Adam", implementation, unscale, attached=False)
    found = scaled("Adam", implementation, unscale, on_nonfinite=on_nonfinite)
    assert found[2] == plain[2]
    assert {-1.0, 1.0} <= set(np.sign(np.diff(found[2])))  # it backed off, and it grew
    assert found[1] == unscaled_by_hand("Adam", implementation)[1]


@pytest.mark.parametrize("on_nonfinite", ["keep", "zero", "raise"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_scale_that_is_too_large_comes_down_and_leaves_no_mark(
    implementation: str, on_nonfinite: str
) -> None:
    """The gradients are finite; only their scaled values overflow, until the scale fits."""
    model = make_model()
    optimizer = QuantileClip.as_optimizer(
        make_optimizer("SGD", implementation, model), quantile=0.5, on_nonfinite=on_nonfinite
    )
    scaler = GradScaler("cpu", init_scale=2.0**127, growth_interval=1000)
    for _ in range(12):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, 3) * 64).backward()
        scaler.step(optimizer)
        scaler.update()
    recorded = windows(optimizer.clipper)
    assert scaler.get_scale() < 2.0**126
    assert 0 < len(recorded[0]) < 12
    assert np.isfinite(recorded).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_disabled_scaler_is_as_none(implementation: str) -> None:
    model = make_model()
    optimizer = QuantileClip.as_optimizer(
        make_optimizer("SGD", implementation, model), quantile=0.5, on_nonfinite="raise"
    )
    scaler = GradScaler("cpu", enabled=False)
    for step in range(3):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert [len(window) for window in windows(optimizer.clipper)] == [3] * 4
    model[0].weight.grad[0, 0] = float("nan")
    with pytest.raises(FloatingPointError):
        scaler.step(optimizer)


def test_under_a_fused_scaler_last_says_what_was_clipped() -> None:
    model = make_model()
    optimizer = QuantileClip.as_optimizer(make_optimizer("SGD", "fused", model), quantile=0.5)
    scaler = GradScaler("cpu", init_scale=SCALE)
    for step in range(3):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        norms = torch.stack([p.grad.norm() for p in model.parameters()]) / SCALE
        scaler.step(optimizer)
        scaler.update()
    last = optimizer.clipper.last
    torch.testing.assert_close(last.norms, norms)
    torch.testing.assert_close(last.coefficients, (last.thresholds / last.norms).clamp(max=1.0))


@pytest.mark.parametrize("unscale", [False, True])
def test_nothing_stays_on_the_optimizer_after_an_exception(unscale: bool) -> None:
    model = make_model()
    optimizer = QuantileClip.as_optimizer(make_optimizer("AdamW", "fused", model))
    before = set(optimizer.__dict__)
    scaler = GradScaler("cpu", init_scale=SCALE)
    scaler.scale(loss_of(model, 0)).backward()
    if unscale:
        scaler.unscale_(optimizer)
    gone = optimizer.param_groups[0]["params"].pop()
    with pytest.raises(RuntimeError, match="cannot tell whose"):
        scaler.step(optimizer)
    assert set(optimizer.__dict__) == before
    # So that a step without a scaler is not taken for one with it.
    optimizer.param_groups[0]["params"].append(gone)
    optimizer.zero_grad()
    loss_of(model, 1).backward()
    norms = [p.grad.norm() for p in model.parameters()]
    optimizer.step()
    torch.testing.assert_close(optimizer.clipper.last.norms, torch.stack(norms))


class Unscaling(torch.optim.SGD):
    """The contract that GradScaler deprecates: the step gets the scaler, and unscales itself."""

    _step_supports_amp_scaling = True

    def step(self, closure: Any = None, *, grad_scaler: Any = None) -> None:
        grad_scaler.unscale_(self)
        super().step()


def test_an_optimizer_that_unscales_inside_its_step_is_refused() -> None:
    model = make_model()
    optimizer = QuantileClip.as_optimizer(Unscaling(model.parameters(), lr=0.1))
    scaler = GradScaler("cpu", init_scale=SCALE)
    scaler.scale(loss_of(model, 0)).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        with pytest.raises(RuntimeError, match="grad_scaler"):
            scaler.step(optimizer)
    assert windows(optimizer.clipper) == [[]] * 4


# -- 16 bits -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("global_clipping", [False, True], ids=["each", "global"])
def test_autocast(dtype: torch.dtype, global_clipping: bool) -> None:
    """Attached, and in float16 under a scaler, as by hand: the gradients are float32."""
    results = []
    for attached in (True, False):
        model = make_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        clipper = QuantileClip(model.parameters(), 0.5, global_clipping=global_clipping)
        if attached:
            clipper.attach(optimizer)
        scaler = GradScaler("cpu", init_scale=SCALE, enabled=dtype is torch.float16)
        for step in range(STEPS):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=dtype):
                loss = loss_of(model, step)
            scaler.scale(loss).backward()
            if not attached:
                scaler.unscale_(optimizer)
                clipper.step()
            scaler.step(optimizer)
            scaler.update()
        results.append((weights(model), windows(clipper)))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    assert [len(window) for window in results[0][1]] == [STEPS] * len(results[0][1])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("global_clipping", [False, True], ids=["each", "global"])
def test_a_pure_bfloat16_model(implementation: str, global_clipping: bool) -> None:
    model = make_model().bfloat16()
    optimizer = QuantileClip.as_optimizer(
        make_optimizer("AdamW", implementation, model),
        quantile=0.5,
        global_clipping=global_clipping,
    )
    expected = []
    clipped = False
    for step in range(STEPS):
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(step)
        batch = torch.randn(5, 4, generator=generator) * (1 + step % 3)
        model(batch.bfloat16()).square().mean().backward()
        norms = torch.stack([p.grad.double().norm() for p in model.parameters()])
        expected.append(norms.square().sum()[None].sqrt() if global_clipping else norms)
        optimizer.step()
        assert all(p.grad.dtype is torch.bfloat16 for p in model.parameters())
        last = optimizer.clipper.last
        for i, parameter in enumerate(model.parameters()):
            coefficient = last.coefficients[0 if global_clipping else i].double()
            clipped |= bool(coefficient < 1)
            torch.testing.assert_close(
                parameter.grad.double().norm(), norms[i] * coefficient, rtol=2**-8, atol=0
            )
    assert clipped
    found = torch.tensor(windows(optimizer.clipper), dtype=torch.float64)
    torch.testing.assert_close(found, torch.stack(expected, 1), rtol=1e-3, atol=0)
