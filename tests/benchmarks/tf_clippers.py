"""A step of AutoClip against clipping with a constant, on a ResNet-50's gradients in TensorFlow."""

from __future__ import annotations

import argparse
import time

import numpy as np
import tensorflow as tf
from measure import compare, factors, full_history, resnet50

from autoclip.tf import QuantileClip


def main() -> None:
    """Print times and ratios to `tf.clip_by_global_norm`, in a graph and compiled by XLA."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--history-length", type=int, default=1000)
    options = parser.parse_args()
    shapes = resnet50()
    generator = np.random.default_rng(1)
    source = [tf.random.normal(shape) for shape in shapes]
    variables = [tf.Variable(tf.zeros(shape)) for shape in shapes]
    sizes = [float(tf.norm(tensor)) for tensor in source]
    gradients = list(source)

    def before() -> None:
        """New gradients: each is another size at each step."""
        gradients[:] = [g * f for g, f in zip(source, factors(generator, len(source)))]

    for xla in (False, True):
        functions = {
            "clip_by_global_norm(1.0)": lambda g: tf.clip_by_global_norm(g, 1.0)[0],
            "clip_by_norm(1.0), each on its own": lambda g: [tf.clip_by_norm(x, 1.0) for x in g],
        }
        for global_clipping in (False, True):
            clipper = QuantileClip(
                history_length=options.history_length, global_clipping=global_clipping
            )
            clipper.build(variables)
            clipper.load_state_dict(
                full_history(shapes, "tensorflow", options.history_length, global_clipping, sizes)
            )
            mode = "global" if global_clipping else "parameter-wise"
            functions[f"QuantileClip, {mode}"] = lambda g, clipper=clipper: [
                gradient for gradient, _ in clipper(zip(g, variables))
            ]

        def candidate(function, xla=xla):  # type: ignore[no-untyped-def]
            compiled = tf.function(function, jit_compile=xla)
            # What it returns is waited for by reading the smallest of the results.
            return lambda: compiled(gradients)[-1].numpy()

        print(f"TensorFlow {tf.__version__}, {'XLA' if xla else 'graph'}")
        compare(
            "clip_by_global_norm(1.0)",
            {name: candidate(function) for name, function in functions.items()},
            before,
        )

    print("Tracing a clipper of 1,000 variables")
    for xla in (False, True):
        many = [tf.Variable(tf.zeros(3)) for _ in range(1000)]
        clipper = QuantileClip()
        clipper.build(many)
        step = tf.function(
            lambda clipper=clipper, many=many: clipper([(tf.ones(3), v) for v in many])[0][0],
            jit_compile=xla,
        )
        start = time.perf_counter()
        step.get_concrete_function()
        print(f"  {'XLA' if xla else 'graph':<52}{(time.perf_counter() - start) * 1e3:9.0f} ms")


if __name__ == "__main__":
    main()
