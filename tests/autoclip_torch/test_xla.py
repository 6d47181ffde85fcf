"""On PyTorch/XLA: nothing runs on the host, and what comes out is what the CPU would say.

XLA's own CPU device will do: tensors are lazy there, a step is compiled, and each operation that
falls back to the host is counted. Run by `hatch run xla:test`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from rules import MODES
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import SGD, AdamW

from autoclip.core import Rule
from autoclip.torch import Clipper, QuantileClip, StandardClip

torch_xla = pytest.importorskip("torch_xla", reason="needs PyTorch/XLA: hatch run xla:test")
metrics: Any = pytest.importorskip("torch_xla.debug.metrics")

each_mode = pytest.mark.parametrize("mode", MODES)
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]
SHAPES = [(5,), (3, 700), (), (300, 300)]


@dataclass(frozen=True)
class Largest(Rule):
    """A rule of a user: a part of the largest norm in the window."""

    part: float = 0.5
    name: ClassVar[str] = "largest-part-on-xla"

    @staticmethod
    def threshold(window: Any, part: Any) -> Any:
        return part * window.quantile(1.0)


Make = Callable[..., Clipper]
CLIPPERS: dict[str, Make] = {
    "quantile": lambda some, **s: QuantileClip(some, 0.4, 5, **s),
    "standard": lambda some, **s: StandardClip(some, 0.5, 5, warmup_steps=0, **s),
    "decay": lambda some, **s: StandardClip(some, 0.5, 5, warmup_steps=2, decay=0.9, **s),
    "shrink": lambda some, **s: StandardClip(some, 0.5, 5, warmup_steps=0, shrink=True, **s),
    "past only": lambda some, **s: QuantileClip(some, 0.4, 5, include_current=False, **s),
    "records clipped": lambda some, **s: StandardClip(
        some, 0.5, 5, warmup_steps=1, record="clipped", **s
    ),
    "ceiling": lambda some, **s: QuantileClip(some, 0.4, 5, max_norm=40.0, warmup_steps=3, **s),
    "factor": lambda some, **s: QuantileClip(some, 0.4, 5, factor=0.7, **s),
    "zeroes spikes": lambda some, **s: QuantileClip(some, 0.4, 5, on_spike="zero", **s),
    "zeroes NaN": lambda some, **s: QuantileClip(some, 0.4, 5, on_nonfinite="zero", **s),
    "own rule": lambda some, **s: Clipper(some, Largest(), 5, **s),
}
# Rules in every mode, settings in one: each combination is compiled, which takes seconds.
each_clipper = pytest.mark.parametrize(
    ("make", "mode"),
    [
        pytest.param(make, mode, id=f"{name}-{mode}")
        for k, (name, make) in enumerate(CLIPPERS.items())
        for mode in (MODES if name in ("quantile", "standard") else [[*MODES][k % 3]])
    ],
)


def xla() -> torch.device:
    device: torch.device = torch_xla.device()
    return device


def counted(name: str) -> int:
    return metrics.counter_value(name) or 0


def sync() -> None:
    torch_xla.sync(wait=True)


class Costs:
    """XLA's work inside a `with` block, and once more at its end.

    Attributes:
        compilations: how many programs were compiled.
        executions: how many were run.
        transfers: how many tensors came from the host.
        fallbacks: how often each operation ran on the host; `item` is one.
    """

    def __enter__(self) -> Costs:
        sync()
        metrics.clear_all()
        return self

    def __exit__(self, *exception: object) -> None:
        sync()
        self.compilations = counted("UncachedCompile")
        self.executions = counted("ExecuteComputation")
        sent = metrics.metric_data("OutboundData")
        self.transfers = sent[0] if sent else 0
        self.fallbacks = {
            name: counted(name) for name in metrics.counter_names() if name.startswith("aten::")
        }


def parameters(
    device: Any,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    shapes: Sequence[tuple[int, ...]] = SHAPES,
) -> list[Tensor]:
    return [
        torch.zeros(shape, dtype=dtype, device=device, requires_grad=True)
        for dtype in dtypes
        for shape in shapes
    ]


def draw(some: Sequence[Tensor], size: float, seed: int) -> list[Tensor]:
    """Random gradients, made on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    gradients = []
    for one in some:
        wide = torch.complex128 if one.dtype.is_complex else torch.float64
        gradient = torch.randn(one.shape, generator=generator, dtype=wide).mul(size)
        gradients.append(gradient.to(one.dtype))
    return gradients


def give(some: Sequence[Tensor], size: float, seed: int = 0) -> None:
    for one, gradient in zip(some, draw(some, size, seed)):
        one.grad = gradient.to(one.device)


def halves(some: Sequence[Tensor]) -> list[dict[str, Any]]:
    return [{"params": [*some[::2]]}, {"params": [*some[1::2]]}]


def windows(clipper: Clipper) -> list[list[float]]:
    groups = clipper.export_state().groups
    return [window.tolist() for group in groups for window in group.windows()]


def assert_same_step(
    clipper: Clipper, oracle: Clipper, ours: Sequence[Tensor], theirs: Sequence[Tensor]
) -> None:
    """Take a step of both; a clipper on XLA says what one on the CPU says."""
    close: dict[str, Any] = {"rtol": 1e-5, "atol": 0, "equal_nan": True}
    sync()
    total = clipper.step()
    sync()  # the whole step as one program, not a part of it for each number that is read
    torch.testing.assert_close(total.cpu(), oracle.step(), **close)
    for name in ("norms", "thresholds", "coefficients"):
        found, expected = getattr(clipper.last, name), getattr(oracle.last, name)
        torch.testing.assert_close(found.cpu(), expected, **close)
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine.grad is None) is (other.grad is None)
        if mine.grad is not None and other.grad is not None:
            rtol = 1e-2 if mine.dtype.itemsize == 2 else 1e-5
            torch.testing.assert_close(
                mine.grad.cpu(), other.grad, rtol=rtol, atol=0, equal_nan=True
            )


# -- costs ---------------------------------------------------------------------------------------


def test_what_runs_on_the_host_would_be_noticed() -> None:
    values = torch.ones(3).to(xla())
    with Costs() as costs:
        values.repeat_interleave(torch.tensor([1, 2, 3]).to(xla()), output_size=6)
        values.sum().item()
    assert {"aten::repeat_interleave.Tensor", "aten::_local_scalar_dense"} <= set(costs.fallbacks)
    with Costs() as costs:
        values.mul_(1.23456)
    assert costs.fallbacks == {} and costs.compilations == costs.executions == 1


@each_clipper
def test_a_step_is_one_program_that_is_compiled_once(mode: str, make: Make) -> None:
    ours = [*parameters(xla()), *parameters(xla(), DTYPES, [(), (3, 7)])]
    optimizer = SGD(halves(ours), lr=0.125)
    make(halves(ours), **MODES[mode]).attach(optimizer)
    gradients = [[g.to(xla()) for g in draw(ours, 1.0 + k, seed=k)] for k in range(3)]
    for step in range(14):
        for mine, gradient in zip(ours, gradients[step % 3]):
            mine.grad = gradient.clone()
        with Costs() as costs:
            optimizer.step()
        assert costs.fallbacks == {}
        assert costs.executions == 1  # as of the optimizer alone
        if step >= 8:  # the windows are full
            assert costs.compilations == costs.transfers == 0
    assert {len(window) for window in windows(optimizer.clipper)} == {5}  # type: ignore[attr-defined]


def test_a_step_with_groups_and_missing_gradients() -> None:
    ours, theirs = parameters(xla()), parameters("cpu")
    clipper, oracle = (
        QuantileClip(
            [
                {"params": some[:2], "history_length": 3},
                {"params": some[2:3], "history_length": 9, "quantile": 0.1},
                {"params": some[3:], "history_length": 3},
            ]
        )
        for some in (ours, theirs)
    )
    for step in range(12):
        for some in (ours, theirs):
            give(some, 1.0 + step % 3, seed=step)
            if step > 5:
                some[1].grad = None
        assert_same_step(clipper, oracle, ours, theirs)
        if step > 8:
            give(ours, 2.0)
            give(theirs, 2.0)
            ours[1].grad = theirs[1].grad = None
            with Costs() as costs:
                clipper.step()
            oracle.step()
            assert costs.fallbacks == {}
    assert [len(window) for window in windows(clipper)] == [3, 3, 9, 3]


@each_mode
def test_parameters_that_come_later(mode: str) -> None:
    ours, theirs = parameters(xla()), parameters("cpu")
    clippers = []
    for some in (ours, theirs):
        optimizer = SGD(some[:3], lr=0.0)
        clippers.append(QuantileClip.as_optimizer(optimizer, quantile=0.4, **MODES[mode]))
    for step in range(16):
        if step == 6:
            for optimizer, some in zip(clippers, (ours, theirs)):
                optimizer.add_param_group({"params": some[3:]})
        for some in (ours, theirs):
            give(some, 1.0 + step % 3, seed=step)
        with Costs() as costs:
            clippers[0].step()
        clippers[1].step()
        assert costs.fallbacks == {}
        assert costs.executions == 1 or step in (0, 6)
        assert costs.compilations == 0 or step % 6 < 5
    for mine, other in zip(ours, theirs):
        torch.testing.assert_close(mine.grad.cpu(), other.grad, rtol=1e-5, atol=0)  # type: ignore[union-attr]
    for found, expected in zip(windows(clippers[0].clipper), windows(clippers[1].clipper)):  # type: ignore[attr-defined]
        np.testing.assert_allclose(found, expected, rtol=1e-6)


@each_mode
def test_a_history_that_grows(mode: str) -> None:
    """Compiled again for each of its sizes, 16, 32 and 64 norms, and at no other step."""
    ours, theirs = parameters(xla()), parameters("cpu")
    clipper, oracle = (QuantileClip(some, 0.4, 2**25, **MODES[mode]) for some in (ours, theirs))
    compilations = []
    for step in range(40):
        give(ours, 1.0 + step % 3, seed=step)
        give(theirs, 1.0 + step % 3, seed=step)
        with Costs() as costs:
            clipper.step()
        oracle.step()
        assert costs.fallbacks == {}
        compilations.append(costs.compilations)
    quiet = [*range(8, 16), *range(20, 32), *range(36, 40)]
    assert [compilations[step] for step in quiet] == [0] * len(quiet)
    assert sum(compilations[16:20]) > 0 and sum(compilations[32:36]) > 0
    for found, expected in zip(windows(clipper), windows(oracle), strict=True):
        assert len(found) == 40
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    torch.testing.assert_close(clipper.thresholds.cpu(), oracle.thresholds, rtol=1e-5, atol=0)


# -- numbers -------------------------------------------------------------------------------------


@each_clipper
def test_the_same_as_on_the_cpu(mode: str, make: Make) -> None:
    ours, theirs = parameters(xla()), parameters("cpu")
    clipper, oracle = (make(halves(some), **MODES[mode]) for some in (ours, theirs))
    clipped = 0
    for step in range(12):
        for some in (ours, theirs):
            give(some, (1.0, 4.0, 2.0, 8.0)[step % 4], seed=step)
            if step == 7:
                some[1].grad[2, 5] = math.nan  # type: ignore[index]
        assert_same_step(clipper, oracle, ours, theirs)
        clipped += int((oracle.last.coefficients < 1).sum())
    assert clipped
    for found, expected in zip(windows(clipper), windows(oracle), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("order", [("cpu", "xla"), ("xla", "cpu")])
@each_mode
def test_some_parameters_on_the_cpu(mode: str, order: tuple[str, str]) -> None:
    """Also of one group, whose coefficient both devices apply to their own gradients alone."""
    devices = [xla() if name == "xla" else torch.device("cpu") for name in order]
    ours = [p for device in devices for p in parameters(device)]
    theirs = [p for _ in devices for p in parameters("cpu")]
    clipper, oracle = (QuantileClip(halves(some), 0.4, 5, **MODES[mode]) for some in (ours, theirs))
    for step in range(8):
        give(ours, 1.0 + step % 4, seed=step)
        give(theirs, 1.0 + step % 4, seed=step)
        assert_same_step(clipper, oracle, ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@each_mode
def test_every_dtype(mode: str, dtype: torch.dtype) -> None:
    ours, theirs = parameters(xla(), [dtype]), parameters("cpu", [dtype])
    clipper, oracle = (QuantileClip(some, 0.4, 5, **MODES[mode]) for some in (ours, theirs))
    for step in range(6):
        give(ours, 1.0 + step % 3, seed=step)
        give(theirs, 1.0 + step % 3, seed=step)
        assert_same_step(clipper, oracle, ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_gradients_are_multiplied_in_float32(dtype: torch.dtype) -> None:
    values = torch.linspace(-3.0, 3.0, 1001).to(dtype)
    scalar = torch.tensor(1.5703125).to(dtype)
    ours = [torch.zeros_like(v, requires_grad=True, device=xla()) for v in (values, scalar)]
    clipper = QuantileClip(ours, 0.0)
    for factor in (0.337, 1.0):
        for mine, value in zip(ours, (values, scalar)):
            mine.grad = (value.float() * factor).to(dtype).to(xla())
        clipper.step()
    for mine, value, coefficient in zip(ours, (values, scalar), clipper.last.coefficients.cpu()):
        assert mine.grad is not None and coefficient < 0.5
        assert torch.equal(mine.grad.cpu(), (value.float() * coefficient).to(dtype))


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float32, 1e-37),
        (torch.float32, 1e-23),
        (torch.float32, 1e19),
        (torch.float32, 1e36),
        (torch.bfloat16, 1e36),
        (torch.float16, 6e-5),
        (torch.float16, 6e4),
        (torch.complex64, 1e36),
    ],
)
def test_norms_of_tiny_and_huge_elements(dtype: torch.dtype, size: float) -> None:
    """XLA itself squares in the gradient's dtype."""
    gradient = torch.full((1000,), size).to(dtype)
    weight = torch.zeros(1000, dtype=dtype, device=xla(), requires_grad=True)
    weight.grad = gradient.to(xla())
    clipper = QuantileClip([weight])
    wide = torch.complex128 if dtype.is_complex else torch.float64
    expected = pytest.approx(float(gradient.to(wide).norm()), rel=1e-5, abs=0)
    assert float(clipper.step()) == expected
    assert float(clipper.last.norms) == expected


# -- spikes, NaN and infinity --------------------------------------------------------------------


@pytest.mark.parametrize("choice", ["zero", "skip"])
@each_mode
def test_on_spike(mode: str, choice: Any) -> None:
    ours, theirs = parameters(xla()), parameters("cpu")
    optimizers = []
    for some in (ours, theirs):
        optimizer = AdamW(halves(some), lr=0.1)
        optimizers.append(
            QuantileClip.as_optimizer(optimizer, quantile=0.5, on_spike=choice, **MODES[mode])
        )
    for step in range(8):
        for optimizer, some in zip(optimizers, (ours, theirs)):
            give(some, 9.0 if step in (3, 6) else 1.0 + step / 10, seed=step)
            sync()
            optimizer.step()
            sync()
        for mine, other in zip(ours, theirs):
            torch.testing.assert_close(mine.detach().cpu(), other.detach(), rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(mine.grad.cpu(), other.grad, rtol=1e-5, atol=0)  # type: ignore[union-attr]


@pytest.mark.parametrize("choice", ["keep", "zero", "raise"])
@each_mode
def test_on_nonfinite(mode: str, choice: Any) -> None:
    ours = parameters(xla())
    clipper = QuantileClip(list(zip("abcd", ours)), 0.0, on_nonfinite=choice, **MODES[mode])
    give(ours, 1.0)
    clipper.step()
    give(ours, 1.0)
    broken = draw(ours, 1.0, 0)[1]
    broken[2, 5] = math.inf
    ours[1].grad = broken.to(xla())
    if choice == "raise":
        with pytest.raises(FloatingPointError, match="gradient of b holds"):
            clipper.step()
    else:
        clipper.step()
    assert bool(ours[1].grad.any()) is (choice != "zero")
    lengths = [len(window) for window in windows(clipper)]
    if mode == "parameter":
        assert lengths == ([1] * 4 if choice == "raise" else [2, 1, 2, 2])
    else:  # what is left of the step after zeroing is recorded
        assert lengths == ([2] if choice == "zero" else [1])


@each_mode
def test_gradients_that_share_memory(mode: str) -> None:
    """XLA itself writes to an expanded tensor by adding up."""
    ours = [torch.ones(4, device=xla(), requires_grad=True) for _ in range(2)]
    ours.append(torch.ones(2, 2, device=xla(), requires_grad=True))
    clipper = QuantileClip(ours, 0.0, **MODES[mode])
    for scale in (1.0, 8.0):
        loss = (ours[0] + ours[1] + ours[2].view(-1)).sum() * scale
        for mine, gradient in zip(ours, torch.autograd.grad(loss, ours)):
            mine.grad = gradient
        clipper.step()
    for mine in ours:
        torch.testing.assert_close(mine.grad.cpu(), torch.ones(mine.shape))  # type: ignore[union-attr]


def test_lazily_negated_gradients() -> None:
    ours = [torch.zeros(6, device=xla(), requires_grad=True) for _ in range(2)]
    clipper = QuantileClip(ours, 0.0)
    for size in (1.0, 8.0):
        number = torch.complex(torch.zeros(6), torch.full((6,), size))
        ours[0].grad = number.to(xla()).conj().imag
        ours[1].grad = torch._neg_view(torch.full((6,), size).to(xla()))
        clipper.step()
    for mine in ours:
        torch.testing.assert_close(mine.grad.cpu().resolve_neg(), torch.full((6,), -1.0))  # type: ignore[union-attr]


# -- mixed precision -------------------------------------------------------------------------------


def model_and_optimizer(device: torch.device, mode: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1)).to(device)
    optimizer = AdamW(model.parameters(), lr=0.01, eps=1e-2)
    return model, QuantileClip.as_optimizer(optimizer, quantile=0.5, **MODES[mode])


@each_mode
def test_a_grad_scaler(mode: str) -> None:
    """It waits for the device at each step, with and without a clipper."""
    results = []
    for device in (xla(), torch.device("cpu")):
        model, optimizer = model_and_optimizer(device, mode)
        scaler = GradScaler(device.type, init_scale=2.0**10)
        generator = torch.Generator().manual_seed(1)
        for step in range(8):
            batch = (torch.randn(8, 16, generator=generator) * (1 + step % 3)).to(device)
            optimizer.zero_grad()
            loss = model(batch).square().mean()
            scaler.scale(loss * math.inf if step == 4 else loss).backward()
            scaler.step(optimizer)
            scaler.update()
            sync()
        trained = [p.detach().cpu() for p in model.parameters()]
        results.append((trained, windows(optimizer.clipper)))
    (trained, ours), (expected, theirs) = results
    assert {len(window) for window in ours} == {7}
    torch.testing.assert_close(trained, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)


@each_mode
def test_autocast_to_bfloat16(mode: str) -> None:
    model, optimizer = model_and_optimizer(xla(), mode)
    generator = torch.Generator().manual_seed(1)
    expected = []
    for step in range(6):
        batch = (torch.randn(8, 16, generator=generator) * (1 + step % 3)).to(xla())
        optimizer.zero_grad()
        with torch.autocast("xla", dtype=torch.bfloat16):
            output = model(batch)
            assert output.dtype is torch.bfloat16
            loss = output.square().mean()
        loss.backward()
        sync()
        norms = [float(p.grad.cpu().double().norm()) for p in model.parameters()]  # type: ignore[union-attr]
        expected.append(norms if mode == "parameter" else [math.hypot(*norms)])
        with Costs() as costs:
            optimizer.step()
        assert costs.fallbacks == {}
    np.testing.assert_allclose(windows(optimizer.clipper), np.transpose(expected), rtol=1e-5)


# -- states ----------------------------------------------------------------------------------------


@each_clipper
def test_a_state_saved_on_xla_loads_on_the_cpu_and_back(
    mode: str, make: Make, tmp_path: Any
) -> None:
    ours, theirs = parameters(xla()), parameters("cpu")
    clipper, other = (make(some, **MODES[mode]) for some in (ours, theirs))
    for step in range(7):
        give(ours, 1.0 + step, seed=step)
        clipper.step()
    state = clipper.state_dict()
    other.load_state_dict(state)
    assert other.state_dict() == state
    other.save(tmp_path / "history.autoclip")
    clipper.reset()
    clipper.load(tmp_path / "history.autoclip")
    assert clipper.state_dict() == state
    assert copy.deepcopy(clipper).state_dict() == state
    for step in range(7, 10):
        give(ours, 1.0 + step % 2, seed=step)
        give(theirs, 1.0 + step % 2, seed=step)
        assert_same_step(clipper, other, ours, theirs)


@each_mode
def test_an_optimizers_checkpoint(mode: str) -> None:
    ours = parameters(xla())
    optimizer = QuantileClip.as_optimizer(AdamW(ours), quantile=0.4, **MODES[mode])
    for step in range(4):
        give(ours, 1.0 + step % 3, seed=step)
        optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    assert saved["autoclip"] == optimizer.clipper.state_dict()  # type: ignore[attr-defined]
    again = parameters(xla())
    resumed = QuantileClip.as_optimizer(AdamW(again), quantile=0.4, **MODES[mode])
    resumed.load_state_dict(saved)
    assert windows(resumed.clipper) == windows(optimizer.clipper)  # type: ignore[attr-defined]
    for one, some in ((optimizer, ours), (resumed, again)):
        give(some, 9.0, seed=5)
        one.step()
    for mine, other in zip(ours, again):
        assert mine.grad is not None and other.grad is not None
        assert torch.equal(mine.grad.cpu(), other.grad.cpu())


@each_mode
def test_a_model_that_moves_takes_its_history_along(mode: str) -> None:
    """`Module.to` makes new parameters for XLA; an optimizer has to be given them."""
    models = [nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)) for _ in range(2)]
    optimizers = [
        QuantileClip.as_optimizer(SGD(model.parameters(), lr=0.0), quantile=0.5, **MODES[mode])
        for model in models
    ]
    for step, device in enumerate(["cpu", xla(), xla(), "cpu", xla()]):
        models[0].to(device)
        optimizers[0].param_groups[0]["params"] = [*models[0].parameters()]
        for model, optimizer in zip(models, optimizers):
            give([*model.parameters()], 1.0 + step % 3, seed=step)
            optimizer.step()
        for mine, other in zip(models[0].parameters(), models[1].parameters()):
            torch.testing.assert_close(mine.grad.cpu(), other.grad, rtol=1e-5, atol=0)  # type: ignore[union-attr]
    found, expected = (windows(optimizer.clipper) for optimizer in optimizers)  # type: ignore[attr-defined]
    assert {len(window) for window in found} == {5}
    np.testing.assert_allclose(found, expected, rtol=1e-6)


# -- documentation -------------------------------------------------------------------------------


def test_the_example_of_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where its files go
    tests = Path(__file__).parents[1]
    monkeypatch.syspath_prepend(tests / "docs")
    from pages import run_page

    run_page(str(tests.parent / "docs" / "torch.md"), needs="torch_xla")
