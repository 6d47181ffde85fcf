"""gsplat: an optimizer an attribute, whose parameters its strategies replace."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gsplat.strategy import DefaultStrategy
from gsplat.strategy.ops import duplicate, remove, reset_opa, split
from recipes import Watch, run_recipe, windows_of
from torch import nn

from autoclip.torch import QuantileClip

COUNT, STEPS = 20, 12


def gaussians(count: int = COUNT) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"means": (3,), "scales": (3,), "quats": (4,), "opacities": (), "sh0": (1, 3)}
    return {
        name: nn.Parameter(torch.randn((count, *shape), generator=generator))
        for name, shape in shapes.items()
    }


def step(names: dict[str, Any], number: int) -> None:
    """A loss over all attributes, whose gradient grows: all but the first step clip."""
    loss = torch.stack([(tensor**2).sum() for tensor in names["params"].values()]).sum()
    (1.2**number * loss).backward()
    for optimizer in names["optimizers"].values():
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def edit(names: dict[str, Any], number: int) -> None:
    """Densify and prune with gsplat's own functions."""
    params, optimizers = names["params"], names["optimizers"]
    mask = torch.arange(len(params["means"])) % 4 == 0
    if number in (3, 4):
        operation = duplicate if number == 3 else split
        operation(params, optimizers, {}, mask)
    elif number == 5:
        remove(params, optimizers, {}, mask)
    elif number == 6:
        reset_opa(params, optimizers, {}, 0.01)


def test_histories_go_on_through_densification_and_pruning() -> None:
    names = run_recipe("gsplat", gaussians=gaussians())
    DefaultStrategy().check_sanity(names["params"], names["optimizers"])
    sizes = []
    with Watch(quantile=0.9, history_length=100) as watch:
        for number in range(STEPS):
            step(names, number)
            edit(names, number)
            sizes.append(len(names["params"]["means"]))
    assert watch.steps() == [STEPS] * 5
    assert watch.clipped > 5 * (STEPS // 2)
    assert sizes[2:6] == [20, 25, 32, 24]

    # Resume: tensors of the saved sizes first.
    fresh = {
        name: nn.Parameter(tensor.detach().clone()) for name, tensor in names["params"].items()
    }
    other = run_recipe("gsplat", gaussians=fresh)
    for name, optimizer in names["optimizers"].items():
        other["optimizers"][name].load_state_dict(optimizer.state_dict())
        assert windows_of(other["optimizers"][name]) == windows_of(optimizer)


def test_a_run_without_changes_is_that_of_one_optimizer() -> None:
    names = run_recipe("gsplat", gaussians=gaussians())
    single = gaussians()
    groups = [{"params": [tensor], "lr": 1e-3} for tensor in single.values()]
    optimizer = QuantileClip.as_optimizer(
        torch.optim.Adam(groups, eps=1e-15), quantile=0.9, history_length=100
    )
    for number in range(STEPS):
        step(names, number)
        step({"params": single, "optimizers": {"all": optimizer}}, number)
    for name, tensor in single.items():
        np.testing.assert_array_equal(tensor.detach(), names["params"][name].detach())
