"""A step of AutoClip against clipping with a constant and other clippers, in PyTorch.

Ratios are to `clip_grad_norm_` on all parameters. All clippers alternate in one process, but for
autoclip 0.2.1, which has one of its own; its ratios are to `clip_grad_norm_` there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import smartclip
import torch
from measure import (
    Timing,
    add_output_options,
    compare,
    factors,
    full_history,
    show,
    write_output,
)
from shapes import MODELS
from torch.nn.utils import clip_grad_norm_
from torch_gradients import CASES, Gradients, add_torch_options
from zclip import ZClip

from autoclip.torch import QuantileClip

RIVAL = "clip_grad_norm_"
FLOOR = "floor: _foreach_norm alone"
# Whole steps of an optimizer are measured on a small and a large model.
OPTIMIZED = ("MLP", "ResNet-50")


def main() -> None:
    """Print the timings of each model and case, and write the files that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_torch_options(parser)
    add_output_options(parser)
    parser.add_argument("--history-length", type=int, default=1000)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--skip-rivals", action="store_true", help="AutoClip and the floor only")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    about = {
        "torch": torch.__version__,
        "device": options.device,
        "threads": options.threads,
        "history_length": options.history_length,
    }
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    timings: list[Timing] = []
    for model in options.models:
        data = Gradients(MODELS[model](), options.device)
        for case in options.cases:
            candidates = ours(data, options.history_length)
            if not options.skip_rivals:
                candidates |= rivals(data, options.history_length)
            for name, step in candidates.items():
                if name != FLOOR:
                    data.check_clips(name, step)
            timings += compare(
                RIVAL,
                {name: data.finished(step) for name, step in candidates.items()},
                partial(data.renew, CASES[case]),
                f"{model}, {case}",
                options.repetitions,
            )
        if model in OPTIMIZED:
            for kind in ("foreach", "fused"):
                timings += compare(
                    "AdamW and clip_grad_norm_",
                    {n: data.finished(s) for n, s in steps(data, options, kind).items()},
                    data.renew,
                    f"{model}, AdamW({kind}=True)",
                    options.repetitions,
                )
    if not options.skip_rivals:
        timings += legacy(options)
    write_output(options, timings, about)


def quantile_clip(data: Gradients, history_length: int, global_clipping: bool) -> QuantileClip:
    """A clipper with full windows."""
    clipper = QuantileClip(
        data.parameters, history_length=history_length, global_clipping=global_clipping
    )
    clipper.load_state_dict(
        full_history(data.shapes, "torch", history_length, global_clipping, data.sizes)
    )
    return clipper


def ours(data: Gradients, history_length: int) -> dict[str, Callable[[], object]]:
    """AutoClip, what it is compared with, and the least that any clipper does."""
    return {
        RIVAL: lambda: clip_grad_norm_(data.parameters, 1.0),
        "QuantileClip, parameter-wise": quantile_clip(data, history_length, False).step,
        "QuantileClip, global": quantile_clip(data, history_length, True).step,
        FLOOR: lambda: torch._foreach_norm(data.gradients),
    }


def rivals(data: Gradients, history_length: int) -> dict[str, Callable[[], object]]:
    """Other clippers, past their warm-up."""
    model = torch.nn.ParameterList(data.parameters)
    zclip = ZClip(max_grad_norm=None)
    for _ in range(zclip.warmup_steps):
        data.renew()
        zclip.step(model)
    return {
        "clip_grad_norm_ on each parameter": lambda: [
            clip_grad_norm_([parameter], 1.0) for parameter in data.parameters
        ],
        "zclip, global": lambda: zclip.step(model),
        **{
            f"smartclip.AutoClip, {name}": smart_clip(data, model, scope, history_length)
            for name, scope in (("parameter-wise", "per_param"), ("global", "global"))
        },
    }


def smart_clip(
    data: Gradients, model: torch.nn.Module, scope: str, history_length: int
) -> Callable[[], object]:
    """smartclip's clipper over a window of as many norms."""
    clipper = smartclip.AutoClip(
        mode="percentile",
        percentile=90.0,
        history="window",
        window_size=history_length,
        scope=scope,
    )
    generator = np.random.default_rng(0)
    total = float(np.linalg.norm(data.sizes))
    keys = (
        {("global",): total}
        if scope == "global"
        else {("param", str(i)): size for i, size in enumerate(data.sizes)}
    )
    for key, size in keys.items():
        for norm in (size * factors(generator, history_length)).tolist():
            clipper.observe(norm, key=key)
    return lambda: smartclip.apply(model, clipper)


def steps(
    data: Gradients, options: argparse.Namespace, kind: str
) -> dict[str, Callable[[], object]]:
    """Whole optimizer steps: not clipped, clipped with a constant, clipped by AutoClip."""

    def adamw() -> torch.optim.Optimizer:
        return torch.optim.AdamW(data.parameters, lr=1e-9, **{kind: True})

    plain, constant = adamw(), adamw()

    def clip_and_step() -> None:
        clip_grad_norm_(data.parameters, 1.0)
        constant.step()

    candidates: dict[str, Callable[[], object]] = {
        "AdamW": plain.step,
        "AdamW and clip_grad_norm_": clip_and_step,
    }
    for global_clipping, mode in ((False, "parameter-wise"), (True, "global")):
        optimizer = adamw()
        quantile_clip(data, options.history_length, global_clipping).attach(optimizer)
        candidates[f"AdamW and QuantileClip, {mode}"] = optimizer.step
    return candidates


def legacy(options: argparse.Namespace) -> list[Timing]:
    """The timings of autoclip 0.2.1, installed into a folder that only its process sees."""
    here = Path(__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [
                *(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"),
                *("--target", folder, "autoclip==0.2.1"),
            ],
            check=True,
        )
        # First on the path: a package with an __init__.py comes before all namespace packages.
        paths = [folder, os.environ.get("PYTHONPATH", "")]
        command = [sys.executable, str(here / "torch_legacy.py")]
        for name in ("models", "cases"):
            command += [f"--{name}", *getattr(options, name)]
        for name in ("device", "threads", "repetitions", "history_length"):
            command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
        result = subprocess.run(
            command,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    timings = [Timing(**timing) for timing in json.loads(result.stdout)]
    for case in dict.fromkeys(timing.case for timing in timings):
        print(f"{case}, in a process of its own")
        show([timing for timing in timings if timing.case == case])
    return timings


if __name__ == "__main__":
    main()
