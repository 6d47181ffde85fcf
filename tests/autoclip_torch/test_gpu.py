"""On a CUDA device: nothing waits for it, and what comes out is what the CPU would say."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from paths import TensorHistory, kinds_of_history
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import SGD, AdamW

from autoclip.core import History, Quantile
from autoclip.torch import Clipper, QuantileClip, StandardClip

pytestmark = pytest.mark.gpu

each_mode = pytest.mark.parametrize("global_clipping", [False, True], ids=["each", "global"])
CLIPPERS = {"quantile": QuantileClip, "standard": StandardClip}
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever waits for the device in here raises."""
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def parameters(*devices: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    shapes = [(5,), (3, 700), ()]
    return [
        torch.zeros(shape, dtype=dtype, device=device, requires_grad=True)
        for device in devices
        for shape in shapes
    ]


def give(ours: Sequence[Tensor], size: float, seed: int = 0) -> list[float]:
    """Random gradients, made on the CPU; their norms, in float64."""
    generator = torch.Generator().manual_seed(seed)
    norms = []
    for mine in ours:
        wide = torch.complex128 if mine.dtype.is_complex else torch.float64
        gradient = torch.randn(mine.shape, generator=generator, dtype=wide).mul(size).to(mine.dtype)
        norms.append(float(gradient.to(wide).norm()))
        if mine.grad is None:
            mine.grad = gradient.to(mine.device)
        else:
            mine.grad.copy_(gradient)
    return norms


def windows(clipper: Clipper) -> list[list[float]]:
    groups = clipper.export_state().groups
    return [window.tolist() for group in groups for window in group.windows()]


def norms_of(ours: Sequence[Tensor]) -> list[float]:
    wide = [p.grad.to(torch.complex128 if p.is_complex() else torch.float64) for p in ours]  # type: ignore[union-attr]
    return [float(gradient.norm()) for gradient in wide]


# -- waiting -------------------------------------------------------------------------------------


def test_waiting_would_be_noticed() -> None:
    with no_waiting(), pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones((), device="cuda").item()


@pytest.mark.parametrize("on_nonfinite", ["keep", "zero"])
@pytest.mark.parametrize("rule", CLIPPERS)
@each_mode
def test_a_step_does_not_wait(global_clipping: bool, rule: str, on_nonfinite: Any) -> None:
    ours = [p for dtype in DTYPES for p in parameters("cuda", dtype=dtype)]
    clipper = CLIPPERS[rule](
        ours, history_length=4, global_clipping=global_clipping, on_nonfinite=on_nonfinite
    )
    give(ours, 1.0)
    clipper.step()  # here the rows move to the device
    for step in range(6):  # until the window is full, and after
        give(ours, 1.0 + step % 3, seed=step)
        with no_waiting():
            clipper.step()
    assert {len(window) for window in windows(clipper)} == {4}


def test_a_step_with_groups_and_missing_gradients_does_not_wait() -> None:
    ours = parameters("cuda", "cuda")
    clipper = QuantileClip(
        [
            {"params": ours[:2], "history_length": 3},
            {"params": ours[2:4], "history_length": 9, "quantile": 0.1},
            {"params": ours[4:], "history_length": 3},
        ]
    )
    give(ours, 1.0)
    clipper.step()
    ours[1].grad = ours[5].grad = None
    present = [p for p in ours if p.grad is not None]
    give(present, 2.0)
    clipper.step()  # other gradients than before: here a new plan is made and brought to the device
    give(present, 3.0)
    with no_waiting():
        clipper.step()
    assert [len(window) for window in windows(clipper)] == [3, 1, 3, 3, 3, 1]


@each_mode
def test_a_fused_optimizer_under_a_scaler_does_not_wait(global_clipping: bool) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1)).cuda()
    optimizer = QuantileClip.as_optimizer(
        AdamW(model.parameters(), fused=True), global_clipping=global_clipping
    )
    scaler = GradScaler("cuda", init_scale=2.0**10)

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        scaler.scale(model(batch).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()

    batch = torch.randn(8, 16, device="cuda")
    for _ in range(2):
        step()
    with no_waiting():
        for _ in range(3):
            step()
    assert {len(window) for window in windows(optimizer.clipper)} == {5}


# -- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 1000, 2**18 + 7, 40_000_000])
def test_norms_are_within_1e5(dtype: torch.dtype, size: int) -> None:
    weight = torch.zeros(size, dtype=dtype, device="cuda", requires_grad=True)
    generator = torch.Generator("cuda").manual_seed(0)
    wide = torch.complex64 if dtype.is_complex else torch.float32
    weight.grad = torch.randn(size, generator=generator, dtype=wide, device="cuda").to(dtype)
    weight.grad[size // 2] = 1000.0
    widest = torch.complex128 if dtype.is_complex else torch.float64
    expected = float(weight.grad.to(widest).norm())
    clipper = QuantileClip([weight])
    assert clipper.step().item() == pytest.approx(expected, rel=1e-5)
    assert clipper.last.norms.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("rule", CLIPPERS)
@pytest.mark.parametrize("devices", [("cuda",), ("cpu", "cuda"), ("cuda", "cpu")])
@each_mode
def test_the_same_as_on_the_cpu(global_clipping: bool, devices: tuple[str, ...], rule: str) -> None:
    """Also where some parameters are here and some there."""
    ours, theirs = parameters(*devices), parameters(*["cpu"] * len(devices))
    clipper, oracle = (
        CLIPPERS[rule](some, 0.4, 5, global_clipping=global_clipping, warmup_steps=0)
        for some in (ours, theirs)
    )
    clipped = 0
    for step in range(12):
        size = math.nan if step == 7 else (1.0, 4.0, 2.0, 8.0)[step % 4]
        give(ours, size, seed=step)
        give(theirs, size, seed=step)
        total, expected = clipper.step(), oracle.step()
        assert total.device.type == "cuda"
        torch.testing.assert_close(total.cpu(), expected, rtol=1e-5, atol=0, equal_nan=True)
        for name in ("norms", "thresholds", "coefficients"):
            torch.testing.assert_close(
                getattr(clipper.last, name).cpu(),
                getattr(oracle.last, name),
                rtol=1e-5,
                atol=0,
                equal_nan=True,
            )
        for mine, other in zip(ours, theirs):
            assert mine.grad is not None and other.grad is not None
            torch.testing.assert_close(
                mine.grad.cpu(), other.grad, rtol=1e-5, atol=0, equal_nan=True
            )
        clipped += int((oracle.last.coefficients < 1).sum())
    assert clipped
    for found, wanted in zip(windows(clipper), windows(oracle), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5)


@each_mode
def test_a_state_saved_on_a_gpu_loads_on_a_cpu_and_back(global_clipping: bool) -> None:
    ours, theirs = parameters("cuda"), parameters("cpu")
    clipper, other = (
        QuantileClip(some, 0.4, 5, global_clipping=global_clipping) for some in (ours, theirs)
    )
    for step in range(7):
        give(ours, 1.0 + step, seed=step)
        clipper.step()
    state = clipper.state_dict()
    other.load_state_dict(state)
    assert other.state_dict() == state
    clipper.load_state_dict(other.state_dict())
    assert clipper.state_dict() == state
    twin = copy.deepcopy(clipper)
    assert twin.state_dict() == state


@each_mode
def test_parameters_that_move_take_their_history_along(global_clipping: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    clipper = QuantileClip(model.parameters(), 0.5, global_clipping=global_clipping)
    history = History(1 if global_clipping else 4, Quantile(0.5))
    where = ["cpu", "cuda", "cuda", "cpu", "cuda"]
    for step, device in enumerate(where):
        model.to(device)
        model.zero_grad()
        norms = give(list(model.parameters()), 1.0 + step % 3, seed=step)
        clipper.step()
        expected = history.record([math.hypot(*norms)] if global_clipping else norms)
        np.testing.assert_allclose(clipper.last.thresholds.cpu(), expected.thresholds, rtol=1e-5)
        assert kinds_of_history(clipper) == {TensorHistory if device == "cuda" else History}
    assert {len(window) for window in windows(clipper)} == {len(where)}


@pytest.mark.parametrize("choice", ["keep", "zero", "raise"])
@each_mode
def test_on_nonfinite(global_clipping: bool, choice: Any) -> None:
    ours = parameters("cuda")
    clipper = QuantileClip(
        list(zip("abc", ours)), 0.0, global_clipping=global_clipping, on_nonfinite=choice
    )
    give(ours, 1.0)
    clipper.step()
    give(ours, 1.0)
    ours[1].grad[2, 5] = math.inf  # type: ignore[index]
    if choice == "raise":
        with pytest.raises(FloatingPointError, match="gradient of b holds"):
            clipper.step()
    else:
        clipper.step()
    assert bool(ours[1].grad.any()) is (choice != "zero")  # type: ignore[union-attr]
    lengths = [len(window) for window in windows(clipper)]
    if global_clipping:  # what is left of the step after zeroing is recorded
        assert lengths == ([2] if choice == "zero" else [1])
    else:
        assert lengths == ([1, 1, 1] if choice == "raise" else [2, 1, 2])


# -- loss scaling ----------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
@each_mode
def test_a_scaler_records_unscaled_norms_and_skips_overflows(
    global_clipping: bool, fused: bool
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1)).cuda()
    reference = copy.deepcopy(model)
    settings: dict[str, Any] = {"quantile": 0.5, "global_clipping": global_clipping}
    ours = QuantileClip.as_optimizer(
        AdamW(model.parameters(), lr=0.01, eps=1e-2, fused=fused), **settings
    )
    theirs = AdamW(reference.parameters(), lr=0.01, eps=1e-2)
    clipper = QuantileClip(reference.parameters(), **settings)
    scaler = GradScaler("cuda", init_scale=2.0**10)
    for step in range(8):
        batch = torch.randn(8, 16, device="cuda") * (1 + step % 3)
        ours.zero_grad()
        theirs.zero_grad()
        loss = model(batch).square().mean()
        scaler.scale(loss * math.inf if step == 4 else loss).backward()
        scaler.step(ours)
        scaler.update()
        if step != 4:
            reference(batch).square().mean().backward()
            clipper.step()
            theirs.step()
    for mine, other in zip(model.parameters(), reference.parameters()):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)
    for found, wanted in zip(windows(ours.clipper), windows(clipper), strict=True):
        assert len(found) == 7
        np.testing.assert_allclose(found, wanted, rtol=1e-4)


# -- CUDA graphs -----------------------------------------------------------------------------------


def captured(step: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of a step, after one step on a side stream, as torch asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph, result


@pytest.mark.parametrize("rule", CLIPPERS)
@each_mode
def test_a_captured_step_records_and_clips_at_each_replay(global_clipping: bool, rule: str) -> None:
    ours, theirs = parameters("cuda"), parameters("cpu")
    clipper, oracle = (
        CLIPPERS[rule](some, 0.4, 5, global_clipping=global_clipping, warmup_steps=0)
        for some in (ours, theirs)
    )
    give(ours, 1.0)
    give(theirs, 1.0)
    graph, total = captured(clipper.step)
    oracle.step()
    assert {len(window) for window in windows(clipper)} == {1}  # a capture runs nothing
    saved = None
    for step in range(12):
        if step == 8:  # an earlier state, while the graph goes on
            assert saved is not None
            clipper.load_state_dict(saved)
            oracle.load_state_dict(saved)
        size = math.nan if step == 5 else (4.0, 2.0, 8.0, 1.0)[step % 4]
        give(ours, size, seed=step)
        give(theirs, size, seed=step)
        graph.replay()
        expected = oracle.step()
        torch.testing.assert_close(total.cpu(), expected, rtol=1e-5, atol=0, equal_nan=True)
        for name in ("thresholds", "coefficients"):
            torch.testing.assert_close(
                getattr(clipper.last, name).cpu(), getattr(oracle.last, name), rtol=1e-5, atol=0
            )
        for mine, other in zip(ours, theirs):
            assert mine.grad is not None and other.grad is not None
            torch.testing.assert_close(
                mine.grad.cpu(), other.grad, rtol=1e-5, atol=0, equal_nan=True
            )
        if step == 3:
            saved = clipper.state_dict()
    for found, wanted in zip(windows(clipper), windows(oracle), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_an_attached_optimizer_is_captured_as_a_whole() -> None:
    weight = torch.zeros(4, device="cuda", requires_grad=True)
    weight.grad = torch.ones(4, device="cuda")
    optimizer = QuantileClip.as_optimizer(SGD([weight], lr=1.0), quantile=0.0)
    graph, _ = captured(optimizer.step)
    with torch.no_grad():
        weight.zero_()
    weight.grad.fill_(5.0)  # clipped to the smallest norm, 2, so ones again
    graph.replay()
    torch.testing.assert_close(weight.detach(), torch.full((4,), -1.0, device="cuda"))


def test_a_history_too_long_to_be_allocated_at_once_is_not_captured() -> None:
    weight = torch.zeros(4, device="cuda", requires_grad=True)
    weight.grad = torch.ones(4, device="cuda")
    clipper = QuantileClip([weight], history_length=2**25)
    with pytest.raises(RuntimeError, match="CUDA graph"):
        captured(clipper.step)


# -- launches --------------------------------------------------------------------------------------


def launches(count: int, global_clipping: bool) -> int:
    ours = [torch.zeros(50, device="cuda", requires_grad=True) for _ in range(count)]
    clipper = QuantileClip(ours, global_clipping=global_clipping)
    give(ours, 1.0)
    clipper.step()
    give(ours, 1.0)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        clipper.step()
        torch.cuda.synchronize()
    cuda = torch.autograd.DeviceType.CUDA
    return sum(event.device_type == cuda for event in profile.events())


@each_mode
def test_launches_do_not_grow_with_the_number_of_small_parameters(global_clipping: bool) -> None:
    few, many = launches(20, global_clipping), launches(200, global_clipping)
    assert few > 0
    # A foreach operation is a launch for each few dozen tensors.
    assert many - few < 20
