"""A step of autoclip 0.2.1 against `clip_grad_norm_`; started by `torch_clippers.py`.

Both versions are called autoclip, so the old one needs a process of its own. Its rival is timed in
that process too.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from functools import partial

import numpy as np
import torch
from measure import factors, time_in_turn
from shapes import MODELS
from torch.nn.utils import clip_grad_norm_
from torch_gradients import CASES, Gradients, add_torch_options

from autoclip.torch import QuantileClip

RIVAL = "clip_grad_norm_"


def main() -> None:
    """Print the timings as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_torch_options(parser)
    parser.add_argument("--history-length", type=int, default=1000)
    parser.add_argument("--cases", nargs="+", default=list(CASES))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    timings = []
    for model in options.models:
        data = Gradients(MODELS[model](), options.device)
        generator = np.random.default_rng(0)
        for case in options.cases:
            candidates = {RIVAL: data.finished(partial(clip_grad_norm_, data.parameters, 1.0))}
            for is_global in (False, True):
                clipper = QuantileClip(
                    data.parameters,
                    history_length=options.history_length,
                    global_threshold=is_global,
                )
                if is_global:
                    total = float(np.linalg.norm(data.sizes))
                    window = total * factors(generator, options.history_length)
                    clipper.state["global_history"] = torch.from_numpy(window).to(options.device)
                else:
                    for parameter, size in zip(data.parameters, data.sizes):
                        window = size * factors(generator, options.history_length)
                        clipper.state[parameter]["history"] = torch.from_numpy(window).to(
                            options.device
                        )
                mode = "global" if is_global else "parameter-wise"
                data.check_clips(f"autoclip 0.2.1, {mode}", clipper.step)
                candidates[f"autoclip 0.2.1, {mode}"] = data.finished(clipper.step)
            timings += time_in_turn(
                f"{model}, {case}",
                RIVAL,
                candidates,
                partial(data.renew, CASES[case]),
                options.repetitions,
            )
    print(json.dumps([asdict(timing) for timing in timings]))


if __name__ == "__main__":
    main()
