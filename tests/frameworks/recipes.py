"""Runs the recipes of docs/frameworks.md, and watches every step of the optimizers that clip."""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests" / "docs"))

from pages import blocks_of  # noqa: E402

PAGE = ROOT / "docs" / "frameworks.md"


def run_recipe(name: str, **given: Any) -> dict[str, Any]:
    """Run the page's blocks of a recipe, after those that are no recipe's.

    Args:
        name: of the recipe, as in `<!-- recipe: name -->`. `sb3-ppo` begins with the blocks of
            `sb3`, if there are any.
        given: what a reader of the recipe has already, such as `model`.

    Returns:
        All names that exist then.
    """
    blocks = blocks_of(PAGE)
    assert any(block.recipe == name for block in blocks), f"{PAGE} has no recipe {name}"
    namespace: dict[str, Any] = {"__name__": "recipe"}
    for block in blocks:
        if block.recipe in ("", name, name.split("-")[0]) and not block.not_run:
            namespace.update(given if block.recipe else {})
            given = {} if block.recipe else given
            source = "\n" * block.line + block.code
            exec(compile(source, PAGE, "exec", dont_inherit=True), namespace)
    return namespace


class Watch:
    """Compares each step of each optimizer that has a clipper with NumPy, by torch's global hooks.

    * The gradients that a step finds are those that the backward pass left, bit for bit: nothing
      has clipped or scaled them since. Checked from an optimizer's second step on.
    * Norms, thresholds and clipped gradients are those of `QuantileClip`, computed by NumPy.

    Args:
        quantile: of the clippers.
        history_length: of the clippers.
        left_alone: whether the first of these is checked; False where the framework averages
            accumulated gradients.

    Attributes:
        norms: of each optimizer, the norms of each row at each step; NaN where it recorded none.
        clipped: how many gradients were clipped.
    """

    def __init__(
        self, quantile: float, history_length: int = 1000, left_alone: bool = True
    ) -> None:
        self.left_alone = left_alone
        self.quantile = quantile
        self.history_length = history_length
        self.norms: dict[Optimizer, list[np.ndarray]] = defaultdict(list)
        self.clipped = 0
        self._windows: dict[Optimizer, dict[int, list[float]]] = {}
        self._left: dict[torch.Tensor, torch.Tensor] = {}
        self._before: dict[torch.Tensor, torch.Tensor] = {}

    def __enter__(self) -> Watch:
        self._hooks = [
            register_optimizer_step_pre_hook(self._pre),
            register_optimizer_step_post_hook(self._post),
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _pre(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not hasattr(optimizer, "clipper"):
            return
        parameters = parameters_of(optimizer)
        if optimizer not in self._windows:
            self._windows[optimizer] = windows_of(optimizer)
            for parameter in parameters:
                if parameter.requires_grad:
                    hook = parameter.register_post_accumulate_grad_hook(self._keep)
                    self._hooks.append(hook)
        self._before = {}
        if any(callable(each) for each in (*args[1:], *kwargs.values())):
            self._left = self._before  # the closure computes the gradients, and then clips them
            return
        for parameter in parameters:
            if parameter.grad is not None:
                self._before[parameter] = parameter.grad.detach().clone()
                left = self._left.pop(parameter, parameter.grad)
                if self.left_alone:
                    assert torch.equal(left, parameter.grad), "something changed the gradient"

    def _keep(self, parameter: torch.Tensor) -> None:
        if parameter.grad is not None:  # else a hook before this one has made the step
            self._left[parameter] = parameter.grad.detach().clone()

    def _post(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not hasattr(optimizer, "clipper"):
            return
        self._left = {}
        parameters = parameters_of(optimizer)
        is_global = optimizer.clipper.global_clipping
        rows = [parameters] if is_global else [[parameter] for parameter in parameters]
        last = optimizer.clipper.last
        assert len(last.norms) == len(rows)
        norms = np.full(len(rows), np.nan)
        for row, members in enumerate(rows):
            found = [self._before[p] for p in members if p in self._before]
            squares = [float((gradient.double() ** 2).sum()) for gradient in found]
            norm = float(np.sqrt(np.sum(squares)))
            np.testing.assert_allclose(float(last.norms[row]), norm, rtol=1e-5)
            if norm < np.finfo(np.float32).tiny:
                continue
            norms[row] = norm
            window = self._windows[optimizer].setdefault(row, [])
            window.append(norm)
            del window[: -self.history_length]
            threshold = np.quantile(window, self.quantile)
            np.testing.assert_allclose(float(last.thresholds[row]), threshold, rtol=1e-5)
            coefficient = min(1.0, threshold / norm)
            self.clipped += coefficient < 1
            for parameter in members:
                if parameter in self._before and parameter.grad is not None:
                    torch.testing.assert_close(
                        parameter.grad.double(),
                        self._before[parameter].double() * coefficient,
                        rtol=1e-4,
                        atol=1e-6 * norm,
                    )
        self.norms[optimizer].append(norms)

    def steps(self) -> list[int]:
        """The number of steps of each optimizer, in the order of their first ones.

        Each history has exactly one norm of each step in which its row had a gradient.
        """
        for optimizer in self.norms:
            lengths = [len(window) for window in windows_of(optimizer).values()]
            expected = [len(window) for _, window in sorted(self._windows[optimizer].items())]
            assert lengths == [n for n in expected if n]
        return [len(norms) for norms in self.norms.values()]


def parameters_of(optimizer: Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def windows_of(optimizer: Optimizer) -> dict[int, list[float]]:
    """The recorded norms of each row, read from the clipper's public state."""
    groups = optimizer.clipper.export_state().groups  # type: ignore[attr-defined]
    windows = [window.tolist() for group in groups for window in group.windows()]
    return {row: window for row, window in enumerate(windows) if window}


def weights(module: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten().double() for p in module.parameters()])
