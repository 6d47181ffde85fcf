"""Train a recurrent network on real data three ways: unclipped, a fixed `max_norm`, AutoClip.

A GRU reads scikit-learn's handwritten digits pixel by pixel, 64 steps an image, a task in which
gradients have rare spikes. Prints a table, saves a plot of the gradient norms, and shows that a
clipper's state can be saved, loaded and trained on. Run it with `hatch run demo:run`.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm

from autoclip.torch import QuantileClip

ARMS = ("no clipping", "max_norm=1.0", "AutoClip")
OUTPUT = Path("output")
BATCH = 64
LEARNING_RATE = 1e-2


class PixelGRU(nn.Module):
    """Reads an image as a sequence of 64 grey values and names the digit."""

    def __init__(self, hidden: int = 48) -> None:
        super().__init__()
        self.gru = nn.GRU(1, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 10)

    def forward(self, images: Tensor) -> Tensor:
        states, _ = self.gru(images)
        return self.head(states[:, -1])


@dataclass
class Run:
    """The results of one training run."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    accuracy: float = 0.0
    norms: list[float] = field(default_factory=list)
    thresholds: list[float] = field(default_factory=list)

    @property
    def clipped(self) -> np.ndarray:
        return np.array(self.norms) > np.array(self.thresholds)


def load_data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images as float32[n, 64, 1] in [0, 1] and labels as int64[n]; a quarter is for testing."""
    digits = load_digits()
    images = torch.tensor(digits.data / 16.0, dtype=torch.float32)[..., None]
    labels = torch.tensor(digits.target)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=0.25, random_state=0, stratify=digits.target
    )
    return images[train], labels[train], images[test], labels[test]


def start(arm: str, seed: int) -> Run:
    """A fresh model and its optimizer. AutoClip is one line."""
    torch.manual_seed(seed)
    model = PixelGRU()
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    if arm == "AutoClip":
        optimizer = QuantileClip.as_optimizer(optimizer, global_clipping=True)
    return Run(model, optimizer)


def train(run: Run, arm: str, data: tuple[Tensor, ...], epochs: int, progress: tqdm) -> None:
    """Train for some epochs and measure the accuracy on the test images."""
    images, labels, test_images, test_labels = data
    for _ in range(epochs):
        for batch in torch.randperm(len(labels)).split(BATCH):
            loss = nn.functional.cross_entropy(run.model(images[batch]), labels[batch])
            run.optimizer.zero_grad()
            loss.backward()
            if arm == "max_norm=1.0":
                norm = nn.utils.clip_grad_norm_(run.model.parameters(), max_norm=1.0)
                threshold = 1.0
            elif arm == "no clipping":
                norm = nn.utils.get_total_norm([p.grad for p in run.model.parameters()])
                threshold = float("inf")
            run.optimizer.step()
            if arm == "AutoClip":
                last = run.optimizer.clipper.last
                norm, threshold = last.norms[0], float(last.thresholds[0])
            run.norms.append(float(norm))
            run.thresholds.append(threshold)
            progress.update()
    with torch.no_grad():
        run.accuracy = (run.model(test_images).argmax(1) == test_labels).float().mean().item()


def table(runs: dict[str, list[Run]]) -> str:
    """One line an arm: mean and standard deviation over the seeds, share of steps clipped."""
    lines = [f"{'':<14}{'test accuracy':>18}{'steps clipped':>16}"]
    for arm, group in runs.items():
        accuracy = np.array([run.accuracy for run in group]) * 100
        clipped = np.mean([run.clipped.mean() for run in group]) * 100
        lines.append(
            f"{arm:<14}{f'{accuracy.mean():.1f} ± {accuracy.std():.1f} %':>18}{clipped:>14.0f} %"
        )
    return "\n".join(lines)


def plot(runs: dict[str, list[Run]], path: Path) -> None:
    """Gradient norms of the first seed, with the thresholds and the clipped steps marked."""
    figure, axes = plt.subplots(len(runs), 1, figsize=(9, 8), sharex=True, sharey=True)
    for axis, (arm, group) in zip(axes, runs.items()):
        run = group[0]
        steps = np.arange(len(run.norms))
        axis.plot(steps, run.norms, lw=0.6, color="0.55", label="gradient norm")
        axis.plot(
            steps[run.clipped], np.array(run.norms)[run.clipped], ".", ms=3, color="tab:red",
            label=f"clipped ({run.clipped.mean():.0%} of the steps)",
        )  # fmt: skip
        if arm != "no clipping":
            axis.plot(steps, run.thresholds, color="tab:blue", lw=1.5, label="threshold")
        axis.set_yscale("log")
        axis.set_ylabel("norm")
        axis.set_title(f"{arm}: test accuracy {run.accuracy:.1%}", loc="left", fontsize=10)
        axis.legend(loc="lower right", fontsize=8, ncols=3)
    axes[-1].set_xlabel("step")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def resume(run: Run, data: tuple[Tensor, ...], path: Path, progress: tqdm) -> str:
    """Save a clipper's state, load it into a new one, and train on with that."""
    clipper = run.optimizer.clipper
    clipper.save(path)
    optimizer = torch.optim.Adam(run.model.parameters(), lr=1e-3)
    resumed = Run(run.model, QuantileClip.as_optimizer(
        optimizer, global_clipping=True
    ))  # fmt: skip
    resumed.optimizer.clipper.load(path)
    same = resumed.optimizer.clipper.state_dict() == clipper.state_dict()
    train(resumed, "AutoClip", data, 1, progress)
    return (
        f"Saved the clipper's history to {path} ({path.stat().st_size} bytes) and loaded it into\n"
        f"a new clipper: {'the same' if same else 'NOT the same'} state. After one more epoch the "
        f"threshold went from\n{run.thresholds[-1]:.3f} to {resumed.thresholds[-1]:.3f}, "
        f"and the test accuracy is {resumed.accuracy:.1%}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="runs of each arm")
    parser.add_argument("--epochs", type=int, default=14, help="epochs of each run")
    options = parser.parse_args()
    OUTPUT.mkdir(exist_ok=True)
    data = load_data()
    print(
        f"A GRU reads {len(data[1])} images of digits pixel by pixel and is tested on "
        f"{len(data[3])} others.\nAdam, learning rate {LEARNING_RATE}, {options.epochs} epochs, "
        f"seeds 0 to {options.seeds - 1}. Compared: {', '.join(ARMS)}\n(AutoClip: "
        "QuantileClip.as_optimizer(optimizer, global_clipping=True), quantile 0.9).",
        flush=True,
    )
    # The network is so small that threads would wait for one another most of the time.
    torch.set_num_threads(1)
    batches = -(-len(data[1]) // BATCH)
    total = (len(ARMS) * options.seeds * options.epochs + 1) * batches
    runs: dict[str, list[Run]] = {arm: [] for arm in ARMS}
    with tqdm(total=total, unit="step", mininterval=1.0) as progress:
        for seed in range(options.seeds):
            for arm in ARMS:
                progress.set_description(f"{arm}, seed {seed}")
                run = start(arm, seed)
                train(run, arm, data, options.epochs, progress)
                runs[arm].append(run)
        progress.set_description("resumed")
        message = resume(runs["AutoClip"][0], data, OUTPUT / "digits.autoclip", progress)
    plot(runs, OUTPUT / "digits.png")
    print(f"\n{table(runs)}\n\n{message}\nPlot: {OUTPUT / 'digits.png'}")


if __name__ == "__main__":
    main()
