"""torchtitan: a container of optimizers that clip, in a process group of one process."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from recipes import Watch, run_recipe, weights
from torch import nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.fsdp import fully_shard
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig
from torchtitan.components.optimizer.lr_scheduler import LRSchedulersContainer
from torchtitan.distributed.utils import clip_grad_norm_

NAMES = run_recipe("torchtitan")
OPTIMIZERS: Any = NAMES["AutoClipOptimizers"]
STEPS = 6


@pytest.fixture(autouse=True)
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


class Stage(nn.Module):
    def __init__(self, seed: int, names: tuple[str, str]) -> None:
        super().__init__()
        torch.manual_seed(seed)
        for name in names:
            setattr(self, name, nn.Linear(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.children():
            x = layer(x).tanh()
        return x


def parts(sharded: bool = False) -> list[nn.Module]:
    """Of a model, as pipeline stages that one process holds."""
    made: list[nn.Module] = [Stage(0, ("first", "second")), Stage(1, ("third", "fourth"))]
    if sharded:
        for part in made:
            fully_shard(part)
    return made


def config(**settings: Any) -> Any:
    groups = [
        ParamGroupConfig(
            pattern=r"bias$", optimizer_name="Adam", optimizer_kwargs={"lr": 1e-2, "fused": False}
        ),
        ParamGroupConfig(pattern=r".*", optimizer_name="AdamW", optimizer_kwargs={"lr": 1e-2}),
    ]
    options = {"param_groups": groups, "implementation": "for-loop", "quantile": 0.5, **settings}
    return OPTIMIZERS.Config(**options)


def train(model: list[nn.Module], optimizers: Any, steps: range) -> None:
    """As torchtitan's trainer does, with `training.max_norm` of infinity."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 4, generator=generator) * (1 + 9 * (step % 3))
        optimizers.zero_grad()
        for part in model:
            x = part(x)
        (10 * x.square()).mean().backward()
        parameters = [p for part in model for p in part.parameters()]
        clip_grad_norm_(parameters, float("inf"), foreach=True)
        optimizers.step()


def manager(folder: Path, model: Any, optimizers: Any, **settings: Any) -> Any:
    options = {"enable": True, "interval": 1, "last_save_model_only": False, **settings}
    return CheckpointManager(
        CheckpointManager.Config(**options),
        dataloader=None,
        model_parts=model,
        optimizers=optimizers,
        lr_schedulers=LRSchedulersContainer.Config().build(
            optimizers=optimizers, training_steps=99
        ),
        states={},
        sd_adapter=None,
        base_folder=str(folder),
    )


def whole(model: list[nn.Module]) -> torch.Tensor:
    return torch.cat([weights(part) for part in model])


def histories(optimizers: Any) -> list[Any]:
    return [optimizer.clipper.state_dict() for optimizer in optimizers]


def test_recipe() -> None:
    model = parts()
    optimizers = NAMES["config"].build(model_parts=model)
    with Watch(quantile=0.9) as watch:
        train(model, optimizers, range(STEPS))
    assert watch.steps() == [STEPS, STEPS]


@pytest.mark.parametrize("sharded", [False, True])
def test_as_numpy_clips_and_resumes_bit_for_bit(tmp_path: Path, sharded: bool) -> None:
    model = parts(sharded)
    optimizers = config().build(model_parts=model)
    assert len(optimizers) == 4  # two a stage
    if sharded:
        train(model, optimizers, range(STEPS))
    else:
        with Watch(quantile=0.5) as watch:
            train(model, optimizers, range(STEPS))
        assert watch.steps() == [STEPS] * 4
        assert watch.clipped > 5
    assert manager(tmp_path, model, optimizers).save(STEPS)

    other = parts(sharded)
    resumed = config().build(model_parts=other)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*no 'autoclip' entry")
        assert manager(tmp_path, other, resumed).load()
    assert histories(resumed) == histories(optimizers)
    for each in ((model, optimizers), (other, resumed)):
        train(*each, range(STEPS, 2 * STEPS))
    assert torch.equal(whole(other), whole(model))
    assert histories(resumed) == histories(optimizers)


def test_a_checkpoint_without_histories(tmp_path: Path) -> None:
    model = parts()
    plain = OptimizersContainer.Config(
        param_groups=config().param_groups, implementation="for-loop"
    ).build(model_parts=model)
    train(model, plain, range(STEPS))
    assert manager(tmp_path, model, plain).save(STEPS)
    other = parts()
    clipping = config().build(model_parts=other)
    with pytest.raises(CheckpointException, match="autoclip"):
        manager(tmp_path, other, clipping).load()
    assert manager(tmp_path, other, clipping, exclude_from_loading=["optimizer"]).load()
    assert torch.equal(whole(other), whole(model))
    with Watch(quantile=0.5) as watch:
        train(other, clipping, range(STEPS))
    assert watch.steps() == [STEPS] * 4


@pytest.mark.parametrize(("off", "zero"), [(float("inf"), False), (0.0, True)])
def test_zero_does_not_switch_clipping_off(off: float, zero: bool) -> None:
    """The trap that the page names."""
    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    clip_grad_norm_([parameter], off, foreach=True)
    assert torch.equal(parameter.grad, torch.zeros(3) if zero else torch.ones(3))
