"""Gradients of a model's shapes that differ at each step, for the benchmarks in PyTorch."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import torch
from measure import factors
from shapes import MODELS

__all__ = ["CASES", "Gradients", "add_torch_options"]

# By how much the norms of a case exceed those in the histories. Norms that are measured enter the
# histories too, but are too few to move a 0.9-quantile of 1,000.
CASES = {"steady state": 1.0, "nothing clipped": 0.01, "everything clipped": 100.0}


class Gradients:
    """Parameters of given shapes, and their gradients.

    Attributes:
        shapes: of the parameters.
        parameters: leaf tensors whose `grad` is written by `renew`.
        sizes: the norms of the gradients as they are drawn, before they vary.
    """

    def __init__(self, shapes: list[tuple[int, ...]], device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        self.shapes = shapes
        self._source = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
        # A ParameterList replaces plain tensors with parameters that have no gradients.
        self.parameters = [torch.nn.Parameter(torch.zeros_like(t)) for t in self._source]
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        self.gradients = [parameter.grad for parameter in self.parameters]
        self.sizes = [float(tensor.norm()) for tensor in self._source]
        self._generator = np.random.default_rng(1)

    @torch.no_grad()
    def renew(self, scale: float = 1.0) -> None:
        """Write gradients whose norms are `scale` times `sizes`, each varied by another factor."""
        here = factors(self._generator, len(self.gradients)) * np.float32(scale)
        torch._foreach_copy_(self.gradients, self._source)
        torch._foreach_mul_(self.gradients, here.tolist())
        if self.gradients[0].is_cuda:
            torch.cuda.synchronize()

    def check_clips(self, name: str, step: Callable[[], object]) -> None:
        """Refuse to time a clipper that leaves gradients alone that are far above all thresholds.

        Raises:
            RuntimeError: it multiplied none of them.
        """
        self.renew(CASES["everything clipped"])
        before = torch.stack(torch._foreach_norm(self.gradients))
        step()
        if torch.equal(torch.stack(torch._foreach_norm(self.gradients)), before):
            raise RuntimeError(f"{name} clips nothing: does it see these gradients?")

    def finished(self, step: Callable[[], object]) -> Callable[[], None]:
        """A function that calls `step` and waits for the device."""
        is_cuda = self.gradients[0].is_cuda

        def candidate() -> None:
            step()
            if is_cuda:
                torch.cuda.synchronize()

        return candidate


def add_torch_options(parser: argparse.ArgumentParser) -> None:
    """Add `--models`, `--device`, `--threads` and `--repetitions`."""
    parser.add_argument(
        "--models", nargs="+", default=list(MODELS), choices=list(MODELS), metavar="MODEL"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="of torch, on the CPU")
    parser.add_argument("--repetitions", type=int, default=60, help="rounds that count")
