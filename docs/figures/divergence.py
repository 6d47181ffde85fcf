"""Draw the plot of the first page from training runs: `python docs/figures/divergence.py`.

The network is that of docs/examples/digits.py, a GRU that reads handwritten digits pixel by pixel,
under SGD with momentum at a learning rate that is too large and at a usual one. Prints a table of
test accuracies and writes a PNG file beside this script. Takes a few minutes on one core.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn
from tqdm import tqdm

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent / "examples"))
from digits import BATCH, PixelGRU, load_data  # noqa: E402

from autoclip.torch import QuantileClip  # noqa: E402

EPOCHS = 14
SEEDS = range(5)
TOO_LARGE, USUAL = 0.7, 0.1
QUANTILES = (None, 0.9, 0.1)  # None trains without clipping


@dataclass(frozen=True)
class Run:
    """One training run: the loss of each step, and the test accuracy at the end."""

    losses: np.ndarray
    accuracy: float


def train(learning_rate: float, quantile: float | None, seed: int) -> Run:
    images, labels, test_images, test_labels = load_data()
    torch.manual_seed(seed)
    model = PixelGRU()
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9)
    if quantile is not None:
        QuantileClip.as_optimizer(optimizer, quantile=quantile, global_clipping=True)
    losses = []
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(labels)).split(BATCH):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    with torch.no_grad():
        accuracy = (model(test_images).argmax(1) == test_labels).float().mean().item()
    return Run(np.array(losses), accuracy)


def draw(unclipped: list[Run], clipped: list[Run], path: Path) -> None:
    """The training loss of every seed, averaged over ten steps."""
    figure, axis = plt.subplots(figsize=(7.5, 3.4))
    for runs, color, label in (
        (unclipped, "#d32f2f", "without clipping"),
        (clipped, "#3f51b5", "AutoClip, quantile=0.1"),
    ):
        for run in runs:
            smooth = np.convolve(run.losses, np.full(10, 0.1), mode="valid")
            axis.plot(np.arange(len(smooth)) + 10, smooth, color=color, lw=1.1, label=label)
            label = None  # one entry in the legend for all seeds
    axis.axhline(np.log(10), color="0.4", lw=0.9, ls=":", label="chance")
    axis.set_yscale("log")
    axis.set_yticks([0.5, 1, 2, 5, 10, 20, 50], ["0.5", "1", "2", "5", "10", "20", "50"])
    axis.minorticks_off()
    axis.set_xlabel("step")
    axis.set_ylabel("training loss")
    axis.set_title(f"SGD, learning rate {TOO_LARGE} (too large), {len(clipped)} seeds", loc="left")
    axis.legend(loc="upper left", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    torch.set_num_threads(1)
    plan = [(rate, quantile) for rate in (USUAL, TOO_LARGE) for quantile in QUANTILES]
    runs = {arm: [train(*arm, seed) for seed in SEEDS] for arm in tqdm(plan, unit="arm")}
    print(f"{'learning rate':<15}{'quantile':<10}test accuracy of seeds 0 to {SEEDS[-1]}")
    for (rate, quantile), group in runs.items():
        accuracies = "  ".join(f"{run.accuracy:5.1%}" for run in group)
        print(f"{rate:<15}{quantile or 'none':<10}{accuracies}")
    draw(runs[TOO_LARGE, None], runs[TOO_LARGE, 0.1], FOLDER / "divergence.png")


if __name__ == "__main__":
    main()
