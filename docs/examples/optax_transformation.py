"""AutoClip for JAX: an optax transformation. `python optax_transformation.py [STEPS]`."""

import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from autoclip.core import ParameterInfo, Quantile, Rule, Saveable, State
from autoclip.core.adapter import (
    ClipperSettings,
    Ops,
    Windows,
    needs_order,
    numbers_of,
    pack,
    record,
    unpack,
)


class JaxOps(Ops):
    """The operations that a step needs, in `jax.numpy`; float32 unless `jax_enable_x64` is set."""

    narrow = staticmethod(lambda x: jnp.asarray(x, jnp.float32))
    wide = staticmethod(lambda x: jnp.asarray(x, float))
    whole = staticmethod(lambda x: jnp.asarray(x, int))
    where = staticmethod(lambda condition, x, y, into=None: jnp.where(condition, x, y))
    minimum, maximum = map(staticmethod, (jnp.minimum, jnp.maximum))
    log, exp = map(staticmethod, (jnp.log, jnp.exp))
    sum = staticmethod(lambda x: jnp.sum(x, axis=1, keepdims=True))
    sort = staticmethod(lambda x: jnp.sort(x, axis=1))
    concat = staticmethod(lambda parts: jnp.concatenate(parts, axis=1))
    full = staticmethod(lambda rows, value: jnp.full((rows, 1), value, jnp.float32))
    column = staticmethod(lambda x, rows: jnp.broadcast_to(jnp.asarray(x, float), (rows, 1)))
    slots = staticmethod(jnp.arange)
    take = staticmethod(lambda x, index: jnp.take_along_axis(x, index, axis=1))
    put = staticmethod(lambda x, index, value: x.at[jnp.arange(len(x))[:, None], index].set(value))


class HistoryState(NamedTuple):
    """The windows of all rows; see `autoclip.core.adapter.Windows`."""

    values: jax.Array
    ordered: jax.Array | None
    counts: jax.Array
    before: jax.Array


def clip_by_history(
    rule: Rule, history_length: int = 1000, **settings: Any
) -> optax.GradientTransformation:
    """Clip each gradient, or with `global_clipping=True` all of them, by `rule`'s thresholds."""
    made = ClipperSettings.make("clip_by_history", rule, history_length=history_length, **settings)
    own, is_global = made.default, made.mode.has_one_row

    def init(params: Any) -> HistoryState:
        rows = 1 if is_global else len(jax.tree.leaves(params))
        # Four arrays: a buffer can be donated only once.
        values, ordered = (jnp.zeros((rows, history_length), jnp.float32) for _ in range(2))
        counts, before = (jnp.zeros((rows, 1), int) for _ in range(2))
        return HistoryState(values, ordered if needs_order(rule) else None, counts, before)

    def update(updates: Any, state: HistoryState, params: Any = None) -> tuple[Any, HistoryState]:
        gradients, tree = jax.tree.flatten(updates)
        norms = jnp.stack([_norm(gradient) for gradient in gradients])
        norms = _norm(norms)[None] if is_global else norms
        numbers = {k: jnp.asarray(v) for k, v in numbers_of([own] * len(norms)).items()}
        windows = Windows(JaxOps(), history_length, *state)
        windows, report = record(own, numbers, windows, norms[:, None])
        factors = jnp.broadcast_to(report.coefficients[:, 0], len(gradients))
        clipped = [(g * c).astype(g.dtype) for g, c in zip(gradients, factors)]
        held = windows.values, windows.ordered, windows.counts, windows.before
        return tree.unflatten(clipped), HistoryState(*held)

    return optax.GradientTransformation(init, update)


def _norm(x: jax.Array) -> jax.Array:
    x = jnp.abs(x.astype(jnp.promote_types(x.dtype, float)))
    largest = jnp.max(x, initial=0.0)  # squares beyond the range of float32
    scale = jnp.where((largest > 0) & (largest < jnp.inf), largest, 1.0)
    return scale * jnp.sqrt(jnp.sum(jnp.square(x / scale)))


class HistoryFile(Saveable):
    """Saves and loads a `HistoryState`, in files that PyTorch and Keras read; see `Saveable`."""

    def __init__(
        self,
        state: HistoryState,
        params: Any,
        rule: Rule,
        history_length: int = 1000,
        **settings: Any,
    ) -> None:
        self.state, self._length = state, history_length
        self._made = ClipperSettings.make(
            "HistoryFile", rule, history_length=history_length, **settings
        )
        leaves = jax.tree.leaves_with_path(params)
        self._infos = [
            ParameterInfo(jax.tree_util.keystr(path, simple=True, separator="/"), leaf.shape)
            for path, leaf in leaves
        ]

    def export_state(self) -> State:
        values, _, counts, before = (None if x is None else np.asarray(x) for x in self.state)
        contents = unpack(values, counts, before, self._length)
        return State.of("jax", self._made.mode, [self._made.default], [self._infos], *contents)

    def commit_state(self, state: State) -> None:
        packed = map(jnp.asarray, pack(*state.by_row(), self._length, self._length))
        values, counts, before = packed
        ordered = None if self.state.ordered is None else jnp.sort(values, axis=1)
        self.state = HistoryState(values, ordered, counts, before)


def main(steps: int) -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images, labels = jnp.asarray(digits.data / 16), jnp.asarray(digits.target)
    params = {"kernel": jnp.zeros((64, 10)), "bias": jnp.zeros(10)}
    optimizer = optax.chain(clip_by_history(Quantile(0.9)), optax.sgd(0.5))
    state = optimizer.init(params)

    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        scores = x @ params["kernel"] + params["bias"]
        return optax.softmax_cross_entropy_with_integer_labels(scores, y).mean()

    @jax.jit
    def train_step(params: Any, state: Any, x: jax.Array, y: jax.Array) -> tuple[Any, Any]:
        updates, state = optimizer.update(jax.grad(loss)(params, x, y), state, params)
        return optax.apply_updates(params, updates), state

    generator = np.random.default_rng(0)
    for _ in range(steps):
        chosen = generator.integers(len(labels), size=64)
        params, state = train_step(params, state, images[chosen], labels[chosen])
    HistoryFile(state[0], params, Quantile(0.9)).save("history.autoclip")
    hits = (images @ params["kernel"] + params["bias"]).argmax(1) == labels
    print(f"accuracy {float(hits.mean()):.3f}, saved history.autoclip")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 300)
