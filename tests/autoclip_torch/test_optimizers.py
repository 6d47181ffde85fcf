"""Every optimizer in torch.optim attaches, records what it really got, and trains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from autoclip.torch import QuantileClip

OPTIMIZERS = sorted(
    name
    for name, value in vars(torch.optim).items()
    if isinstance(value, type) and issubclass(value, Optimizer) and value is not Optimizer
)
SETTINGS: dict[str, dict[str, Any]] = {"SGD": {"lr": 0.1}, "LBFGS": {"max_iter": 3}}
STEPS = 5


def make_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "SparseAdam":  # takes sparse gradients and no others
        return nn.Embedding(10, 4, sparse=True)
    # Muon takes matrices and nothing else.
    return nn.Sequential(nn.Linear(4, 8, bias=False), nn.Tanh(), nn.Linear(8, 1, bias=False))


def evaluate(model: nn.Module, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    model.zero_grad()
    if isinstance(model, nn.Embedding):
        # Duplicate indices stand for the sum of their gradients.
        loss: Tensor = model(torch.randint(10, (12,), generator=generator)).square().sum()
    else:
        loss = model(torch.randn(6, 4, generator=generator) * (1 + step % 3)).square().mean()
    loss.backward()
    return loss


def true_norms(model: nn.Module) -> list[float]:
    return [p.grad.to_dense().double().norm().item() for p in model.parameters()]


def make_optimizer(name: str, model: nn.Module) -> Optimizer:
    make = getattr(torch.optim, name)
    optimizer: Optimizer = make(model.parameters(), **SETTINGS.get(name, {}))
    return optimizer


def run(
    name: str, optimizer: Optimizer, model: nn.Module, clipper: QuantileClip, attached: bool
) -> list[list[float]]:
    """Train a few steps; return the true norms at each evaluation of the gradients."""
    norms = []
    if attached:
        clipper.attach(optimizer)

    def evaluate_and_clip(step: int) -> Tensor:
        loss = evaluate(model, step)
        norms.append(true_norms(model))
        if not attached:
            clipper.step()
        return loss

    for step in range(STEPS):
        if name == "LBFGS":
            optimizer.step(lambda step=step: evaluate_and_clip(step))
        else:
            evaluate_and_clip(step)
            optimizer.step()
    return norms


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().clone().flatten() for p in model.parameters()])


@pytest.mark.parametrize("global_clipping", [False, True], ids=["each", "global"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_attaches_and_trains(name: str, global_clipping: bool) -> None:
    results = []
    for attached in (True, False):
        model = make_model(name)
        start = weights(model)
        clipper = QuantileClip(model.parameters(), 0.5, global_clipping=global_clipping)
        norms = run(name, make_optimizer(name, model), model, clipper, attached)
        assert len(norms) >= STEPS
        assert not torch.equal(weights(model), start)
        results.append((weights(model), clipper.state_dict()))
        expected = torch.tensor(norms).T
        if global_clipping:
            expected = expected.square().sum(0, keepdim=True).sqrt()
        recorded = clipper.export_state().groups[0].windows()
        found = torch.stack([torch.from_numpy(window) for window in recorded])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


@pytest.mark.parametrize("option", ["foreach", "fused", "maximize"])
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_every_implementation_of_an_optimizer_gets_clipped_gradients(
    name: str, option: str
) -> None:
    results = []
    for attached in (True, False):
        model = make_model(name)
        optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.1, **{option: True})
        clipper = QuantileClip(model.parameters(), quantile=0.5)
        run(name, optimizer, model, clipper, attached)
        results.append((weights(model), clipper.state_dict()))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
