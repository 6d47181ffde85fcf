"""DeepSpeed, ZeRO 0 to 3, in float32, bfloat16 and float16 with its loss scaler."""

from __future__ import annotations

import logging
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_training import (
    LEARNING_RATE,
    QUANTILE,
    STEPS,
    WEIGHTS,
    WIDTH,
    Reference,
    assert_equal_reports,
    assert_same_everywhere,
    batches,
    make_model,
    own_part,
)
from torch import Tensor

from autoclip.core import Quantile, Standard, log_values

deepspeed = pytest.importorskip("deepspeed")
FP16_UnfusedOptimizer = pytest.importorskip(
    "deepspeed.runtime.fp16.unfused_optimizer"
).FP16_UnfusedOptimizer

STAGES = [0, 1, 2, 3]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
INITIAL_SCALE_POWER = 6
# Rounding of 16-bit weights and gradients; the loss scale itself is a power of two.
TOLERANCES = {"fp32": 1e-5, "bf16": 0.05, "fp16": 0.01}


def make_engine(stage: int, dtype: str, **config: Any) -> Any:
    deepspeed.utils.logger.setLevel(logging.ERROR)
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if dtype == "bf16":
        settings["bf16"] = {"enabled": True}
    if dtype == "fp16":
        settings["fp16"] = {
            "enabled": True,
            "initial_scale_power": INITIAL_SCALE_POWER,
            "loss_scale_window": 3,
            "hysteresis": 1,
        }
    model = make_model()
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=LEARNING_RATE),
        config={**settings, **config},
        dist_init_required=False,
    )
    return engine


def attach(engine: Any, **settings: Any) -> Any:
    from autoclip.torch.deepspeed import attach

    return attach(engine, **{"quantile": QUANTILE, **settings})


def loss_of(engine: Any, batch: Tensor, weight: float) -> Tensor:
    dtype = next(engine.module.parameters()).dtype
    loss = engine(own_part(batch).to(dtype)).float().square().mean() * weight
    if isinstance(engine.optimizer, FP16_UnfusedOptimizer):
        # Without ZeRO, DeepSpeed 0.19 divides by the scale in a step, but forgets to multiply.
        loss = loss * loss_scale(engine)
    return loss


def train(engine: Any, batch: Tensor, weight: float) -> None:
    engine.backward(loss_of(engine, batch, weight))
    engine.step()


def master_weights(engine: Any) -> Tensor:
    """The float32 weights that the optimizer updates, all in one vector."""
    from deepspeed.utils import safe_get_full_fp32_param

    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_groups"):
        weights = [p for group in optimizer.fp32_groups for p in group]
    elif engine.zero_optimization_stage() == 0:
        weights = list(engine.module.parameters())
    else:
        weights = [safe_get_full_fp32_param(p) for p in engine.module.parameters()]
    return torch.cat([w.detach().float().flatten() for w in weights])


def norm_at(weights: Tensor, batch: Tensor, weight: float) -> float:
    """The norm of the gradient on the whole batch, in float32."""
    model = make_model()
    torch.nn.utils.vector_to_parameters(weights, model.parameters())
    (model(batch).square().mean() * weight).backward()
    return float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]))


def loss_scale(engine: Any) -> float:
    scale = getattr(engine.optimizer, "loss_scale", None)
    return 1.0 if scale is None else float(scale)


@pytest.mark.processes(1, 2)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stage", STAGES)
def test_trains_as_one_process_on_the_whole_batch(stage, dtype):
    engine, reference = make_engine(stage, dtype), Reference()
    clipper = attach(engine)
    assert engine.clipper is clipper
    clipped = 0
    for weight, batch in zip(WEIGHTS, batches()):
        before, scale = master_weights(engine), loss_scale(engine)
        limit = clipper.max_norm
        train(engine, batch, weight)
        reference.train(batch, weight)
        norm = float(clipper.last.norms[0])
        assert clipper.last.thresholds[0] == limit
        assert norm == pytest.approx(norm_at(before, batch, weight), rel=TOLERANCES[dtype])
        # DeepSpeed divides by a scale that has grown in this step already.
        unscaled = norm * scale / loss_scale(engine)
        update = (master_weights(engine) - before).norm()
        assert update == pytest.approx(LEARNING_RATE * min(unscaled, limit), rel=1e-3)
        clipped += norm > limit
        if dtype == "fp32":
            assert_equal_reports(clipper, reference.clipper, TOLERANCES[dtype])
            theirs = torch.cat([p.detach().flatten() for p in reference.model.parameters()])
            torch.testing.assert_close(master_weights(engine), theirs, rtol=1e-5, atol=1e-6)
    assert clipped >= 3
    assert loss_scale(engine) > (2**INITIAL_SCALE_POWER if dtype == "fp16" else 0)
    assert_same_everywhere(clipper)


@pytest.mark.processes(1, 2)
@pytest.mark.parametrize("stage", STAGES)
def test_a_step_that_the_loss_scaler_skips_records_nothing(stage):
    engine = make_engine(stage, "fp16")
    clipper = attach(engine)
    first, second, third = batches(3)
    train(engine, first, 1.0)
    saved, weights = clipper.state_dict(), master_weights(engine)
    train(engine, second, 1e30)
    assert not engine.was_step_applied()
    assert clipper.state_dict() == saved
    torch.testing.assert_close(master_weights(engine), weights, rtol=0, atol=0)
    train(engine, third, 1.0)
    assert clipper.state_dict() != saved
    assert math.isfinite(clipper.max_norm)
    assert_same_everywhere(clipper)


@pytest.mark.processes(1)
@pytest.mark.parametrize("stage", STAGES)
def test_a_step_is_one_record_whatever_is_accumulated(stage):
    engine, reference = make_engine(stage, "fp32", gradient_accumulation_steps=2), Reference()
    clipper = attach(engine)
    for weight, batch in zip(WEIGHTS, batches()):
        for part in batch.chunk(2):
            train(engine, part, weight)
        reference.train(batch, weight)
        assert_equal_reports(clipper, reference.clipper, 1e-5)
    assert int(clipper.export_state().by_row()[1][0]) == STEPS


@pytest.mark.processes(1, 2)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stage", STAGES)
def test_the_history_travels_in_the_engines_checkpoints(stage, dtype, tmp_path):
    import torch.distributed as dist

    folder = str(Path(tmp_path) / f"{dist.get_world_size()}")
    engine = make_engine(stage, dtype)
    clipper = attach(engine)
    steps = list(zip(WEIGHTS, batches()))
    for weight, batch in steps[:4]:
        train(engine, batch, weight)
    engine.save_checkpoint(folder, client_state={"epoch": 3})
    saved = clipper.state_dict()
    for weight, batch in steps[4:]:
        train(engine, batch, weight)

    other = make_engine(stage, dtype)
    restored = attach(other)
    _, client_state = other.load_checkpoint(folder)
    assert client_state["epoch"] == 3
    assert "autoclip" not in client_state
    assert restored.state_dict() == saved
    for weight, batch in steps[4:]:
        train(other, batch, weight)
    assert restored.state_dict() == clipper.state_dict()
    torch.testing.assert_close(master_weights(other), master_weights(engine), rtol=0, atol=0)

    fresh = make_engine(stage, dtype)
    unused = attach(fresh)
    fresh.load_checkpoint(folder, load_module_only=True)
    assert unused.max_norm == math.inf


@pytest.mark.processes(1)
def test_a_checkpoint_without_or_with_another_history(tmp_path):
    plain = make_engine(2, "fp32")
    plain.save_checkpoint(str(tmp_path), tag="plain")
    engine = make_engine(2, "fp32")
    clipper = attach(engine)
    train(engine, next(batches()), 1.0)
    saved = clipper.state_dict()
    with pytest.warns(UserWarning, match="has no 'autoclip' entry in its client state"):
        engine.load_checkpoint(str(tmp_path), tag="plain")
    engine.save_checkpoint(str(tmp_path), tag="ours")
    assert clipper.state_dict() == saved
    clipper.detach()
    from autoclip.torch.deepspeed import attach as attach_rule

    other = attach_rule(engine, Standard(2.0))
    with pytest.warns(UserWarning, match="rule"):
        engine.load_checkpoint(str(tmp_path), tag="ours")
    assert other.export_state().by_row()[1].tolist() == [1]


@pytest.mark.processes(1)
@pytest.mark.parametrize("stage", STAGES)
def test_detaching_gives_the_engine_its_own_clipping(stage):
    engine, untouched = make_engine(stage, "fp32"), make_engine(stage, "fp32")
    clipper = attach(engine, max_norm=1e-3)
    clipper.detach()
    clipper.detach()
    for batch in batches(2):
        train(engine, batch, 5.0)
        train(untouched, batch, 5.0)
    assert clipper.state_dict() == attach(untouched, max_norm=1e-3).state_dict()
    torch.testing.assert_close(master_weights(engine), master_weights(untouched), rtol=0, atol=0)
    assert "clipper" not in vars(engine)


@pytest.mark.processes(1)
def test_a_step_without_gradients_records_nothing():
    """Without ZeRO; with it DeepSpeed raises KeyError."""
    engine = make_engine(0, "fp32")
    clipper = attach(engine)
    engine.step()
    assert clipper.max_norm == math.inf


@pytest.mark.processes(1)
def test_rules_settings_and_logging():
    from autoclip.torch.deepspeed import attach as attach_rule

    engine = make_engine(1, "fp32")
    clipper = attach_rule(engine, Quantile(0.5, factor=0.5), 10, max_norm=100.0, warmup_steps=1)
    assert clipper.max_norm == 100.0
    first, second = batches(2)
    train(engine, first, 1.0)
    limit = clipper.max_norm
    train(engine, second, 50.0)
    values = log_values(clipper.last)
    assert values["autoclip/threshold"] == limit < values["autoclip/total_norm"]
    assert values["autoclip/clipped"] == 1.0


@pytest.mark.processes(1)
def test_bad_use_is_refused():
    from autoclip.torch import QuantileClip
    from autoclip.torch.deepspeed import attach as attach_rule

    engine = make_engine(1, "fp32")
    for settings, message in [
        ({"global_clipping": False}, "global_clipping=True"),
        ({"group_clipping": True}, "group_clipping=True cannot work"),
        ({"include_current": True}, "include_current=True cannot work"),
        ({"on_spike": "skip"}, "on_spike='skip' cannot work"),
        ({"on_nonfinite": "zero"}, "on_nonfinite='zero' cannot work"),
        ({"quantile": 2.0}, "quantile"),
    ]:
        with pytest.raises(ValueError, match=message):
            attach(engine, **settings)
    with pytest.raises(TypeError, match="unexpected keyword argument 'quantil'"):
        attach_rule(engine, quantil=0.5)
    with pytest.raises(TypeError, match=r"must be a DeepSpeed engine.*Linear"):
        attach_rule(torch.nn.Linear(1, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(engine)
    with pytest.raises(RuntimeError, match="has a clipper already"):
        attach(engine)

    with pytest.warns(UserWarning, match=r"gradient_clipping=0\.5.*replaces it"):
        attach(make_engine(1, "fp32", gradient_clipping=0.5))
    blind = make_engine(
        2, "fp32", gradient_clipping=0.0, zero_optimization={"stage": 2, "compute_grad_norm": False}
    )
    with pytest.raises(RuntimeError, match="compute_grad_norm"):
        attach(blind)

    model = make_model()
    optimizer = QuantileClip.as_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config={"train_micro_batch_size_per_gpu": 1},
        dist_init_required=False,
    )
    with pytest.raises(RuntimeError, match="has a clipper already"):
        attach(engine)
    without = torch.nn.Linear(WIDTH, 1)
    engine, *_ = deepspeed.initialize(
        model=without, config={"train_micro_batch_size_per_gpu": 1}, dist_init_required=False
    )
    with pytest.raises(RuntimeError, match="no optimizer"):
        attach(engine)
