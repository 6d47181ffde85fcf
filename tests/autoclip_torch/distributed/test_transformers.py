"""The Hugging Face Trainer with FSDP2, whose checkpoints drop what they do not know."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from oracles import assert_same_everywhere, full
from torch import Tensor
from torch.distributed.tensor import DTensor

from autoclip.torch import QuantileClip

STEPS = 6


class Examples(torch.utils.data.Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return 32

    def __getitem__(self, i: int) -> dict[str, Any]:
        words = torch.randint(1, 20, (5,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": words, "labels": i % 2}


def make_trainer(by: str, folder: Path) -> Any:
    """As in `test_accelerate`: Accelerate itself takes up FSDP on accelerators only."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

    from autoclip.torch.transformers import AutoClipCallback

    rank, count = str(dist.get_rank()), str(dist.get_world_size())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=count, LOCAL_WORLD_SIZE=count)
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0")
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=20,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=8,
            max_position_embeddings=8,
        )
    )
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        save_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        max_grad_norm=0,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=3,
    )
    settings = {"quantile": 0.5}
    optimizers: Any = (None, None)
    if by == "optimizers":
        optimizers = (
            QuantileClip.as_optimizer(torch.optim.Adam(model.parameters()), **settings),
            None,
        )
    callback = AutoClipCallback() if by == "optimizers" else AutoClipCallback(**settings)
    trainer = Trainer(
        model, args, train_dataset=Examples(), optimizers=optimizers, callbacks=[callback]
    )
    for state in (PartialState(), trainer.accelerator.state):
        state.distributed_type = DistributedType.FSDP
    trainer.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="NO_WRAP", cpu_ram_efficient_loading=False
    )
    trainer.is_fsdp_enabled = True
    return trainer


def weights(trainer: Any) -> Tensor:
    return torch.cat([full(p.detach()).flatten() for p in trainer.model.parameters()])


@pytest.mark.processes(2)
@pytest.mark.parametrize("by", [pytest.param("optimizers", marks=pytest.mark.nightly), "callback"])
@pytest.mark.filterwarnings("ignore")
def test_resuming_is_as_never_stopping(by, tmp_path):
    folder = Path(tmp_path)
    whole = make_trainer(by, folder)
    whole.train()
    assert all(isinstance(p, DTensor) for p in whole.model.parameters())
    expected = whole.optimizer.optimizer.clipper
    assert set(expected.export_state().by_row()[1]) == {STEPS}
    assert_same_everywhere(expected)
    checkpoint = folder / "checkpoint-3"
    assert not (checkpoint / "optimizer.pt").exists()
    assert (checkpoint / "autoclip.safetensors").exists()

    rest = make_trainer(by, folder)
    rest.train(resume_from_checkpoint=str(checkpoint))
    assert rest.optimizer.optimizer.clipper.state_dict() == expected.state_dict()
    assert torch.equal(weights(rest), weights(whole))
