"""A step of SGD with `QuantileClip` against one with a constant in TensorFlow, in graphs and XLA.

The step is a `tf.function` without arguments, as in Keras: gradients are read from variables,
clipped and subtracted, so a call from Python costs the same with 6 variables as with 1000.
Parameter-wise clipping is compared with `tf.clip_by_norm` on each gradient, global clipping with
`tf.clip_by_global_norm`. Histories are full and gradients are of another size at each step. The
last two parts measure histories of other lengths, and how long tracing and the first call take.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from measure import Timing, add_output_options, compare, factors, full_history, write_output
from shapes import MODELS, Shapes

from autoclip.tf import QuantileClip

RIVALS: dict[bool, tuple[str, Callable[[Sequence[tf.Tensor]], Any]]] = {
    False: ("clip_by_norm(1.0) on each", lambda g: [tf.clip_by_norm(x, 1.0) for x in g]),
    True: ("clip_by_global_norm(1.0)", lambda g: tf.clip_by_global_norm(g, 1.0)[0]),
}
SMALL_MLP: Shapes = [(20, 64), (64,), (64, 64), (64,), (64, 10), (10,)]
CASES = {
    "small MLP": SMALL_MLP,
    "ResNet-50": MODELS["ResNet-50"](),
    "150 of 64 x 64 and 64": [(64, 64), (64,)] * 75,
    "400 of 8 x 8": [(8, 8)] * 400,
    "1000 x 256": [(256,)] * 1000,
}
HISTORY_LENGTHS = (100, 1_000, 10_000)


class Gradients:
    """Gradients of some shapes in variables, and variables that they update."""

    def __init__(self, shapes: Shapes) -> None:
        self.shapes = shapes
        self.variables = [tf.Variable(tf.zeros(shape)) for shape in shapes]
        self._source = [tf.random.normal(shape) for shape in shapes]
        self._sizes = [float(tf.norm(tensor)) for tensor in self._source]
        self._generator = np.random.default_rng(1)
        self.current = [tf.Variable(tensor) for tensor in self._source]
        self.renew()

    def renew(self) -> None:
        """Give each gradient another size."""
        sizes = factors(self._generator, len(self.shapes))
        self.tensors = [source * size for source, size in zip(self._source, sizes)]
        for gradient, tensor in zip(self.current, self.tensors):
            gradient.assign(tensor)

    def clipper(
        self, global_clipping: bool, history_length: int
    ) -> Callable[[Sequence[tf.Tensor]], Any]:
        """Clip with a `QuantileClip` whose histories are full."""
        clipper = QuantileClip(history_length=history_length, global_clipping=global_clipping)
        clipper.build(self.variables)
        clipper.load_state_dict(
            full_history(self.shapes, "tensorflow", history_length, global_clipping, self._sizes)
        )
        return lambda g: [gradient for gradient, _ in clipper(zip(g, self.variables))]

    def finished(
        self, function: Callable[[Sequence[tf.Tensor]], Any], xla: bool, alone: bool
    ) -> Callable[[], Any]:
        """A step with gradients that `function` clips, compiled, and waited for.

        Args:
            function: clips gradients.
            xla: compile with XLA.
            alone: measure `function` without the rest of the step.
        """
        if alone:
            clip = tf.function(function, jit_compile=xla, autograph=False)
            return lambda: clip(self.tensors)[-1].numpy()

        def step() -> None:
            clipped = function([gradient.read_value() for gradient in self.current])
            for variable, gradient in zip(self.variables, clipped):
                variable.assign_sub(0.01 * gradient)

        compiled = tf.function(step, jit_compile=xla, autograph=False)

        def run() -> None:
            compiled()
            self.variables[-1].numpy()

        return run


def main() -> None:
    """Print times and their ratios to those of the rival."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--history-length", type=int, default=1000)
    parser.add_argument("--repetitions", type=int, default=60)
    parser.add_argument("--alone", action="store_true", help="clipping without the rest of a step")
    parser.add_argument("--case", choices=CASES, action="append", help="default: all")
    parser.add_argument("--compiler", choices=("graph", "XLA"), action="append", help="both")
    add_output_options(parser)
    options = parser.parse_args()
    compilers = options.compiler or ["graph", "XLA"]
    print(f"TensorFlow {tf.__version__}")
    timings: list[Timing] = []
    for case in options.case or CASES:
        data = Gradients(CASES[case])
        for compiler in compilers:
            for global_clipping, (rival, clip) in RIVALS.items():
                mode = "global" if global_clipping else "parameter-wise"
                ours = data.clipper(global_clipping, options.history_length)
                functions = {rival: clip, f"QuantileClip, {mode}": ours}
                timings += compare(
                    rival,
                    {
                        name: data.finished(f, compiler == "XLA", options.alone)
                        for name, f in functions.items()
                    },
                    data.renew,
                    f"{case}, {compiler}, {mode}",
                    options.repetitions,
                )
    for compiler in compilers:
        data = Gradients(CASES["ResNet-50"])
        timings += compare(
            "history_length=1,000",
            {
                f"history_length={length:,}": data.finished(
                    data.clipper(False, length), compiler == "XLA", options.alone
                )
                for length in HISTORY_LENGTHS
            },
            data.renew,
            f"ResNet-50, {compiler}, parameter-wise",
            options.repetitions,
        )
        print_tracing(compiler == "XLA")
    write_output(options, timings, {"TensorFlow": tf.__version__})


def print_tracing(xla: bool) -> None:
    """Print how long tracing 1,000 variables, and the first call after it, take."""
    data = Gradients([(3,)] * 1000)
    functions = dict(RIVALS.values())
    functions["QuantileClip, parameter-wise"] = data.clipper(False, 1000)
    functions["QuantileClip, global"] = data.clipper(True, 1000)
    print(f"1,000 variables, {'XLA' if xla else 'graph'}: seconds to trace, and for the first call")
    for name, function in functions.items():
        if xla and name == RIVALS[False][0]:
            continue  # takes minutes
        compiled = tf.function(function, jit_compile=xla, autograph=False)
        start = time.perf_counter()
        compiled.get_concrete_function(data.tensors)
        traced = time.perf_counter()
        compiled(data.tensors)[-1].numpy()
        finished = time.perf_counter()
        print(f"  {name:<44}{traced - start:8.2f}{finished - traced:8.2f}", flush=True)


if __name__ == "__main__":
    main()
