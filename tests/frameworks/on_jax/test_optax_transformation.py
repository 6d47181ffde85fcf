"""The optax transformation of docs/examples against the core: a third framework over one step."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from autoclip.core import History, Quantile, Rule, Standard, register_rule, setting
from autoclip.core.inspect import summarize

PATH = Path(__file__).parents[3] / "docs" / "examples" / "optax_transformation.py"
SPEC = importlib.util.spec_from_file_location("optax_transformation", PATH)
assert SPEC is not None and SPEC.loader is not None
example: Any = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(example)

PARAMS = {"bias": jnp.zeros(4), "kernel": jnp.zeros((2, 3))}


@register_rule
@dataclass(frozen=True)
class MedianAndDeviation(Rule):
    """A custom rule."""

    deviations: float = setting(3.0, ge=0)
    name: ClassVar[str] = "median-and-deviation"

    @staticmethod
    def threshold(window: Any, deviations: Any) -> Any:
        median = window.quantile(0.5)
        return median + deviations * window.quantile(0.5, abs(window.norms - median))


RULES = [
    Quantile(0.7),
    Quantile(0.5, factor=1.5),
    Standard(1.0),
    Standard(1.0, decay=0.9),
    Standard(1.0, log=True),
    MedianAndDeviation(1.0),
]
SETTINGS: list[dict[str, Any]] = [
    {},
    {"warmup_steps": 3, "max_norm": 4.0},
    {"include_current": False, "on_spike": "zero"},
    {"global_clipping": True},
]


def gradients() -> list[dict[str, jax.Array]]:
    """Gradients with spikes, and with a step of zeros, of NaN and of infinity."""
    generator = np.random.default_rng(0)
    steps = [
        {k: generator.normal(size=p.shape) * generator.lognormal() for k, p in PARAMS.items()}
        for _ in range(30)
    ]
    for step, value in ((5, 0.0), (9, np.nan), (12, np.inf)):
        steps[step]["bias"][:] = value
    return [jax.tree.map(jnp.float32, each) for each in steps]


def expected(rule: Rule, settings: dict[str, Any]) -> list[np.ndarray]:
    """The coefficients of the core's history, of each step and array."""
    chosen = dict(settings)
    is_global = chosen.pop("global_clipping", False)
    drops = chosen.pop("on_spike", "clip") == "zero"
    history = History(1 if is_global else len(PARAMS), rule, 10, **chosen)
    found = []
    for step in gradients():
        norms = np.array([np.linalg.norm(np.float64(g)) for g in step.values()])
        given = [np.sqrt((norms**2).sum())] if is_global else norms
        coefficients = history.record(given).coefficients
        if drops:
            coefficients = np.where(coefficients < 1, 0.0, coefficients)
        found.append(np.broadcast_to(coefficients, len(PARAMS)))
    return found


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_jitted_in_a_chain_it_clips_as_the_core_does(rule: Rule, settings: dict[str, Any]) -> None:
    transformation = optax.chain(example.clip_by_history(rule, 10, **settings), optax.scale(-1.0))
    state = transformation.init(PARAMS)
    update = jax.jit(transformation.update, donate_argnums=1)
    for step, coefficients in zip(gradients(), expected(rule, settings)):
        updates, state = update(step, state)
        for (name, gradient), coefficient in zip(step.items(), coefficients):
            wanted = np.float64(gradient) * coefficient
            np.testing.assert_allclose(-updates[name], wanted, rtol=1e-5, err_msg=name)
    assert update._cache_size() == 1  # compiled once


def test_inside_a_scan() -> None:
    """All steps in one compiled loop, with a custom rule."""
    rule = MedianAndDeviation(1.0)
    transformation = example.clip_by_history(rule, 10)
    stacked = jax.tree.map(lambda *each: jnp.stack(each), *gradients())

    @jax.jit
    def run(steps: Any) -> Any:
        def body(state: Any, step: Any) -> Any:
            updates, state = transformation.update(step, state)
            return state, updates

        return jax.lax.scan(body, transformation.init(PARAMS), steps)

    _, updates = run(stacked)
    for i, coefficients in enumerate(expected(rule, {})):
        for (name, gradient), coefficient in zip(gradients()[i].items(), coefficients):
            wanted = np.float64(gradient) * coefficient
            np.testing.assert_allclose(updates[name][i], wanted, rtol=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_nan_and_infinity_leave_the_history_alone(value: float) -> None:
    transformation = example.clip_by_history(Quantile(0.5), 10)
    _, state = transformation.update(gradients()[0], transformation.init(PARAMS))
    updates, after = transformation.update(jax.tree.map(lambda x: x + value, PARAMS), state)
    jax.tree.map(np.testing.assert_array_equal, after, state)
    jax.tree.map(lambda x: np.testing.assert_array_equal(x, jnp.full_like(x, value)), updates)


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_norms_beyond_the_square_root_of_float32(size: float) -> None:
    transformation = example.clip_by_history(Quantile(0.5), 10)
    ones = jax.tree.map(lambda x: x + size, PARAMS)
    _, state = transformation.update(ones, transformation.init(PARAMS))
    assert state.values[:, 0] == pytest.approx([2 * size, 6**0.5 * size], rel=1e-6)


@pytest.mark.parametrize("rule", [Quantile(0.7), Standard(1.0)], ids=str)
def test_files_are_those_of_every_framework(rule: Rule, tmp_path: Path) -> None:
    transformation = example.clip_by_history(rule, 10)
    state = transformation.init(PARAMS)
    for step in gradients():
        _, state = transformation.update(step, state)
    saved = example.HistoryFile(state, PARAMS, rule, 10)
    saved.save(tmp_path / "history.autoclip")
    assert [row.name for row in summarize(saved).rows] == ["bias", "kernel"]

    loaded = example.HistoryFile(transformation.init(PARAMS), PARAMS, rule, 10)
    loaded.load(tmp_path / "history.autoclip")
    assert loaded.state_dict() == saved.state_dict()
    for step in gradients()[:5]:
        one, state = transformation.update(step, state)
        other, loaded.state = transformation.update(step, loaded.state)
        jax.tree.map(np.testing.assert_array_equal, one, other)


def test_the_script_runs(tmp_path: Path, capsys: Any) -> None:
    example.main(20)
    assert "saved history.autoclip" in capsys.readouterr().out
