"""FSDP1: each sharding strategy, `use_orig_params` on and off."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from engine_training import (
    LEARNING_RATE,
    QUANTILE,
    WEIGHTS,
    Reference,
    assert_equal_reports,
    assert_same_everywhere,
    batches,
    make_model,
    own_part,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import MixedPrecision, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from autoclip.core import Quantile, log_values
from autoclip.torch import QuantileClip
from autoclip.torch.fsdp import attach

STRATEGIES = ["FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD"]


def wrap(model: nn.Module, strategy: str = "FULL_SHARD", **settings: Any) -> FSDP:
    if strategy == "HYBRID_SHARD":
        settings["device_mesh"] = init_device_mesh("cpu", (1, 2))
    return FSDP(
        model,
        sharding_strategy=ShardingStrategy[strategy],
        auto_wrap_policy=ModuleWrapPolicy({nn.Linear}),
        device_id=torch.device("cpu"),
        **settings,
    )


def make(**settings: Any) -> tuple[FSDP, torch.optim.Optimizer]:
    model = wrap(make_model(), **settings)
    return model, torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)


def train(
    model: FSDP, optimizer: torch.optim.Optimizer, batch: torch.Tensor, weight: float
) -> None:
    optimizer.zero_grad()
    (model(own_part(batch)).square().mean() * weight).backward()
    optimizer.step()


@pytest.mark.processes(2)
@pytest.mark.parametrize("use_orig_params", [False, True])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_trains_as_one_process_on_the_whole_batch(strategy, use_orig_params):
    model, optimizer = make(strategy=strategy, use_orig_params=use_orig_params)
    clipper, reference = attach(model, optimizer, quantile=QUANTILE), Reference()
    assert optimizer.clipper is clipper
    clipped = 0
    for weight, batch in zip(WEIGHTS, batches()):
        train(model, optimizer, batch, weight)
        reference.train(batch, weight)
        assert_equal_reports(clipper, reference.clipper, 1e-5)
        with FSDP.summon_full_params(model):
            for mine, other in zip(model.parameters(), reference.model.parameters(), strict=True):
                torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
        clipped += int(clipper.last.spikes[0])
    assert clipped >= 3
    assert_same_everywhere(clipper)


# FSDP1 measures in float32 and rounds what it returns to the gradients' dtype.
PRECISIONS: dict[str, tuple[torch.dtype, dict[str, Any], torch.dtype, float]] = {
    "mixed bfloat16": (torch.float32, {"param_dtype": torch.bfloat16}, torch.float32, 1e-6),
    "mixed float16": (torch.float32, {"param_dtype": torch.float16}, torch.float32, 1e-6),
    "kept bfloat16": (
        torch.float32,
        {"param_dtype": torch.bfloat16, "keep_low_precision_grads": True},
        torch.bfloat16,
        2.0**-8,
    ),
    "bfloat16": (torch.bfloat16, {}, torch.bfloat16, 2.0**-8),
    "float16": (torch.float16, {}, torch.float16, 2.0**-11),
}


@pytest.mark.processes(2)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_norm_is_rounded_to_the_dtype_that_gradients_are_kept_in(precision):
    dtype, policy, kept, tolerance = PRECISIONS[precision]
    model = wrap(make_model().to(dtype), mixed_precision=MixedPrecision(**policy))
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    clipper = attach(model, optimizer, quantile=QUANTILE)
    for weight, batch in zip(WEIGHTS[:4], batches(4)):
        optimizer.zero_grad()
        (model(own_part(batch).to(dtype)).float().square().mean() * weight).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert {gradient.dtype for gradient in gradients} == {kept}
        square = torch.stack([gradient.double().square().sum() for gradient in gradients]).sum()
        dist.all_reduce(square)
        optimizer.step()
        assert clipper.last.norms[0] == pytest.approx(float(square.sqrt()), rel=tolerance)
    assert_same_everywhere(clipper)


@pytest.mark.processes(2)
@pytest.mark.parametrize("use_orig_params", [False, True])
def test_the_history_travels_in_the_optimizers_state(use_orig_params):
    model, optimizer = make(use_orig_params=use_orig_params)
    clipper = attach(model, optimizer, quantile=QUANTILE)
    for weight, batch in zip(WEIGHTS, batches(3)):
        train(model, optimizer, batch, weight)
    other_model, other_optimizer = make(use_orig_params=use_orig_params)
    other = attach(other_model, other_optimizer, quantile=QUANTILE)
    other_optimizer.load_state_dict(optimizer.state_dict())
    assert other.state_dict() == clipper.state_dict()
    assert other.max_norm == clipper.max_norm < math.inf
    # What FSDP1 makes of an optimizer's state has no place for the history.
    assert "autoclip" not in FSDP.optim_state_dict(model, optimizer)
    third = attach(*make(use_orig_params=use_orig_params), quantile=QUANTILE)
    third.load_state_dict(clipper.state_dict())
    assert third.max_norm == clipper.max_norm


@pytest.mark.processes(2)
def test_a_closure_a_detached_clipper_and_logging():
    model, optimizer = make()
    clipper = attach(model, optimizer, Quantile(0.5), max_norm=1e-3)
    (batch,) = batches(1)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(own_part(batch)).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    values = log_values(clipper.last)
    assert values["autoclip/threshold"] == 1e-3
    assert values["autoclip/clipped"] == 1.0
    clipper.detach()
    clipper.detach()
    saved = clipper.state_dict()
    train(model, optimizer, batch, 1.0)
    assert clipper.state_dict() == saved
    assert not hasattr(optimizer, "clipper")
    attach(model, optimizer)


@pytest.mark.processes(2)
def test_bad_use_is_refused():
    model, optimizer = make(use_orig_params=True)
    with pytest.raises(ValueError, match="global_clipping=True"):
        attach(model, optimizer, global_clipping=False)
    with pytest.raises(ValueError, match="include_current=True cannot work"):
        attach(model, optimizer, include_current=True)
    with pytest.raises(TypeError, match="must be a FullyShardedDataParallel module"):
        attach(nn.Linear(1, 1), optimizer)
    with pytest.raises(TypeError, match="must be a FullyShardedDataParallel module"):
        attach(fully_shard(nn.Linear(2, 2)), optimizer)
    stranger = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(ValueError, match=r"1 of the optimizer's 1 parameters"):
        attach(model, stranger)
    attach(model, optimizer)
    with pytest.raises(RuntimeError, match="has a clipper already"):
        attach(model, optimizer)
    with pytest.raises(RuntimeError, match="has a clipper already"):
        QuantileClip.as_optimizer(optimizer)
    optimizer.grad_scale = optimizer.found_inf = torch.ones(())
    with pytest.raises(RuntimeError, match="unscale_"):
        optimizer.step()


@pytest.mark.processes(2)
@pytest.mark.parametrize("what", ["settings", "history"])
def test_another_clipper_on_one_process_is_an_error_on_all(what):
    model, optimizer = make()
    rank = dist.get_rank()
    clipper = attach(model, optimizer, quantile=0.5 + 0.1 * rank if what == "settings" else 0.5)
    if what == "history" and rank == 1:
        clipper.record(1.0)
    before = clipper.state_dict()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=f"different {what}.*Nothing was recorded"):
            train(model, optimizer, next(iter(batches())), 1.0)
    assert clipper.state_dict() == before
