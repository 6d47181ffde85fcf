"""Trainers with DeepSpeed and FSDP1: the callbacks attach, log, save and resume by themselves.

Accelerate and Lightning take up these engines on accelerators only, and refuse a CPU by its name or
fall back to DDP. So the tests get around that one check; all else is the trainers' own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from engine_training import (
    LEARNING_RATE,
    NEEDS_DEEPSPEED,
    QUANTILE,
    WIDTH,
    Reference,
    assert_equal_reports,
    assert_same_everywhere,
    batches,
    make_model,
    own_part,
)
from rules import Mad
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from autoclip.core import Quantile, Rule, Standard
from autoclip.torch import Clipper, StandardClip

STEPS = 6
ZERO = [pytest.param(f"ZeRO {stage}", marks=NEEDS_DEEPSPEED) for stage in range(4)]
NAMES = {f"autoclip/{name}" for name in ("total_norm", "clipped_norm", "clipped", "threshold")}
CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 2,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}
GLOBAL = {"quantile": QUANTILE, "global_clipping": True}


def config(stage: int) -> dict[str, Any]:
    return {**CONFIG, "zero_optimization": {"stage": stage}}


def window_of(clipper: Any) -> list[float]:
    """The recorded norms, oldest first."""
    return clipper.export_state().by_row()[0][0].tolist()


# -- the Hugging Face Trainer --------------------------------------------------------------------


class Regression(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = make_model()

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        output = self.net(x)
        return {"loss": (output - labels).square().mean(), "logits": output}


class Examples(torch.utils.data.Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return 32

    def __getitem__(self, i: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(i)
        x = torch.randn(WIDTH, generator=generator)
        return {"x": x, "labels": torch.randn(3, generator=generator) * (1 + i % 5)}


def make_trainer(engine: str, folder: Path, **settings: Any) -> Any:
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType
    from transformers import Trainer, TrainingArguments

    from autoclip.torch.transformers import AutoClipCallback

    AcceleratorState._reset_state(True)
    stage = int(engine[-1]) if engine.startswith("ZeRO") else None
    model = Regression()
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        save_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        optim="adamw_torch",
        max_grad_norm=0,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=stage is None,
        seed=3,
        deepspeed=None if stage is None else config(stage),
    )
    if stage is not None:  # without CUDA, Accelerate takes each process for the only one
        state = PartialState()
        state.num_processes = torch.distributed.get_world_size()
        state.process_index = state.local_process_index = torch.distributed.get_rank()
    callback = AutoClipCallback(**(settings or GLOBAL))
    trainer = Trainer(model, args, train_dataset=Examples())
    callback.add_to(trainer)
    if stage is None:
        for state in (PartialState(), trainer.accelerator.state):
            state.distributed_type = DistributedType.FSDP
        trainer.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=1,
            auto_wrap_policy="NO_WRAP",
            cpu_ram_efficient_loading=False,
            state_dict_type="SHARDED_STATE_DICT",
        )
        trainer.accelerator.state.device = torch.device("cpu")
        trainer.is_fsdp_enabled = True
    return trainer


def clipper_of(trainer: Any) -> Any:
    from autoclip.torch.transformers import AutoClipCallback

    callbacks = trainer.callback_handler.callbacks
    (clipper,) = next(each._clippers for each in callbacks if isinstance(each, AutoClipCallback))
    return clipper


@pytest.mark.processes(2)
@pytest.mark.parametrize("engine", [*ZERO, "FSDP1"])
def test_the_hugging_face_trainer_resumes_as_never_stopping(engine, tmp_path):
    whole = make_trainer(engine, Path(tmp_path))
    whole.train()
    expected = clipper_of(whole)
    assert int(expected.export_state().by_row()[1][0]) == STEPS
    assert_same_everywhere(expected)
    logged = [log for log in whole.state.log_history if "loss" in log]
    assert len(logged) == STEPS
    assert all(log.keys() >= NAMES for log in logged)
    checkpoint = Path(tmp_path) / "checkpoint-3"
    assert (checkpoint / "autoclip.safetensors").exists()

    rest = make_trainer(engine, Path(tmp_path))
    rest.train(resume_from_checkpoint=str(checkpoint))
    ours, theirs = window_of(clipper_of(rest)), window_of(expected)
    # Without AutoClip, too, training goes on differently after the trainer has resumed with FSDP1.
    same = 4 if engine == "FSDP1" else STEPS
    assert ours[:same] == theirs[:same]
    assert len(ours) == STEPS

    parameter_wise = make_trainer(engine, Path(tmp_path), quantile=0.5)
    with pytest.raises(ValueError, match="global_clipping=True"):
        parameter_wise.train()


class MadClip(Clipper):
    """A clipper of a user's own rule under a name of its own."""

    def __init__(self, parameters, deviations=3.0, **settings):
        super().__init__(parameters, Mad(deviations), **settings)


@pytest.mark.processes(1)
def test_an_engine_clips_by_the_rule_of_the_callback(tmp_path):
    cases: list[tuple[Rule, dict[str, Any]]] = [
        (Quantile(0.5), {"quantile": 0.5}),
        (Standard(1.5), {"clipper_class": StandardClip, "deviations": 1.5}),
        (Mad(3.0), {"clipper_class": MadClip}),
        (Mad(1.5), {"clipper_class": MadClip, "deviations": 1.5}),
        (Mad(1.5), {"rule": Mad(1.5)}),
    ]
    for i, (rule, settings) in enumerate(cases):
        settings.update(global_clipping=True, history_length=4)
        trainer = make_trainer("FSDP1", Path(tmp_path) / str(i), **settings)
        trainer.train()
        clipper = clipper_of(trainer)
        assert clipper.rule == rule
        assert len(window_of(clipper)) == 4


# -- Accelerate ----------------------------------------------------------------------------------


@NEEDS_DEEPSPEED
@pytest.mark.processes(2)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_accelerate_with_a_deepspeed_plugin(stage):
    from accelerate import Accelerator, DeepSpeedPlugin

    from autoclip.torch.deepspeed import attach

    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config(stage)))
    model, reference = make_model(), Reference()
    engine, optimizer = accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    )
    clipper = attach(engine, quantile=QUANTILE)
    for step, batch in enumerate(batches(4)):
        loss = engine(own_part(batch)).square().mean() * (1 + step)
        accelerator.backward(loss)
        optimizer.step()
        reference.train(batch, 1 + step)
        assert_equal_reports(clipper, reference.clipper, 1e-5)
    assert_same_everywhere(clipper)


def make_fsdp1_accelerator() -> Any:
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True)
    for state in (PartialState(), accelerator.state):
        state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=1,
        auto_wrap_policy="NO_WRAP",
        use_orig_params=True,
        cpu_ram_efficient_loading=False,
        state_dict_type="SHARDED_STATE_DICT",
    )
    accelerator.state.device = torch.device("cpu")
    return accelerator


@pytest.mark.processes(2)
def test_accelerate_with_fsdp1(tmp_path):
    from autoclip.torch import QuantileClip
    from autoclip.torch.fsdp import attach

    accelerator, model, reference = make_fsdp1_accelerator(), make_model(), Reference()
    model, optimizer = accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    )
    assert isinstance(model, FSDP)
    with pytest.raises(TypeError, match=r"Attach to the optimizer inside.*`\.optimizer`"):
        attach(model, optimizer, quantile=QUANTILE)
    clipper = attach(model, optimizer.optimizer, quantile=QUANTILE)
    accelerator.register_for_checkpointing(clipper)

    def train(step: int, batch: Tensor) -> None:
        optimizer.zero_grad()
        accelerator.backward(model(own_part(batch)).square().mean() * (1 + step))
        optimizer.step()

    for step, batch in enumerate(batches(4)):
        train(step, batch)
        reference.train(batch, 1 + step)
        assert_equal_reports(clipper, reference.clipper, 1e-5)
    assert_same_everywhere(clipper)
    accelerator.save_state(tmp_path)
    saved = clipper.state_dict()
    train(4, next(batches(1)))
    assert clipper.state_dict() != saved
    with pytest.warns(UserWarning, match="has no 'autoclip' entry"):  # the optimizer's own state
        accelerator.load_state(tmp_path)
    assert clipper.state_dict() == saved

    # Parameter-wise, and attached before: refused when it would clip.
    accelerator, plain = make_fsdp1_accelerator(), make_model()
    attached = QuantileClip.as_optimizer(torch.optim.SGD(plain.parameters(), lr=LEARNING_RATE))
    model, optimizer = accelerator.prepare(plain, attached)
    accelerator.backward(model(own_part(next(batches(1)))).square().mean())
    with pytest.raises(RuntimeError, match=r"autoclip\.torch\.fsdp\.attach"):
        optimizer.step()


# -- Lightning -----------------------------------------------------------------------------------


def make_lightning(engine: str, folder: Path, log: list[dict[str, Any]], **settings: Any) -> Any:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.loggers.logger import DummyLogger
    from lightning.pytorch.strategies import (
        DeepSpeedStrategy,
        FSDPStrategy,
        ModelParallelStrategy,
        ParallelStrategy,
    )

    from autoclip.torch.lightning import AutoClipCallback

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = make_model()

        def configure_model(self) -> None:
            if engine == "FSDP2":
                fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

        def training_step(self, batch: dict[str, Tensor]) -> Tensor:
            return (self.net(batch["x"]) - batch["labels"]).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.trainer.model.parameters(), lr=1e-2)

    class OnCpuDeepSpeed(DeepSpeedStrategy):
        def setup_environment(self) -> None:
            ParallelStrategy.setup_environment(self)

        def setup_distributed(self) -> None:
            self.set_world_ranks()

        @property
        def root_device(self) -> torch.device:
            return torch.device("cpu", 0)

    class OnCpuFSDP(FSDPStrategy):
        def _setup_model(self, model: torch.nn.Module) -> FSDP:
            return FSDP(model, device_id=torch.device("cpu"), use_orig_params=True)

    class Logger(DummyLogger):
        def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
            log.append(dict(metrics))

    strategy: Any
    if engine == "FSDP1":
        strategy = OnCpuFSDP(process_group_backend="gloo", state_dict_type="sharded")
    elif engine == "FSDP2":
        strategy = ModelParallelStrategy(
            dist.get_world_size(), tensor_parallel_size=1, process_group_backend="gloo"
        )
    else:
        strategy = OnCpuDeepSpeed(config=config(int(engine[-1])), process_group_backend="gloo")
    trainer = Trainer(
        accelerator="cpu",
        devices=dist.get_world_size(),
        strategy=strategy,
        max_steps=STEPS,
        limit_train_batches=STEPS // 2,  # the checkpoint is made between two epochs
        log_every_n_steps=1,
        logger=Logger(),
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            AutoClipCallback(**(settings or GLOBAL)),
            ModelCheckpoint(str(folder), filename="{step}", every_n_train_steps=3, save_top_k=-1),
        ],
    )
    loader = torch.utils.data.DataLoader(Examples(), batch_size=4)
    return trainer, Module(), loader


@pytest.mark.processes(2)
@pytest.mark.parametrize("engine", [*ZERO, "FSDP1", "FSDP2"])
def test_lightning_resumes_as_never_stopping(engine, tmp_path):
    log: list[dict[str, Any]] = []
    trainer, module, loader = make_lightning(engine, Path(tmp_path), log)
    trainer.fit(module, loader)
    (expected,) = trainer.callbacks[0]._clippers
    assert_same_everywhere(expected)
    assert int(expected.export_state().by_row()[1][0]) == STEPS
    assert sum(metrics.keys() >= NAMES for metrics in log) == STEPS
    if engine == "FSDP1":
        assert isinstance(trainer.strategy.model, FSDP)
    saved = expected.state_dict()

    trainer, module, loader = make_lightning(engine, Path(tmp_path), log)
    trainer.fit(module, loader, ckpt_path=str(Path(tmp_path) / "step=3.ckpt"))
    (restored,) = trainer.callbacks[0]._clippers
    assert restored.state_dict() == saved
    if engine == "FSDP2":  # which clips each parameter, too
        assert all(isinstance(p, DTensor) for p in module.parameters())
        return

    trainer, module, loader = make_lightning(engine, Path(tmp_path), log, quantile=0.5)
    with pytest.raises(ValueError, match="global_clipping=True"):
        trainer.fit(module, loader)
