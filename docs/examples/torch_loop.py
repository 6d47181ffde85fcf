"""A plain PyTorch loop: attach, train, log, save, resume. `python torch_loop.py [EPOCHS]`."""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn

from autoclip.torch import QuantileClip
from autoclip.torch.logging import log_values

EPOCHS = int(sys.argv[1]) if len(sys.argv) > 1 else 10
digits = load_digits()
images = torch.tensor(digits.data / 16, dtype=torch.float32)
labels = torch.tensor(digits.target)


def make() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return model, QuantileClip.as_optimizer(optimizer, quantile=0.9, global_clipping=True)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, epochs: int) -> None:
    for epoch in range(epochs):
        for batch in torch.randperm(len(labels)).split(64):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
            loss.backward()
            optimizer.step()  # clips, then updates
        values = ", ".join(
            f"{name} {value:.3f}" for name, value in log_values(optimizer.clipper).items()
        )
        print(f"epoch {epoch}: loss {loss.item():.3f}, {values}")


model, optimizer = make()
train(model, optimizer, EPOCHS)
torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, "checkpoint.pt")

model, optimizer = make()
checkpoint = torch.load("checkpoint.pt")
model.load_state_dict(checkpoint["model"])
optimizer.load_state_dict(checkpoint["optimizer"])  # weights' statistics and the history
print("resumed with the threshold", float(optimizer.clipper.thresholds[0]))
train(model, optimizer, 1)
