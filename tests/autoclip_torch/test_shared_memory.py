"""Gradients that share memory are clipped as if each parameter had its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rules import MODES, each_mode
from torch import Tensor
from torch.func import grad

from autoclip.torch import Clipper, QuantileClip

examples = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])

BUFFER = 400
# Each makes a gradient of a buffer, from a number.
VIEWS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "itself": lambda buffer, k: buffer,
    "reshaped": lambda buffer, k: buffer.view(20, 20),
    "transposed": lambda buffer, k: buffer.view(20, 20).T,
    "a part": lambda buffer, k: buffer[10 * k : 10 * k + 30],
    "every third": lambda buffer, k: buffer[k::3],
    "a column": lambda buffer, k: buffer.view(20, 20)[:, k],
    "expanded": lambda buffer, k: buffer[k].expand(7),
    "rows expanded": lambda buffer, k: buffer[k : k + 5].expand(3, 5),
    "windows": lambda buffer, k: buffer.unfold(0, 10, 4),
    "negated": lambda buffer, k: torch._neg_view(buffer[k:]),
    "its own": lambda buffer, k: buffer[: k + 1].clone(),
}
views = st.lists(
    st.tuples(st.sampled_from(sorted(VIEWS)), st.integers(0, 19)), min_size=1, max_size=24
)


def parameters_for(gradients: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros(g.shape, dtype=g.dtype, requires_grad=True) for g in gradients]


def clipper_of(parameters: Sequence[Tensor], mode: dict[str, bool], **more: Any) -> Clipper:
    half = (len(parameters) + 1) // 2
    groups = [{"params": [*parameters[:half]]}]
    if half < len(parameters):
        groups.append({"params": [*parameters[half:]]})
    return QuantileClip(groups, 0.5, **mode, **more)


def buffer_of(size: float) -> Tensor:
    return torch.randn(BUFFER, generator=torch.Generator().manual_seed(0)) * size


def gradients_of(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [p.grad.resolve_neg().resolve_conj().clone() for p in parameters]  # type: ignore[union-attr]


def assert_like_gradients_of_their_own(
    make: Callable[[float], Sequence[Tensor]],
    mode: dict[str, bool],
    sizes: Sequence[float] = (1.0, 4.0, 2.0),
    **more: Any,
) -> None:
    ours, theirs = (parameters_for(make(1.0)) for _ in range(2))
    clipper, oracle = (clipper_of(some, mode, **more) for some in (ours, theirs))
    for size in sizes:
        for mine, other, gradient in zip(ours, theirs, make(size), strict=True):
            mine.grad, other.grad = gradient, gradient.clone().contiguous()
        torch.testing.assert_close(clipper.step(), oracle.step(), rtol=1e-6, atol=0)
        for name in ("norms", "thresholds", "coefficients"):
            found, expected = getattr(clipper.last, name), getattr(oracle.last, name)
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
        torch.testing.assert_close(gradients_of(ours), gradients_of(theirs), rtol=1e-5, atol=0)


@each_mode
@examples
@given(views=views)
def test_views_of_one_buffer(
    path: str, mode: dict[str, bool], views: list[tuple[str, int]]
) -> None:
    def make(size: float) -> list[Tensor]:
        buffer = buffer_of(size)
        return [VIEWS[name](buffer, k) for name, k in views]

    assert_like_gradients_of_their_own(make, mode)


@each_mode
def test_one_tensor_for_many_parameters(path: str, mode: dict[str, bool]) -> None:
    def make(size: float) -> list[Tensor]:
        return [buffer_of(size)] * 40

    assert_like_gradients_of_their_own(make, mode)


@each_mode
def test_every_dtype(path: str, mode: dict[str, bool]) -> None:
    dtypes = [torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.complex128]

    def make(size: float) -> list[Tensor]:
        buffers = [torch.full((6,), size, dtype=dtype) for dtype in dtypes]
        return [view for b in buffers for view in (b, b.view(2, 3), b[0].expand(4), b.conj())]

    assert_like_gradients_of_their_own(make, mode)


@each_mode
def test_sparse_gradients(path: str, mode: dict[str, bool]) -> None:
    def make(size: float) -> list[Tensor]:
        values = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)) * size
        table = torch.sparse_coo_tensor([[1, 4]], values, (5, 3), check_invariants=True)
        other = torch.sparse_coo_tensor([[0, 0]], values, (5, 3), check_invariants=True)
        return [table, table, other.detach()]

    ours, theirs = ([torch.zeros(5, 3, requires_grad=True) for _ in range(3)] for _ in range(2))
    clipper, oracle = (clipper_of(some, mode) for some in (ours, theirs))
    for size in (1.0, 4.0, 2.0):
        for mine, other, gradient in zip(ours, theirs, make(size)):
            mine.grad, other.grad = gradient, gradient.clone()
        torch.testing.assert_close(clipper.step(), oracle.step(), rtol=1e-6, atol=0)
        for mine, other in zip(ours, theirs):
            found, expected = mine.grad.to_dense(), other.grad.to_dense()  # type: ignore[union-attr]
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("size", [3, 5000, 300_000])
@each_mode
def test_what_autograd_grad_returns(path: str, mode: dict[str, bool], size: int) -> None:
    """A sum has one tensor for both terms; a view of a parameter has a view."""
    ours = [torch.ones(size, requires_grad=True), torch.ones(size, requires_grad=True)]
    ours.append(torch.ones(1, size, requires_grad=True))
    clipper = clipper_of(ours, mode)
    for scale in (1.0, 10.0):
        loss = (ours[0] + ours[1] + ours[2].view(-1)).square().sum() * scale
        found = torch.autograd.grad(loss, ours)
        assert len({gradient.data_ptr() for gradient in found}) == 1
        for mine, gradient in zip(ours, found):
            mine.grad = gradient
        clipper.step()
    for mine in ours:  # elements of 6, then of 60; clipped to the median
        assert mine.grad is not None
        expected = torch.full_like(mine, 33.0).detach()
        torch.testing.assert_close(mine.grad, expected, rtol=1e-5, atol=0)


@each_mode
def test_what_torch_func_grad_returns(path: str, mode: dict[str, bool]) -> None:
    """The gradient of a sum has one element, expanded."""
    weight = torch.zeros(3, requires_grad=True)
    clipper = clipper_of([weight], mode)
    for scale in (1.0, 3.0):
        weight.grad = grad(lambda w, scale=scale: w.sum() * scale)(weight.detach())
        assert weight.grad.stride() == (0,)
        clipper.step()
    assert clipper.last.coefficients.tolist() == pytest.approx([2 / 3])
    assert weight.grad.tolist() == pytest.approx([2.0] * 3)


@pytest.mark.parametrize("mode", [MODES["parameter"], MODES["group"]], ids=str)
def test_groups_with_different_settings(path: str, mode: dict[str, bool]) -> None:
    """The same memory has a coefficient for each parameter."""
    ours = [torch.zeros(4, requires_grad=True) for _ in range(2)]
    clipper = QuantileClip(
        [{"params": ours[:1], "quantile": 0.0}, {"params": ours[1:], "quantile": 1.0}],
        **mode,
    )
    for size in (1.0, 8.0):
        gradient = torch.full((4,), size)
        for mine in ours:
            mine.grad = gradient
        clipper.step()
    assert [mine.grad.tolist() for mine in ours] == [[1.0] * 4, [8.0] * 4]  # type: ignore[union-attr]


def test_a_gradient_that_is_zeroed_leaves_the_other_one_alone(path: str) -> None:
    ours = [torch.zeros(4, requires_grad=True) for _ in range(3)]
    clipper = QuantileClip(
        [{"params": ours[:2], "on_nonfinite": "zero"}, {"params": ours[2:]}],
    )
    broken = torch.tensor(math.nan).expand(4)
    for mine in ours:
        mine.grad = broken
    clipper.step()
    assert [mine.grad.isnan().all().item() for mine in ours] == [False, False, True]  # type: ignore[union-attr]
    assert ours[0].grad.tolist() == ours[1].grad.tolist() == [0.0] * 4  # type: ignore[union-attr]


def test_a_skipped_parameter_gets_its_gradient_back_as_it_was(path: str) -> None:
    ours = [torch.zeros(4, requires_grad=True) for _ in range(2)]
    optimizer = torch.optim.SGD(
        [{"params": ours[:1], "on_spike": "skip"}, {"params": ours[1:], "on_spike": "clip"}],
        lr=1.0,
    )
    QuantileClip.as_optimizer(optimizer, quantile=0.0)
    for size in (1.0, 8.0):
        gradient = torch.full((4,), size)
        for mine in ours:
            mine.grad = gradient
        optimizer.step()
    assert [mine.tolist() for mine in ours] == [[-1.0] * 4, [-2.0] * 4]
    assert [mine.grad.tolist() for mine in ours] == [[8.0] * 4, [1.0] * 4]  # type: ignore[union-attr]


@pytest.mark.parametrize("count", [3, 40])
@each_mode
def test_disjoint_views_of_one_buffer_stay_in_it(
    path: str, mode: dict[str, bool], count: int
) -> None:
    """The gradients of DDP are such views, and of other engines that keep them together."""
    buffer = torch.zeros(7 * count)
    ours = [torch.zeros(7, requires_grad=True) for _ in range(count)]
    for k, mine in reversed([*enumerate(ours)]):
        mine.grad = buffer[7 * k : 7 * k + 7]
    before = [mine.grad for mine in ours]
    clipper = clipper_of(ours, mode, on_nonfinite="zero")
    for size in (1.0, 4.0):
        buffer.fill_(size)
        clipper.step()
    assert all(mine.grad is gradient for mine, gradient in zip(ours, before))
    assert buffer.tolist() == pytest.approx([2.5] * len(buffer))


def test_sharing_that_begins_or_ends_later(path: str) -> None:
    """Shapes and dtypes stay the same, so nothing else tells."""
    ours = [torch.zeros(50, requires_grad=True) for _ in range(20)]
    clipper = QuantileClip(ours, 0.0)
    for step, is_shared in enumerate([False, True, False, True]):
        gradient = torch.full((50,), 1.0 + step)
        for mine in ours:
            mine.grad = gradient if is_shared else gradient.clone()
        clipper.step()
        for mine in ours:
            assert mine.grad is not None
            assert mine.grad.tolist() == pytest.approx([1.0] * 50)
