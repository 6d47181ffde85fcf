"""Gradients placed in every way that DTensors know, made by hand: norms, scaling, agreement."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from oracles import (
    MODES,
    assert_equal_reports,
    assert_same_everywhere,
    full,
    mode_on_each_commit,
    placed,
    zeros,
)
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial, Replicate, Shard

from autoclip.torch import QuantileClip

SHAPE = (5, 3)
PLACEMENTS = [Replicate(), Shard(0), Shard(1), Partial(), Partial("avg")]


def steps(count: int) -> Any:
    generator = torch.Generator().manual_seed(2)
    for step in range(count):
        scale = (1.0, 4.0, 2.0, 9.0)[step % 4]

        def random(dtype: torch.dtype = torch.float32, scale: float = scale) -> Tensor:
            return torch.randn(SHAPE, generator=generator, dtype=dtype) * scale

        yield step, random


@pytest.mark.processes(4)
@pytest.mark.parametrize("global_clipping", MODES)
def test_every_combination_of_placements(global_clipping):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    combinations = [
        pair
        for pair in itertools.product(PLACEMENTS, repeat=2)
        # torch itself does not reduce a mean and a sum in one tensor.
        if len({p.reduce_op for p in pair if p.is_partial()}) < 2
    ]
    plain = torch.zeros(SHAPE, requires_grad=True)
    ours = [*(zeros(mesh, SHAPE) for _ in combinations), plain]
    theirs = [torch.zeros(SHAPE, requires_grad=True) for _ in ours]
    clipper = QuantileClip(ours, 0.5, global_clipping=global_clipping)
    oracle = QuantileClip(theirs, 0.5, global_clipping=global_clipping)
    for step, random in steps(6):
        for i, (mine, other) in enumerate(zip(ours, theirs)):
            value = None if (step + i) % 3 == 0 else random()
            other.grad = None if value is None else value.clone()
            mine.grad = (
                value if value is None or mine is plain else placed(value, mesh, combinations[i])
            )
        torch.testing.assert_close(clipper.step(), oracle.step(), rtol=1e-5, atol=0)
        assert_equal_reports(clipper, oracle)
        for mine, other in zip(ours, theirs):
            if other.grad is not None:
                torch.testing.assert_close(full(mine.grad), other.grad, rtol=1e-5, atol=1e-6)
    assert_same_everywhere(clipper)


@pytest.mark.processes(4)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", "complex64"])
def test_dtypes(dtype):
    kind = getattr(torch, dtype)
    mesh = init_device_mesh("cpu", (4,))
    ours = [zeros(mesh, SHAPE, kind) for _ in PLACEMENTS]
    theirs = [torch.zeros(SHAPE, dtype=kind, requires_grad=True) for _ in PLACEMENTS]
    clipper, oracle = QuantileClip(ours, 0.5), QuantileClip(theirs, 0.5)
    # The summands of a 16-bit sum are rounded each.
    tolerance = 1e-2 if kind.itemsize == 2 else 1e-5
    for _, random in steps(3):
        for mine, other, placement in zip(ours, theirs, PLACEMENTS):
            drawn = random(torch.complex64 if kind.is_complex else torch.float32)
            other.grad = drawn.to(kind)
            mine.grad = placed(other.grad.clone(), mesh, [placement])
        torch.testing.assert_close(clipper.step(), oracle.step(), rtol=tolerance, atol=0)
        for mine, other in zip(ours, theirs):
            torch.testing.assert_close(full(mine.grad), other.grad, rtol=tolerance, atol=tolerance)
    assert_same_everywhere(clipper)


@pytest.mark.processes(4)
@mode_on_each_commit(True)
def test_gradients_missing_on_some_ranks_only(global_clipping):
    """A missing shard or summand counts as zero, a missing replica not at all."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    placements = [
        (Shard(0), Shard(1)),
        (Partial(), Shard(0)),
        (Partial(), Partial()),
        (Replicate(), Shard(0)),
        (Replicate(), Replicate()),
    ]
    ours = [*(zeros(mesh, SHAPE) for _ in placements), torch.zeros(SHAPE, requires_grad=True)]
    theirs = [torch.zeros(SHAPE, requires_grad=True) for _ in ours]
    clipper = QuantileClip(ours, 0.5, global_clipping=global_clipping)
    oracle = QuantileClip(theirs, 0.5, global_clipping=global_clipping)
    for step, random in steps(9):
        # From the first step on, and a rank with no gradient at all.
        is_missing = dist.get_rank() == step % 4
        for mine, other, where in zip(ours, theirs, [*placements, None]):
            other.grad = random()
            mine.grad = other.grad.clone()
            if where is not None:
                mine.grad = placed(other.grad, mesh, where)
                if Replicate() not in where:
                    mine.grad.to_local().mul_(not is_missing)
                    other.grad = mine.grad.full_tensor()
            if is_missing:
                mine.grad = None
        torch.testing.assert_close(clipper.step(), oracle.step(), rtol=1e-5, atol=0)
        assert_equal_reports(clipper, oracle)
        assert_same_everywhere(clipper)


@pytest.mark.processes(4)
@mode_on_each_commit(False)
def test_several_meshes(global_clipping):
    """One of one dimension, one of two, and a part of that one."""
    line = init_device_mesh("cpu", (4,))
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    places = [
        (square["b"], [Shard(0)]),
        (line, [Shard(0)]),
        (square, [Shard(1), Partial()]),
        (square["a"], [Partial()]),
        (line, [Replicate()]),
    ]
    ours = [zeros(mesh, SHAPE) for mesh, _ in places]
    theirs = [torch.zeros(SHAPE, requires_grad=True) for _ in ours]
    clipper = QuantileClip(ours, 0.5, global_clipping=global_clipping)
    oracle = QuantileClip(theirs, 0.5, global_clipping=global_clipping)
    for _, random in steps(4):
        for mine, other, (mesh, where) in zip(ours, theirs, places):
            other.grad = random()
            mine.grad = placed(other.grad.clone(), mesh, where)
        torch.testing.assert_close(clipper.step(), oracle.step(), rtol=1e-5, atol=0)
        assert_equal_reports(clipper, oracle)
    assert_same_everywhere(clipper)


@pytest.mark.processes(4)
def test_extreme_norms():
    """Squares leave float32's range, and float64's, and the norms are right and never infinite."""
    mesh = init_device_mesh("cpu", (4,))
    ours = [zeros(mesh, (8,)) for _ in range(4)]
    huge = zeros(mesh, (8,), torch.float64)
    clipper = QuantileClip([*ours, huge], on_nonfinite="zero")
    for mine, size in zip(ours, (1e-35, 1e-16, 1e18, 1e38)):
        mine.grad = placed(torch.full((8,), size), mesh, [Shard(0)])
    huge.grad = placed(torch.full((8,), 1e300, dtype=torch.float64), mesh, [Shard(0)])
    clipper.step()
    expected = torch.tensor([1e-35, 1e-16, 1e18, 1e38]) * 8**0.5
    torch.testing.assert_close(clipper.last.norms[:4], expected, rtol=1e-5, atol=0)
    assert [len(w) for w in clipper.export_state().by_row()[0]] == [1, 1, 1, 1, 0]
    assert full(huge.grad).min() == 1e300  # too large to be recorded, and left alone


@pytest.mark.processes(4)
@pytest.mark.parametrize("global_clipping", MODES)
@pytest.mark.parametrize("placement", [0, 3], ids=["sharded", "summed"])
def test_nonfinite_on_one_rank_is_nonfinite_on_all(placement, global_clipping):
    mesh = init_device_mesh("cpu", (4,))
    for on_nonfinite in ("keep", "zero", "raise"):
        weight, other = zeros(mesh, (8,)), zeros(mesh, (8,))
        clipper = QuantileClip(
            [("weight", weight), ("other", other)],
            global_clipping=global_clipping,
            on_nonfinite=on_nonfinite,
        )
        where = [Shard(0)] if placement == 0 else [Partial()]
        for weighted in (weight, other):
            weighted.grad = placed(torch.ones(8), mesh, where)
        if dist.get_rank() == 1:
            weight.grad.to_local()[0] = float("nan")
        before = weight.grad.to_local().clone()
        if on_nonfinite == "raise":
            with pytest.raises(FloatingPointError, match="weight"):
                clipper.step()
        else:
            clipper.step()
        if on_nonfinite == "zero":
            assert not weight.grad.to_local().any()
        else:
            torch.testing.assert_close(weight.grad.to_local(), before, equal_nan=True)
        assert other.grad.to_local().any()
        recorded = [len(window) for window in clipper.export_state().by_row()[0]]
        if global_clipping:  # zeroed, the gradient leaves a norm
            expected = [1] if on_nonfinite == "zero" else [0]
        else:
            expected = [0, 0] if on_nonfinite == "raise" else [0, 1]
        assert recorded == expected
        assert_same_everywhere(clipper)


@pytest.mark.processes(4)
def test_placements_that_change_raise_on_all_ranks():
    mesh = init_device_mesh("cpu", (4,))
    weight = zeros(mesh, (8,))
    clipper = QuantileClip([("weight", weight)])
    weight.grad = placed(torch.ones(8), mesh, [Replicate()])
    clipper.step()
    saved = clipper.state_dict()["data"]
    # On one rank only, the others have none: they are told.
    summed = placed(torch.ones(8), mesh, [Partial()])
    weight.grad = summed if dist.get_rank() == 2 else None
    with pytest.raises(RuntimeError, match="weight" if dist.get_rank() == 2 else "another process"):
        clipper.step()
    assert clipper.state_dict()["data"] == saved
    # Zeros are no news: torch.distributed.checkpoint steps with such, placed like the parameter.
    weight.grad = placed(torch.zeros(8), mesh, [Partial()])
    clipper.step()
    weight.grad = placed(torch.ones(8), mesh, [Replicate()])
    clipper.step()
    assert clipper.export_state().by_row()[1] == [2]


@pytest.mark.processes(2)
def test_zeros_before_the_first_gradient_say_nothing_about_it():
    mesh = init_device_mesh("cpu", (2,))
    weight = zeros(mesh, (8,))
    clipper = QuantileClip([weight])
    weight.grad = torch.zeros_like(weight)
    clipper.step()
    weight.grad = placed(torch.ones(8), mesh, [Partial()])
    torch.testing.assert_close(clipper.step(), torch.tensor(8.0).sqrt())
