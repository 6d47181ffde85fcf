"""DeepSpeed with ZeRO. `deepspeed deepspeed_zero.py`, or with torchrun; STEPS is an argument."""

import sys

import deepspeed
import torch
from sklearn.datasets import load_digits
from torch import nn

from autoclip.core import log_values
from autoclip.torch.deepspeed import attach

STEPS = next((int(word) for word in sys.argv[1:] if word.isdigit()), 200)
digits = load_digits()
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
engine, *_ = deepspeed.initialize(
    model=model,
    optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2),
    config={
        "train_micro_batch_size_per_gpu": 64,
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
    },
)
clipper = attach(engine, quantile=0.9)  # global: the engine measures the norm
images = torch.tensor(digits.data / 16, dtype=torch.float32, device=engine.device)
labels = torch.tensor(digits.target, device=engine.device)
for _ in range(STEPS):
    batch = torch.randint(len(labels), (64,), device=engine.device)
    loss = nn.functional.cross_entropy(engine(images[batch]), labels[batch])
    engine.backward(loss)
    engine.step()
print(log_values(clipper.last))
engine.save_checkpoint("checkpoints")  # with the history
