"""autoclip.tf behind the calls that tests of both frameworks share; see `in_torch`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from hypothesis import settings

import autoclip.tf as package

# A function of a test runs a few times, in less time than the optimization of its graph takes. The
# profiles `thorough` and `nightly` optimize graphs; pages and examples always do.
if settings.get_current_profile_name() == "deterministic":
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})


@contextmanager
def way(name: str) -> Iterator[None]:
    yield


class Steps:
    """A clipper that is called by hand.

    Args:
        clipper: not built yet.
        shapes: of the variables.
        mode: one of `frameworks.WAYS`.
        dtype: of the variables.
        name: of the variables, before their number.
    """

    def __init__(
        self,
        clipper: Any,
        shapes: Sequence[tuple[int, ...]],
        mode: str,
        dtype: Any = tf.float32,
        name: str = "variable_",
    ) -> None:
        self.clipper = clipper
        self.variables = [
            tf.Variable(tf.zeros(shape, dtype), name=f"{name}{i}") for i, shape in enumerate(shapes)
        ]
        clipper.build(self.variables)

        def step(gradients: Sequence[Any]) -> list[Any]:
            return [gradient for gradient, _ in clipper(zip(gradients, self.variables))]

        self._step = step if mode == "eager" else tf.function(step, jit_compile=mode == "xla")

    def reset(self) -> None:
        self.clipper.reset()
        with suppress(FloatingPointError):  # of a step under XLA that nobody has asked about
            self.clipper.check()

    def __call__(self, *gradients: Any) -> list[Any]:
        given = [
            None
            if gradient is None
            else gradient
            if isinstance(gradient, tf.IndexedSlices)
            else tf.constant(gradient, variable.dtype)
            for gradient, variable in zip(gradients, self.variables, strict=True)
        ]
        return self._step(given)

    def windows(self) -> list[list[float]]:
        state = self.clipper.export_state()
        return [window.tolist() for group in state.groups for window in group.windows()]


_TRACED: dict[Any, Steps] = {}


def steps(
    clipper: Any,
    shapes: Sequence[tuple[int, ...]],
    mode: str,
    dtype: Any = tf.float32,
    number: int = 0,
    **more: Any,
) -> Steps:
    """`Steps` without a history, whose function is traced once for all tests.

    Args:
        clipper, shapes, mode, dtype, more: as of `Steps`.
        number: two of the same settings and number are one.
    """
    settings = clipper.get_config()
    key = (type(clipper), repr(settings), tuple(shapes), mode, tf.as_dtype(dtype), number)
    key = (*key, *more.values())
    if key not in _TRACED:
        _TRACED[key] = Steps(clipper, shapes, mode, dtype, **more)
    found = _TRACED[key]
    found.reset()
    assert found.clipper.get_config() == settings
    return found


class Loop:
    """A clipper that is called by hand, for gradients that are arrays.

    Args:
        found: it, without a history.
        is_traced: whether gradients that are None would be another trace, and so are zeros: their
            rows record nothing as well.
    """

    def __init__(self, found: Steps, is_traced: bool) -> None:
        self.clipper, self._run, self._is_traced = found.clipper, found, is_traced

    def __call__(self, *gradients: Any) -> list[np.ndarray | None]:
        """The clipped gradients."""
        given = list(gradients)
        if self._is_traced:
            pairs = zip(gradients, self._run.variables, strict=True)
            given = [np.zeros(v.shape, np.float32) if g is None else g for g, v in pairs]
        found = self._run(*given)
        return [None if g is None else np.asarray(c) for g, c in zip(gradients, found)]


def loop(
    name: str,
    *settings: Any,
    way: str,
    shapes: Sequence[tuple[int, ...]],
    groups: Sequence[tuple[int, dict[str, Any]]] = (),
    shared: bool = True,
    **more: Any,
) -> Loop:
    """A `Loop` without a history; its arguments are those of `in_torch.Loop`.

    Args:
        shared: one that was traced before, if there is one.
    """
    rows = iter(range(len(shapes)))
    matches = ["|".join(f"row{next(rows)}(:|$)" for _ in range(count)) for count, _ in groups]
    if groups:
        more["group_settings"] = [
            {"match": match, **own} for match, (_, own) in zip(matches, groups, strict=True)
        ]
    clipper = getattr(package, name)(*settings, **more)
    make = steps if shared else Steps
    return Loop(make(clipper, shapes, way, name="row"), way != "eager")


def exact_report(clipper: Any) -> Any:
    """Norms, thresholds and coefficients of the last step in float64; `last` is float32."""
    return clipper._last.numbers


@contextmanager
def interruptible() -> Iterator[None]:
    """Restore what Python leaves: it skips `name_scope`'s `__exit__` if interrupted at its call."""
    with tf.name_scope("test"):
        yield


# -- optimizers ----------------------------------------------------------------------------------

LIBRARY = "keras"
OPTIMIZERS: list[Any] = [keras.optimizers.SGD, keras.optimizers.AdamW]
ANOTHER = keras.optimizers.Lion
NO_OPTIMIZER = keras.layers.Dense


def optimizer(factory: Any) -> Any:
    """One that a factory, or an optimizer's class, makes."""
    return factory(0.1)


WEIGHT = tf.Variable(tf.zeros(3), name="weight")


def update(made: Any, size: float) -> None:
    """Let an optimizer take a step for a gradient of this norm."""
    made.apply_gradients([(tf.fill([3], size / 3**0.5), WEIGHT)])


def attributes(made: Any) -> Any:
    """Everything on an optimizer, and what TensorFlow tracks of it, by identity."""
    contents = {
        name: list(map(str, value)) if isinstance(value, (list, dict)) else id(value)
        for name, value in vars(made).items()
    }
    return type(made), contents, made._trackable_children()
