"""Write the conformance vectors: `python tests/conformance/generate.py`.

Streams of gradients and settings are drawn with a fixed seed, thresholds and coefficients are
computed by `reference.py`. The same NumPy writes the same files; a later one may draw other
streams, which is a reason for a diff, but not for a failure of what was recorded.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from reference import SMALLEST, Row

VECTORS = Path(__file__).parent / "vectors"
STEPS = 24
LARGEST = (2 - 2.0**-10) * 2.0**127  # of 11 bits

# What rows that a backend may keep in one batch have in common.
QUANTILE = [
    {"history_length": 8, "include_current": True},
    {"history_length": 8, "include_current": False},
    {"history_length": 8, "include_current": False, "record": "clipped"},
    {"history_length": 1, "include_current": True},
    {"history_length": 1000, "include_current": True},
]
STANDARD = [
    {"history_length": 8, "include_current": False},
    {"history_length": 8, "include_current": True},
    {"history_length": 8, "include_current": False, "record": "clipped"},
    {"history_length": 8, "include_current": False, "decay": 0.9},
    {"history_length": 8, "include_current": False, "shrink": True},
    {
        "history_length": 8,
        "include_current": False,
        "record": "clipped",
        "decay": 0.9,
        "shrink": True,
    },
    {"history_length": 1000, "include_current": False, "decay": 0.9},
    {"history_length": 8, "include_current": False, "log": True},
]
STREAMS = ["ties", "constant", "spikes", "gaps", "falling", "silent"]


def stream(random: np.random.Generator, kind: str) -> list[float | None]:
    """One gradient a step, of one element; None for no gradient."""
    size = random.lognormal(size=STEPS)
    values = {
        "noise": size,
        "ties": random.integers(1, 4, STEPS),
        "constant": np.full(STEPS, 0.1),
        "spikes": np.where(random.random(STEPS) < 0.1, 1e6 * size, size),
        "extremes": random.choice([SMALLEST, 1.5 * SMALLEST, 1e-20, 1.0, 1e20, LARGEST], STEPS),
        "gaps": size,
        "falling": size * 0.5 ** np.arange(STEPS),
        "silent": np.zeros(STEPS),
    }[kind]
    values = short(values * random.choice([-1, 1], STEPS))
    share = {"gaps": 0.6, "silent": 1.0}.get(kind, 0.1)
    nothing = [None, math.nan, math.inf, -math.inf, 0.0, -0.0, SMALLEST / 2]
    return [
        nothing[random.integers(len(nothing))] if random.random() < share else float(value)
        for value in values
    ]


def short(values: np.ndarray) -> np.ndarray:
    """Rounded to 11 bits: float32 holds their squares, so that any norm of one of them is exact."""
    fraction, exponent = np.frexp(values)
    return np.ldexp(np.round(fraction * 2.0**11) / 2.0**11, exponent)


def settings(random: np.random.Generator, rule: str, shared: dict[str, Any]) -> dict[str, Any]:
    """All settings of a row: those of its batch, and numbers of its own."""
    clipped = shared.get("record") == "clipped"
    if rule == "quantile":
        own = {
            "quantile": random.choice([0.0, 0.1, 0.5, 0.9, 1.0]),
            "factor": 1.5 if clipped else random.choice([1.0, 1.0, 1.5, 0.5]),
        }
    else:
        own = {
            "deviations": random.choice([0.5, 2.0, 3.0] if clipped else [0.0, 0.5, 2.0, 3.0]),
            "decay": None,
            "factor": random.choice([1.0, 1.0, 1.5]),
            "shrink": False,
            "log": False,
        }
        if shared.get("decay"):
            own["decay"] = random.choice([0.5, 0.9, 0.999])
    common = {
        "max_norm": random.choice([None, None, 2.0, 1e-3]),
        "warmup_steps": random.choice([0, 0, 3]),
        "record": "raw",
        "on_spike": random.choice(["clip", "clip", "zero", "skip"]),
        "on_nonfinite": random.choice(["keep", "zero"]),
    }
    plain = {
        name: value.item() if isinstance(value, np.generic) else value
        for name, value in {**own, **common}.items()
    }
    return {**shared, **plain, **{n: v for n, v in shared.items() if n != "decay"}}


def norm_of(gradients: list[float | None], on_nonfinite: str) -> float:
    """The norm of what a row stands for, in float64."""
    held = [gradient for gradient in gradients if gradient is not None]
    if on_nonfinite == "zero":
        held = [gradient for gradient in held if math.isfinite(gradient)]
    return math.hypot(*held)


def recorded(rule: str, chosen: dict[str, Any], gradients: list[Any]) -> dict[str, Any] | None:
    """A row's effect on its gradients; None if the last bit of a threshold decides something."""
    row = Row(rule, **chosen)
    norms, thresholds, coefficients = [], [], []
    for step in zip(*gradients):
        norm = norm_of(list(step), chosen["on_nonfinite"])
        threshold, coefficient = row.step(norm)
        close = abs(norm / threshold - 1) < 1e-9 and norm != threshold
        if rule != "quantile" and chosen["on_spike"] != "clip" and close:
            return None
        norms.append(norm)
        thresholds.append(threshold)
        coefficients.append(coefficient)
    return {
        "settings": chosen,
        "gradients": gradients,
        "norms": norms,
        "thresholds": thresholds,
        "coefficients": coefficients,
        "window": row.window,
        "recorded": row.recorded,
    }


def parameter_wise(random: np.random.Generator, rule: str) -> list[Any]:
    rows: list[Any] = []
    for i, shared in enumerate(QUANTILE if rule == "quantile" else STANDARD):
        for kind in ["noise", "extremes", *STREAMS[i % 2 :: 2]]:
            row = None
            while row is None:
                row = recorded(rule, settings(random, rule, shared), [stream(random, kind)])
            rows.append(row)
    return rows


def together(random: np.random.Generator, rule: str, policies: list[str]) -> list[Any]:
    """Rows of three parameters each."""
    rows = []
    for on_nonfinite in policies:
        chosen = settings(random, rule, {"history_length": 8, "include_current": True})
        chosen |= {"on_nonfinite": on_nonfinite, "on_spike": "clip", "max_norm": None}
        gradients = [stream(random, kind) for kind in ("noise", "spikes", "gaps")]
        rows.append(recorded(rule, chosen, gradients))
    return rows


def plain(value: Any) -> Any:
    """As strict JSON has it: what is not finite as a string."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if value != value else "Infinity" if value > 0 else "-Infinity"
    return value


def main() -> None:
    random = np.random.default_rng(0)
    VECTORS.mkdir(exist_ok=True)
    files = {
        "quantile-parameter": parameter_wise(random, "quantile"),
        "standard-parameter": parameter_wise(random, "standard"),
        "standard-group": together(random, "standard", ["keep", "zero"]),
        "quantile-global-keep": together(random, "quantile", ["keep"]),
        "quantile-global-zero": together(random, "quantile", ["zero"]),
    }
    for name, rows in files.items():
        rule, mode = name.split("-")[:2]
        lines = ",\n".join(json.dumps(plain(row), separators=(",", ":")) for row in rows)
        text = f'{{"rule":"{rule}","mode":"{mode}","rows":[\n{lines}\n]}}\n'
        (VECTORS / f"{name}.json").write_text(text, encoding="ascii")


if __name__ == "__main__":
    main()
