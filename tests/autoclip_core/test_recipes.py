"""Published clippers as settings of ours, against their own equations; see docs/recipes.md."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pytest

from autoclip.core import History, Quantile, Report, Rule, Standard, setting
from autoclip.core.adapter import GroupSettings

Norms = npt.NDArray[np.float64]


def stream(steps: int = 600, seed: int = 0) -> list[float]:
    """Falling norms with noise, and a spike in fifty; float32, as histories hold them."""
    random = np.random.default_rng(seed)
    norms = random.lognormal(0, 0.3, steps) * np.linspace(3, 1, steps)
    spikes = random.random(steps) < 0.02
    return np.float32(norms * np.where(spikes, random.uniform(5, 50, steps), 1)).tolist()


def run(norms: list[float], rule: Any, length: int, **settings: Any) -> list[Report[Norms]]:
    history = History.of([GroupSettings(rule, length, **settings)])
    return [history.record([norm]) for norm in norms]


def coefficients(reports: list[Report[Norms]]) -> list[float]:
    return [float(report.coefficients[0]) for report in reports]


def largest_deviation(found: Iterable[float], expected: Iterable[float]) -> float:
    return max(abs(a - b) / b for a, b in zip(found, expected))


# -- quantiles ---------------------------------------------------------------------------------


def test_the_papers_algorithm_1() -> None:
    """Append the norm to the history, clip to the p-th percentile of all of it."""
    norms, past, expected = stream(), [], []
    for norm in norms:
        past.append(norm)
        expected.append(min(1.0, np.percentile(past, 10) / norm))
    found = coefficients(run(norms, Quantile(0.1), 10**9))
    assert largest_deviation(found, expected) <= 2.0**-52


@pytest.mark.parametrize("length", [50, 1000])
def test_autoclip_0_2_1_quantile(length: int) -> None:
    """Its formulas: the threshold is computed before the norm is appended; infinite at first."""
    norms, expected = stream(), []
    for step, norm in enumerate(norms):
        past = norms[max(0, step - length) : step]
        expected.append(min(1.0, np.quantile(past, 0.9) / norm) if past else 1.0)
    found = coefficients(run(norms, Quantile(0.9), length, include_current=False))
    assert found == expected


# Prints what each gradient was multiplied by: [mode, step, parameter].
LEGACY = """
import json, sys
import torch
from autoclip.torch import QuantileClip

norms, length = json.load(sys.stdin)
found = []
for is_global in (False, True):
    weights = [torch.zeros(1, requires_grad=True) for _ in norms[0]]
    clipper = QuantileClip(weights, 0.9, length, global_threshold=is_global)
    found.append([])
    for row in norms:
        for weight, norm in zip(weights, row):
            weight.grad = torch.tensor([norm])
        clipper.step()
        found[-1].append([float(weight.grad) / norm for weight, norm in zip(weights, row)])
json.dump(found, sys.stdout)
"""


@pytest.mark.nightly  # pip takes seconds
def test_the_real_autoclip_0_2_1(tmp_path: Path) -> None:
    """In a process of its own, which finds it before ours.

    It works in float32 and adds 1e-6 to the norm, which changes nothing at norms of 1000.
    """
    pytest.importorskip("torch")
    install = ["install", "--no-deps", "--target", str(tmp_path), "autoclip==0.2.1"]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True, capture_output=True)
    norms = 1e3 * np.transpose([stream(300, seed) for seed in (0, 1)]).astype(np.float32)
    done = subprocess.run(
        [sys.executable, "-c", LEGACY],
        input=json.dumps([norms.tolist(), 50]),
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for rows, expected in zip(
        (norms, np.linalg.norm(norms, axis=1, keepdims=True)), np.array(json.loads(done.stdout))
    ):
        settings = GroupSettings(Quantile(0.9), 50, include_current=False)
        history = History.of([settings] * rows.shape[1])
        found = np.array([history.record(each).coefficients for each in rows])
        assert largest_deviation(np.ravel(found + 0 * norms), np.ravel(expected)) < 1e-6
        assert (expected < 0.999).sum() > 20


@dataclass(frozen=True)
class Deviations(Rule):
    """`StandardClip` of autoclip 0.2.1: deviations of the sample, without the mean."""

    deviations: float = setting(2.0, ge=0)
    name: ClassVar[str] = "deviations"
    defaults: ClassVar[dict[str, Any]] = {"include_current": False, "warmup_steps": 2}

    @staticmethod
    def threshold(window: Any, deviations: Any) -> Any:
        """See `Rule.threshold`."""
        squares = window.sum((window.norms - window.mean()) ** 2)
        return deviations * (squares / (window.count - 1)) ** 0.5


def test_autoclip_0_2_1_standard() -> None:
    """`deviations * torch.std(history)` of the norms before; of a single one that is NaN."""
    norms, length = stream(), 50
    expected = [1.0, 1.0]
    for step, norm in enumerate(norms[2:], start=2):
        past = norms[max(0, step - length) : step]
        expected.append(min(1.0, 2.0 * np.std(past, ddof=1) / norm))
    found = coefficients(run(norms, Deviations(2.0), length))
    assert largest_deviation(found, expected) < 1e-13


def test_bitsandbytes_percentile_clipping() -> None:
    """A ring of 100 squared norms, an order statistic of it, and the square root of that.

    The original fills its ring with the first norm where ours is shorter, and takes the value at
    the index `percentile`, between whose neighbors ours interpolates: after 100 steps the position
    p in 0 ... 99 is the quantile p / 99.
    """
    norms, percentile = stream(), 5
    ring, expected = np.zeros(100), []
    for step, norm in enumerate(norms):
        ring[:] = norm**2 if step == 0 else ring
        ring[step % 100] = norm**2
        limit = np.sqrt(np.sort(ring)[percentile])
        expected.append(min(1.0, limit / norm))
    found = coefficients(run(norms, Quantile(percentile / 99), 100))
    assert largest_deviation(found[99:], expected[99:]) < 1e-12
    assert largest_deviation(found[:99], expected[:99]) > 1e-3  # while the original's ring fills


@pytest.mark.parametrize("c", [1.5, 3.0])
def test_a_multiple_of_the_median(c: float) -> None:
    norms = stream()
    expected = [
        min(1.0, c * np.median(norms[max(0, step - 128) : step]) / norm) if step else 1.0
        for step, norm in enumerate(norms)
    ]
    found = coefficients(run(norms, Quantile(0.5, c), 128, include_current=False))
    assert largest_deviation(found, expected) < 1e-15


# -- means and deviations ----------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [3.0, 6.0])
def test_skipped_steps_of_levanter(sigma: float) -> None:
    """A norm above mean + sigma · std of the last 129, once 64 are known; the population's std."""
    norms, expected = stream(), []
    for step, norm in enumerate(norms):
        past = norms[max(0, step - 129) : step]
        skipped = step >= 64 and norm > np.mean(past) + sigma * np.std(past)
        expected.append(float(not skipped))
    reports = run(norms, Standard(sigma), 129, warmup_steps=64, on_spike="skip")
    assert coefficients(reports) == expected
    assert 0.0 in expected


@pytest.mark.parametrize("sigma", [3.0, 6.0])
def test_skipped_steps_of_olmo_core(sigma: float) -> None:
    """The same over 128 norms, once 63 are known, with the sample's deviation.

    The original also skips norms that far *below* the mean, which a clipper has no reason to.
    """
    norms, expected = stream(), []
    for step, norm in enumerate(norms):
        past = norms[max(0, step - 128) : step]
        skipped = step >= 63 and norm > np.mean(past) + sigma * np.std(past, ddof=1)
        expected.append(float(not skipped))
    reports = run(norms, Standard(sigma), 128, warmup_steps=63, on_spike="skip")
    assert coefficients(reports) == expected
    assert 0.0 in expected


def test_steps_given_up_above_four_deviations_of_the_log_norm() -> None:
    """Chen et al., 2018: a moving average and a moving deviation of the log norm."""
    norms, decay, expected = stream(), 0.99, []
    for step, norm in enumerate(norms):
        logs = np.log(norms[:step])
        weights = decay ** np.arange(step)[::-1]
        if step >= 25:
            mean = np.average(logs, weights=weights)
            deviation = np.average((logs - mean) ** 2, weights=weights) ** 0.5
        expected.append(float(step < 25 or np.log(norm) <= mean + 4 * deviation))
    rule = Standard(4.0, decay=decay, log=True)
    assert coefficients(run(norms, rule, 1000, on_spike="skip")) == expected
    assert 0.0 in expected


def test_adagc() -> None:
    """An exponential average of clipped norms times 1.04, after a warm-up, per tensor.

    The original starts the average as the least norm of its warm-up, which is not reproduced. It
    decays, and the two agree from then on but for what is older than our window.
    """
    norms, beta, factor, warmup = stream(3000), 0.98, 1.04, 100
    mean, expected = min(norms[:warmup]), []
    for step, norm in enumerate(norms):
        coefficient = min(1.0, factor * mean / norm) if step >= warmup else 1.0
        expected.append(coefficient)
        if step >= warmup:
            mean = beta * mean + (1 - beta) * norm * coefficient
    rule = Standard(0.0, decay=beta, factor=factor)
    reports = run(norms, rule, 1000, record="clipped", warmup_steps=warmup)
    found = coefficients(reports)
    assert found[:warmup] == expected[:warmup]
    near_the_start = largest_deviation(found[warmup : warmup + 50], expected[warmup : warmup + 50])
    late = largest_deviation(found[-200:], expected[-200:])
    assert late < 1e-4 < near_the_start


# -- ZClip -------------------------------------------------------------------------------------


def zclip_coefficients(norms: list[float], **options: Any) -> list[float]:
    """The real zclip 1.0.0 on gradients of these norms."""
    torch = pytest.importorskip("torch")
    zclip = pytest.importorskip("zclip")
    model = torch.nn.Linear(1, 1, bias=False).double()
    clipper = zclip.ZClip(max_grad_norm=None, eps=0.0, **options)
    found = []
    for norm in norms:
        model.weight.grad = torch.full((1, 1), norm, dtype=torch.float64)
        clipper.step(model)
        found.append(float(model.weight.grad) / norm)
    return found


@dataclass(frozen=True)
class ToTheMean(Standard):
    """A spike is scaled down to the mean; a rule of one's own, as in docs/rules.md."""

    name: ClassVar[str] = "to_the_mean"

    @staticmethod
    def clip_to(
        window: Any,
        norm: Any,
        threshold: Any,
        deviations: Any,
        decay: Any,
        factor: Any,
        shrink: bool,
        log: bool,
    ) -> Any:
        weights = decay**window.age
        return window.sum(weights * window.norms) / window.sum(weights)


ZCLIP: dict[str, tuple[dict[str, Any], Standard]] = {
    "adaptive_scaling": (
        {"mode": "zscore", "clip_option": "adaptive_scaling"},
        Standard(2.5, decay=0.97, shrink=True),
    ),
    "mean": ({"mode": "zscore", "clip_option": "mean"}, ToTheMean(2.5, decay=0.97)),
    "percentile": ({"mode": "percentile"}, Standard(2.5, decay=0.97)),
}


@pytest.mark.parametrize("option", ZCLIP)
def test_zclip(option: str) -> None:
    """The same mean, but another variance, and so slightly other coefficients.

    The original's variance averages `(norm - mean)²` around the mean of each step, which has taken
    in the norm already; ours is the weighted variance around the present mean. It starts from 25
    norms with equal weights; ours weighs those by age, too.
    """
    options, rule = ZCLIP[option]
    norms = stream(2000)
    expected = zclip_coefficients(norms, alpha=0.97, z_thresh=2.5, warmup_steps=25, **options)
    found = coefficients(run(norms, rule, 1000, record="clipped", warmup_steps=25))
    assert found[:25] == pytest.approx(expected[:25], rel=1e-6)
    agree = [(a, b) for a, b in zip(found, expected) if (a < 0.999) == (b < 0.999)]
    clipped = [(a, b) for a, b in agree[200:] if b < 0.999]
    assert len(agree) >= 0.99 * len(norms)
    assert len(clipped) > 30
    assert max(abs(a - b) / b for a, b in clipped) < 0.05
