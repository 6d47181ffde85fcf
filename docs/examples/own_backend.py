"""A clipper for JAX on the NumPy core. `python own_backend.py [STEPS]`; without JAX it uses NumPy.

Its files load in PyTorch and Keras, and theirs load here.
"""

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
from sklearn.datasets import load_digits

from autoclip.core import History, ParameterInfo, Quantile, Rule, Saveable, State
from autoclip.core.adapter import ClipperSettings, make_state, split_state

try:
    import jax.numpy as jnp
except ImportError:
    jnp = np
Arrays = Mapping[str, Any]


class Clipper(Saveable):
    """Clips a dict of gradients, one history for each array."""

    def __init__(self, parameters: Arrays, rule: Rule, history_length: int = 1000) -> None:
        made = ClipperSettings.make("Clipper", rule, history_length=history_length)
        self._settings = made.default  # checked, with every default
        self._infos = [ParameterInfo(name, array.shape) for name, array in parameters.items()]
        self._rows = range(len(parameters))
        self._history = History(len(parameters), rule, history_length)

    def __call__(self, gradients: Arrays) -> dict[str, Any]:
        norms = [float(jnp.linalg.norm(gradient.ravel())) for gradient in gradients.values()]
        report = self._history.record(norms)
        return {name: g * c for (name, g), c in zip(gradients.items(), report.coefficients)}

    # The two methods that `save`, `load`, `state_dict` and `load_state_dict` need.

    def export_state(self) -> State:
        groups = [self._settings], [self._infos], [self._rows]
        rule = self._settings.rule.name
        return make_state("jax", rule, "parameter", *groups, *self._history.read(self._rows))

    def commit_state(self, state: State) -> None:
        self._history.write(self._rows, *split_state(state, [self._rows], len(self._rows)))


def main(steps: int) -> None:
    digits = load_digits()
    images, labels = jnp.asarray(digits.data / 16), np.eye(10)[digits.target]
    parameters = {"weight": jnp.zeros((10, 64)), "bias": jnp.zeros(10)}
    clipper = Clipper(parameters, Quantile(0.9))
    generator = np.random.default_rng(0)
    for _ in range(steps):
        batch = generator.integers(len(labels), size=64)
        x = images[batch]
        scores = jnp.exp(x @ parameters["weight"].T + parameters["bias"])
        errors = (scores / scores.sum(1, keepdims=True) - labels[batch]) / len(batch)
        gradients = clipper({"weight": errors.T @ x, "bias": errors.sum(0)})
        parameters = {name: parameters[name] - 0.5 * gradients[name] for name in parameters}
    clipper.save("history.autoclip")
    resumed = Clipper(parameters, Quantile(0.9))
    resumed.load("history.autoclip")
    assert resumed.state_dict() == clipper.state_dict()
    hits = (images @ parameters["weight"].T + parameters["bias"]).argmax(1) == digits.target
    print(f"{jnp.__name__}: accuracy {float(hits.mean()):.3f}, saved history.autoclip")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 300)
