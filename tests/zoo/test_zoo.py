"""Every optimizer class of eight libraries: clipped as NumPy clips, its state there and back."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from autoclip.torch import QuantileClip

sys.path.append(str(Path(__file__).parent))

from zoo import (
    BY_CLOSURE,
    CURVATURE,
    INSIDE,
    LIBRARIES,
    ZOO,
    cannot,
    make,
    parameters,
    to_train_mode,
)

QUANTILE, LENGTH, STEPS = 0.5, 4, 6
torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore")


class Run:
    """An optimizer, with or without a clipper; its gradients before and after clipping."""

    def __init__(self, name: str, clips: bool = True) -> None:
        self.name = name
        self.parameters = parameters(name)
        self.optimizer = make(name, self.parameters)
        self.found: list[list[Tensor]] = []
        self.clipped: list[list[Tensor]] = []
        inside = INSIDE.get(name)
        self.attached = getattr(self.optimizer, inside) if inside else self.optimizer
        if clips:
            QuantileClip.as_optimizer(self.attached, quantile=QUANTILE, history_length=LENGTH)
            self.attached.register_step_pre_hook(self._after)  # behind the clipper's own hook

    def closure(self, step: int) -> Callable[[], Tensor]:
        def run() -> Tensor:
            generator = torch.Generator().manual_seed(step)
            scale = [1.0, 5.0, 0.2][step % 3]
            loss = torch.zeros(())
            for parameter in self.parameters:
                parameter.grad = None
                noise = torch.randn(parameter.shape, generator=generator)
                loss = loss + scale * (noise * parameter).sum() + 1e-3 * (parameter**2).sum()
            loss.backward(create_graph=self.name in CURVATURE)
            self.found.append(self.gradients())
            return loss

        return torch.enable_grad()(run)

    def gradients(self) -> list[Tensor]:
        """In the order of the optimizer's groups."""
        groups = self.attached.param_groups
        return [p.grad.detach().clone() for group in groups for p in group["params"]]

    def _after(self, optimizer: Any, args: Any, kwargs: Any) -> Any:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            if len(self.clipped) < len(self.found):  # not of a step inside a step
                self.clipped.append(self.gradients())
            return None

        def inner() -> Any:
            loss = closure()
            self.clipped.append(self.gradients())
            return loss

        rest = {key: value for key, value in kwargs.items() if key != "closure"}
        return (args[0], inner, *args[2:]), rest

    def step(self, step: int) -> None:
        torch.manual_seed(step)
        if self.name in BY_CLOSURE:
            self.optimizer.step(self.closure(step))
        else:
            self.closure(step)()
            self.optimizer.step()

    def weights(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.parameters])

    @property
    def clipper(self) -> Any:
        return self.attached.clipper


def resume(name: str, clips: bool) -> tuple[Run, Run]:
    """A run, and one that has loaded its state, both some steps later."""
    one = Run(name, clips)
    for step in range(STEPS):
        one.step(step)
    other = Run(name, clips)
    with torch.no_grad():
        for old, new in zip(one.parameters, other.parameters):
            new.copy_(old)
    other.attached.load_state_dict(copy.deepcopy(one.attached.state_dict()))
    if clips:
        assert other.clipper.state_dict() == one.clipper.state_dict()
    to_train_mode(other.optimizer)
    for step in range(STEPS, STEPS + 2):
        one.step(step)
        other.step(step)
    return one, other


def able(names: Any) -> list[str]:
    return sorted(name for name in names if not cannot(name))


def test_every_library_is_here() -> None:
    counts = {library: sum(name.startswith(library) for name in ZOO) for library in LIBRARIES}
    print(counts, len(able(ZOO)), "of", len(ZOO))
    assert all(counts.values())


@pytest.mark.parametrize("name", able(ZOO))
def test_clips_as_numpy(name: str) -> None:
    run = Run(name)
    windows: list[list[float]] = [[] for _ in run.parameters]
    for step in range(STEPS):
        run.step(step)
        last = run.clipper.last
        assert len(run.found) == len(run.clipped)
        for found, clipped in zip(run.found, run.clipped):
            for row, (gradient, result) in enumerate(zip(found, clipped)):
                norm = float(np.linalg.norm(gradient.double().numpy()))
                windows[row] = [*windows[row], norm][-LENGTH:]
                threshold = np.quantile(windows[row], QUANTILE)
                expected = gradient * min(1.0, threshold / norm)
                torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6 * norm)
        run.found, run.clipped = [], []
        np.testing.assert_allclose(last.norms.numpy(), [w[-1] for w in windows], rtol=1e-5)
        thresholds = [np.quantile(window, QUANTILE) for window in windows]
        np.testing.assert_allclose(last.thresholds.numpy(), thresholds, rtol=1e-5)
    state = [w.tolist() for group in run.clipper.export_state().groups for w in group.windows()]
    np.testing.assert_allclose(state, windows, rtol=1e-5)


@pytest.mark.parametrize("name", able(ZOO))
def test_state_there_and_back(name: str) -> None:
    one, other = resume(name, clips=True)
    assert other.clipper.last.names == one.clipper.last.names
    plain, again = resume(name, clips=False)
    if torch.equal(plain.weights(), again.weights()):  # the class itself resumes exactly
        assert torch.equal(one.weights(), other.weights())
        assert one.clipper.state_dict() == other.clipper.state_dict()


@pytest.mark.parametrize("name", INSIDE)
def test_wrappers_without_hooks_say_where_to_attach(name: str) -> None:
    with pytest.raises(TypeError, match=rf"attribute `\.{INSIDE[name]}`"):
        QuantileClip.as_optimizer(Run(name, clips=False).optimizer)


@pytest.mark.parametrize("name", able(ZOO))
def test_factory(name: str) -> None:
    """A subclass, whatever the class does when it is subclassed."""
    kind = ZOO[name]
    factory = QuantileClip.optimizer_factory(kind, quantile=QUANTILE)
    assert issubclass(factory, kind) and factory.__name__ == kind.__name__


@pytest.mark.parametrize("name", sorted(name for name in ZOO if cannot(name)))
def test_cannot_without_a_clipper_either(name: str) -> None:
    with pytest.raises(Exception, match=r"."):
        Run(name, clips=False).step(0)
