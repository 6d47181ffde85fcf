"""The cost of each setting of a clipper in PyTorch, relative to `QuantileClip`'s defaults.

The histories of all clippers are full, and they alternate on the same gradients.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from measure import Timing, add_output_options, compare, full_history, write_output
from shapes import MODELS
from torch_gradients import Gradients, add_torch_options

from autoclip.core import Quantile, Rule, Standard, register_rule, setting
from autoclip.torch import Clipper


@register_rule
@dataclass(frozen=True)
class Mean(Rule):
    """A rule of one's own, which no tracker follows: it reads the windows at each step."""

    factor: float = setting(1.2, gt=0)
    name: ClassVar[str] = "mean"

    @staticmethod
    def threshold(window: Any, factor: Any) -> Any:
        """See `Rule.threshold`."""
        return factor * window.mean()


RIVAL = "Quantile(0.9)"
# A ceiling that no norm reaches, and a warm-up that is over: the settings at work.
SETTINGS: dict[str, tuple[Rule, dict[str, Any]]] = {
    RIVAL: (Quantile(0.9), {}),
    "max_norm": (Quantile(0.9), {"max_norm": 1e9}),
    "warmup_steps": (Quantile(0.9), {"warmup_steps": 10}),
    "include_current=False": (Quantile(0.9), {"include_current": False}),
    'on_nonfinite="zero"': (Quantile(0.9), {"on_nonfinite": "zero"}),
    'on_spike="zero"': (Quantile(0.9), {"on_spike": "zero"}),
    'on_spike="skip"': (Quantile(0.9), {"on_spike": "skip"}),
    "factor=2.0": (Quantile(0.9, factor=2.0), {}),
    'factor=2.0, record="clipped"': (
        Quantile(0.9, factor=2.0),
        {"include_current": False, "record": "clipped"},
    ),
    "Standard()": (Standard(), {}),
    "Standard(decay=0.97)": (Standard(decay=0.97), {}),
    "Standard(decay=0.97, shrink=True)": (Standard(decay=0.97, shrink=True), {}),
    "an own rule: Mean()": (Mean(), {}),
}
MODES = {
    "parameter-wise": {},
    "by group": {"group_clipping": True},
    "global": {"global_clipping": True},
}


def main() -> None:
    """Print a table for each model and mode."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_torch_options(parser)
    add_output_options(parser)
    parser.add_argument("--history-length", type=int, default=1000)
    parser.set_defaults(models=["MLP", "ResNet-50"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    timings: list[Timing] = []
    for model in options.models:
        data = Gradients(MODELS[model](), options.device)
        for mode, flags in MODES.items():
            timings += compare(
                RIVAL,
                {
                    name: data.finished(step(data, options.history_length, rule, flags | settings))
                    for name, (rule, settings) in SETTINGS.items()
                },
                partial(restore, data),
                f"{model}, {mode}",
                options.repetitions,
            )
    write_output(options, timings, {"torch": torch.__version__, "device": options.device})


def step(
    data: Gradients, history_length: int, rule: Rule, settings: dict[str, Any]
) -> Callable[[], object]:
    """The step of a clipper with full windows."""
    clipper = Clipper(data.parameters, rule, history_length, **settings)
    state: dict[str, Any] = {"global_clipping": False, "rule": rule, **settings}
    clipper.load_state_dict(
        full_history(data.shapes, "torch", history_length, sizes=data.sizes, **state)
    )
    return clipper.step


def restore(data: Gradients) -> None:
    """New gradients, also where `on_spike="skip"` took them away."""
    for parameter, gradient in zip(data.parameters, data.gradients):
        parameter.grad = gradient
    data.renew()


if __name__ == "__main__":
    main()
