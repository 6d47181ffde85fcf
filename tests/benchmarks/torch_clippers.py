"""A step of AutoClip against clipping with a constant, on a ResNet-50's gradients in PyTorch."""

from __future__ import annotations

import argparse

import numpy as np
import torch
from measure import compare, factors, full_history, resnet50
from torch.nn.utils import clip_grad_norm_

from autoclip.torch import QuantileClip


def main() -> None:
    """Print times and ratios to `clip_grad_norm_`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--history-length", type=int, default=1000)
    options = parser.parse_args()
    shapes = resnet50()
    generator = np.random.default_rng(1)
    source = [torch.randn(shape, device=options.device) for shape in shapes]
    parameters = [torch.zeros_like(tensor, requires_grad=True) for tensor in source]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in parameters]
    sizes = [float(tensor.norm()) for tensor in source]
    is_cuda = options.device.startswith("cuda")

    def before() -> None:
        """New gradients: each is another size at each step."""
        torch._foreach_copy_(gradients, source)
        torch._foreach_mul_(gradients, factors(generator, len(source)).tolist())
        if is_cuda:
            torch.cuda.synchronize()

    def clip(step):  # type: ignore[no-untyped-def]
        def candidate() -> None:
            step()
            if is_cuda:
                torch.cuda.synchronize()

        return candidate

    candidates = {
        "clip_grad_norm_(max_norm=1.0)": clip(lambda: clip_grad_norm_(parameters, 1.0)),
        "clip_grad_norm_, each parameter on its own": clip(
            lambda: [clip_grad_norm_([parameter], 1.0) for parameter in parameters]
        ),
    }
    for global_clipping in (False, True):
        clipper = QuantileClip(
            parameters, history_length=options.history_length, global_clipping=global_clipping
        )
        clipper.load_state_dict(
            full_history(shapes, "torch", options.history_length, global_clipping, sizes)
        )
        mode = "global" if global_clipping else "parameter-wise"
        candidates[f"QuantileClip, {mode}"] = clip(clipper.step)
    print(f"{torch.__version__}, {options.device}, history_length={options.history_length}")
    compare("clip_grad_norm_(max_norm=1.0)", candidates, before)


if __name__ == "__main__":
    main()
