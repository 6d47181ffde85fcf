"""Draw the figures of docs/settings.md from training runs: `python docs/figures/settings.py`.

The network is that of docs/examples/digits.py, a GRU that reads handwritten digits pixel by pixel.
Takes about two minutes on one core and writes PNG files beside this script.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
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

from autoclip.core import History, Quantile  # noqa: E402
from autoclip.torch import QuantileClip  # noqa: E402

EPOCHS = 14
GRAY, BLUE, RED, GREEN = "0.6", "#3f51b5", "#d32f2f", "#2e7d32"
MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-2)


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


class Trace:
    """One training run, step by step.

    Args:
        make_optimizer: makes the optimizer.
        settings: of a `QuantileClip`; None trains without clipping.
    """

    def __init__(self, make_optimizer: MakeOptimizer, settings: dict[str, object] | None) -> None:
        self.norms: list[float] = []  # of all gradients together, before clipping
        self.thresholds: list[float] = []  # of the first row
        self.cosines: list[float] = []  # between the gradient before and after clipping
        self.updates: list[float] = []  # the lengths of the weights' updates
        images, labels, *_ = load_data()
        torch.manual_seed(0)
        model = PixelGRU()
        parameters = list(model.parameters())
        optimizer = make_optimizer(parameters)
        clipper = None if settings is None else QuantileClip(parameters, **settings)  # type: ignore[arg-type]
        for _ in range(EPOCHS):
            for batch in torch.randperm(len(labels)).split(BATCH):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
                before = nn.utils.parameters_to_vector([p.grad for p in parameters])
                weights = nn.utils.parameters_to_vector(parameters).detach().clone()
                if clipper is not None:
                    clipper.step()
                    self.thresholds.append(float(clipper.last.thresholds[0]))
                after = nn.utils.parameters_to_vector([p.grad for p in parameters])
                optimizer.step()
                moved = nn.utils.parameters_to_vector(parameters).detach() - weights
                self.norms.append(float(before.norm()))
                self.cosines.append(float(nn.functional.cosine_similarity(before, after, dim=0)))
                self.updates.append(float(moved.norm()))


def save(figure: plt.Figure, name: str) -> None:
    figure.tight_layout()
    figure.savefig(FOLDER / f"{name}.png", dpi=110)
    plt.close(figure)


def draw_quantiles(runs: dict[float, Trace]) -> None:
    """Norms, threshold and clipped steps for three quantiles."""
    figure, axes = plt.subplots(len(runs), 1, figsize=(7.5, 7), sharex=True, sharey=True)
    for axis, (quantile, run) in zip(axes, runs.items()):
        norms, thresholds = np.array(run.norms), np.array(run.thresholds)
        steps = np.arange(len(norms))
        clipped = norms > thresholds
        axis.plot(steps, norms, color=GRAY, lw=0.8, label="norm before clipping")
        axis.plot(steps[clipped], norms[clipped], ".", color=RED, ms=3, label="clipped")
        axis.plot(steps, thresholds, color=BLUE, lw=1.6, label="threshold")
        axis.set_yscale("log")
        axis.set_ylabel("gradient norm")
        axis.set_title(
            f"quantile={quantile}: {clipped.mean():.0%} of the steps clipped", loc="left"
        )
    axes[0].set_ylim(top=60)  # room for the legend
    axes[0].legend(loc="upper right", ncols=3, fontsize=8)
    axes[-1].set_xlabel("step")
    save(figure, "quantiles")


def draw_windows(norms: list[float], lengths: tuple[int, ...] = (20, 100, 1000)) -> None:
    """The threshold of one quantile under windows of several lengths, over the same norms."""
    # A change of the scale in the middle, as a new learning rate or a new data set makes it.
    middle = len(norms) // 2
    trace = np.array(norms) * np.where(np.arange(len(norms)) < middle, 1.0, 0.1)
    figure, axis = plt.subplots(figsize=(7.5, 3.6))
    axis.plot(trace, color=GRAY, lw=0.8, label="norm")
    for length, color in zip(lengths, (GREEN, RED, BLUE)):
        history = History(1, Quantile(0.5), history_length=length)
        thresholds = [float(history.record([norm]).thresholds[0]) for norm in trace]
        axis.plot(thresholds, color=color, lw=1.6, label=f"history_length={length}")
    axis.axvline(middle, color="black", lw=0.8, ls=":")
    axis.set_yscale("log")
    axis.set_xlabel("step")
    axis.set_ylabel("threshold, quantile=0.5")
    axis.legend(loc="lower left", fontsize=8)
    axis.set_title("All norms become ten times smaller at the dotted line", loc="left")
    save(figure, "windows")


def draw_modes(parameter_wise: dict[float, Trace], everything: dict[float, Trace]) -> None:
    """The angle between the gradient before and after clipping."""
    figure, axes = plt.subplots(1, len(parameter_wise), figsize=(7.5, 3.4), sharey=True)
    for axis, quantile in zip(axes, parameter_wise):
        for label, run, color in (
            ("parameter-wise", parameter_wise[quantile], RED),
            ("global", everything[quantile], BLUE),
        ):
            angles = np.degrees(np.arccos(np.clip(run.cosines, -1.0, 1.0)))
            angles[np.array(run.cosines) > 1 - 1e-6] = 0.0  # float32's rounding
            axis.plot(np.sort(angles), np.linspace(0, 1, len(angles)), color=color, label=label)
        axis.set_title(f"quantile={quantile}", loc="left")
        axis.set_xlabel("angle in degrees")
    axes[0].set_ylabel("share of steps at or below it")
    axes[0].legend(loc="lower right", fontsize=8)
    save(figure, "modes")


def draw_updates(runs: dict[str, dict[float | None, Trace]]) -> None:
    """The length of an update, relative to training without clipping."""
    figure, axis = plt.subplots(figsize=(7.5, 3.4))
    width = 0.38
    for place, (name, by_quantile) in enumerate(runs.items()):
        base = np.mean(by_quantile[None].updates)
        quantiles = [q for q in by_quantile if q is not None]
        ratios = [np.mean(by_quantile[q].updates) / base for q in quantiles]
        x = np.arange(len(quantiles)) + (place - 0.5) * width
        bars = axis.bar(x, ratios, width, label=name, color=(BLUE, RED)[place])
        axis.bar_label(bars, [f"{ratio:.2f}" for ratio in ratios], fontsize=8)
    axis.axhline(1.0, color="black", lw=0.8, ls=":")
    axis.set_xticks(range(len(quantiles)), [f"quantile={q}" for q in quantiles])
    axis.set_ylabel("mean length of an update\n(no clipping = 1)")
    axis.margins(y=0.15)
    axis.legend(loc="upper left", fontsize=8)
    save(figure, "updates")


def main() -> None:
    torch.set_num_threads(1)
    quantiles = (0.9, 0.5, 0.1)
    plans = {
        ("adam", None, None): (adam, None),
        ("sgd", None, None): (sgd, None),
        **{
            (name, quantile, mode): (make, {"quantile": quantile, "global_clipping": mode})
            for name, make in (("adam", adam), ("sgd", sgd))
            for quantile in quantiles
            for mode in ((True, False) if name == "adam" else (True,))
        },
    }
    runs = {key: Trace(*plan) for key, plan in tqdm(plans.items(), unit="run")}
    draw_quantiles({q: runs["adam", q, True] for q in quantiles})
    draw_windows(runs["adam", None, None].norms)
    draw_modes(
        {q: runs["adam", q, False] for q in quantiles},
        {q: runs["adam", q, True] for q in quantiles},
    )
    draw_updates(
        {
            label: {None: runs[name, None, None], **{q: runs[name, q, True] for q in quantiles}}
            for label, name in (("SGD with momentum", "sgd"), ("Adam", "adam"))
        }
    )


if __name__ == "__main__":
    main()
