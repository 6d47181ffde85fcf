"""Growth of a step and of the memory of `QuantileClip` with history_length and parameters.

Gradients are small, so that the histories dominate. The rival is a clipper with the shortest
history of the same number of parameters.
"""

from __future__ import annotations

import argparse
import tracemalloc

import torch
from measure import Timing, add_output_options, compare, full_history, write_output
from torch_gradients import Gradients, add_torch_options

from autoclip.torch import QuantileClip

HISTORY_LENGTHS = (100, 1_000, 10_000, 100_000, 1_000_000)
PARAMETERS = (10, 100, 1_000, 10_000)
# 128 MiB of norms; the clipper that is filled and the state that fills it are several times that.
MOST_NORMS = 2**25


def main() -> None:
    """Print times, and bytes for each row and norm."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_torch_options(parser)
    add_output_options(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    timings: list[Timing] = []
    # Not counted: the modules that the first clipper imports.
    clipper_and_memory(Gradients([(64,)], options.device), HISTORY_LENGTHS[0])
    for count in PARAMETERS:
        data = Gradients([(64,)] * count, options.device)
        clippers = {}
        lengths = [n for n in HISTORY_LENGTHS if n * count <= MOST_NORMS]
        for length in lengths:
            clipper, size = clipper_and_memory(data, length)
            clippers[f"history_length={length:,}"] = data.finished(clipper.step)
            print(f"{count:>7,} rows of {length:>9,}: {size / count / length:6.2f} bytes a norm")
        timings += compare(
            f"history_length={lengths[0]:,}",
            clippers,
            data.renew,
            f"{count:,} parameters",
            options.repetitions,
        )
    write_output(options, timings, {"torch": torch.__version__, "device": options.device})


def clipper_and_memory(data: Gradients, history_length: int) -> tuple[QuantileClip, int]:
    """A clipper with full windows that has made a step, and the bytes it keeps on the host."""
    tracemalloc.start()
    clipper = QuantileClip(data.parameters, history_length=history_length)
    clipper.load_state_dict(full_history(data.shapes, "torch", history_length, False, data.sizes))
    data.renew()
    clipper.step()
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return clipper, size


if __name__ == "__main__":
    main()
