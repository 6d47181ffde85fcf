"""torch.compile around a training step, an optimizer's step or a model: the hook stays out."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.optim import SGD, AdamW, Optimizer

from autoclip.torch import QuantileClip

STEPS = 6
# What is under test is the capture; to generate and build C++ code would only cost time.
BACKEND = "aot_eager"


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class Forwarding(SGD):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def make(cls: type[Optimizer], attached: bool = True) -> tuple[nn.Module, Any, QuantileClip]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = cls(model.parameters(), lr=0.1)  # type: ignore[call-arg]
    clipper = QuantileClip(model.parameters(), quantile=0.5)
    if attached:
        clipper.attach(optimizer)
    return model, optimizer, clipper


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(5, 4, generator=generator) * (1 + i % 3) for i in range(STEPS)]


def train(
    model: nn.Module, optimizer: Any, clipper: QuantileClip, compiled: str
) -> tuple[Tensor, bytes]:
    """Train with one part of the step compiled; return the weights and the history."""
    attached = hasattr(optimizer, "clipper")

    def compute(batch: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = forward(batch).square().mean()
        loss.backward()
        if not attached:
            clipper.step()
        return loss

    def whole(batch: Tensor) -> Tensor:
        loss = compute(batch)
        optimizer.step()
        return loss

    forward: Callable[[Tensor], Tensor] = model
    if compiled == "the step":
        whole = torch.compile(whole, backend=BACKEND)
    elif compiled in ("optimizer.step", "optimizer.step with a closure"):
        update = torch.compile(optimizer.step, backend=BACKEND)
    elif compiled == "the model in a closure":
        forward = torch.compile(model, backend=BACKEND)
    for batch in batches():
        if compiled == "optimizer.step":
            compute(batch)
            update()
        elif compiled == "optimizer.step with a closure":
            update(lambda batch=batch: compute(batch))
        elif compiled == "the model in a closure":
            optimizer.step(lambda batch=batch: compute(batch))
        else:
            whole(batch)
    weights = torch.cat([p.detach().clone().flatten() for p in model.parameters()])
    return weights, clipper.state_dict()["data"]


@pytest.mark.parametrize(
    ("compiled", "cls"),
    [
        # Each part and each optimizer once, and the rest nightly: a compilation takes a second.
        ("the step", AdamW),
        ("optimizer.step", SGD),
        ("optimizer.step with a closure", Forwarding),
        ("the model in a closure", SGD),
        *(
            pytest.param(compiled, cls, marks=pytest.mark.nightly)
            for compiled, cls in [
                ("the step", SGD),
                ("the step", Forwarding),
                ("optimizer.step", AdamW),
                ("optimizer.step", Forwarding),
                ("optimizer.step with a closure", SGD),
                ("optimizer.step with a closure", AdamW),
                ("the model in a closure", AdamW),
                ("the model in a closure", Forwarding),
            ]
        ),
    ],
)
def test_the_same_numbers_as_by_hand_and_without_a_compiler(
    compiled: str, cls: type[Optimizer]
) -> None:
    by_hand = train(*make(cls, attached=False), compiled)
    torch._dynamo.reset()
    counters.clear()
    found = train(*make(cls), compiled)
    assert counters["stats"]["unique_graphs"] >= 1  # something was compiled indeed
    assert torch.equal(found[0], by_hand[0])
    assert found[1] == by_hand[1]
    # The compiler itself may round otherwise; Adam's first steps magnify that.
    eager = train(*make(cls), "nothing")
    torch.testing.assert_close(found[0], eager[0], rtol=1e-3, atol=1e-5)
    history = make(cls, attached=False)[2]
    history.load_state_dict({"format": "autoclip", "version": 1, "data": found[1]})
    assert [len(w) for w in history.export_state().groups[0].windows()] == [STEPS] * 4


def graph_breaks(attached: bool) -> list[str]:
    model, optimizer, _ = make(SGD, attached)
    torch._dynamo.reset()
    counters.clear()

    @torch.compile(backend=BACKEND)
    def step(batch: Tensor) -> None:
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()

    for batch in batches():
        step(batch)
    return [reason for reason, count in counters["graph_break"].items() for _ in range(count)]


def test_the_hook_is_one_graph_break_and_is_not_traced() -> None:
    plain, attached = graph_breaks(False), graph_breaks(True)
    ours = [reason for reason in attached if "before_step" in reason]
    # One break, counted again where torch compiles its wrapper around the step by itself.
    assert len(set(ours)) == 1
    # Not of a folder with our name, such as that of an environment.
    assert {r for r in attached if re.search(r"autoclip[./\\]+(core|torch)\b", r)} <= set(ours)
    # The others are torch's own: at zero_grad, at backward, and without us inside of the step.
    assert len(attached) <= len(plain) + 1


def test_state_is_saved_and_loaded_around_a_compiled_step() -> None:
    model, optimizer, clipper = make(AdamW)
    train(model, optimizer, clipper, "optimizer.step")
    saved = optimizer.state_dict()
    _, other, _ = make(AdamW)
    other.load_state_dict(saved)
    assert other.state_dict()["autoclip"] == saved["autoclip"]
