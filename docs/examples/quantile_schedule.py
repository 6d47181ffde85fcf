"""Change the quantile while training: gentle first, strict later. `python quantile_schedule.py`."""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn

from autoclip.torch import QuantileClip

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 300
FIRST, LAST = 0.95, 0.3

digits = load_digits()
images = torch.tensor(digits.data / 16, dtype=torch.float32)
labels = torch.tensor(digits.target)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = QuantileClip.as_optimizer(
    torch.optim.AdamW(model.parameters(), lr=1e-2), quantile=FIRST, history_length=100
)

clipped = 0.0
for step in range(STEPS):
    # The new setting counts from this step on; the history stays.
    for group in optimizer.clipper.param_groups:
        group["quantile"] = FIRST + (LAST - FIRST) * step / STEPS
    batch = torch.randint(len(labels), (64,))
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
    loss.backward()
    optimizer.step()
    clipped += float(optimizer.clipper.last.spikes.double().mean())
    if (step + 1) % (STEPS // 5) == 0:
        quantile = optimizer.clipper.param_groups[0]["quantile"]
        share = clipped / (STEPS // 5)
        print(f"step {step + 1}: quantile {quantile:.2f}, {share:.0%} of the gradients clipped")
        clipped = 0.0
