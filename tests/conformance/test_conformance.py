"""Core, torch and TensorFlow compute what the vectors say; see README.md."""

from __future__ import annotations

import pytest
from implementations import IMPLEMENTATIONS, NAMES, deviations, read
from reference import Row

# Norms of one element are exact, so histories are, and quantiles have the bits of NumPy's; but XLA
# fuses multiplications with additions. Norms of several elements are right to 1e-6, and so is what
# follows from them.
FLOAT64, FLOAT32 = 1e-14, 2.0**-23
ONE_ELEMENT = {"thresholds": FLOAT64, "coefficients": FLOAT64, "histories": 0, "gradients": FLOAT32}
# exp multiplies the rounding of a logarithm by its size, which float32's norms bring to 88.
LOGARITHMS = {"thresholds": 88 * 2.0**-51, "coefficients": 88 * 2.0**-51}
SEVERAL = {"thresholds": 1e-6, "coefficients": 1e-6, "histories": 1e-6, "gradients": 1e-6}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_every_implementation_computes_what_the_vectors_say(name: str, implementation: str) -> None:
    file = read(name)
    limits = ONE_ELEMENT if file["mode"] == "parameter" else SEVERAL
    if name == "quantile-parameter" and implementation != "tensorflow xla":
        limits = {**limits, "thresholds": 0}
    found = IMPLEMENTATIONS[implementation](file)
    for i, ours in enumerate(found):
        row = {**file, "rows": file["rows"][i : i + 1]}
        logarithms = LOGARITHMS if row["rows"][0]["settings"].get("log") else {}
        for kind, deviation in deviations(row, [ours]):
            limit = max(limits[kind], logarithms.get(kind, 0))
            assert deviation <= limit, (i, kind, row["rows"][0], ours)


@pytest.mark.parametrize("name", NAMES)
def test_the_vectors_are_what_the_reference_computes(name: str) -> None:
    file = read(name)
    for row in file["rows"]:
        reference = Row(file["rule"], **row["settings"])
        for norm, *expected in zip(row["norms"], row["thresholds"], row["coefficients"]):
            assert reference.step(norm) == pytest.approx(tuple(expected), rel=1e-15, abs=0)
        assert (reference.window, reference.recorded) == (row["window"], row["recorded"])


def test_the_vectors_hold_every_setting() -> None:
    """A setting that is added has to be recorded: each has more than one value somewhere."""
    from autoclip.core.adapter import RULES, GroupSettings

    for rule in ("quantile", "standard"):
        rows = [row for name in NAMES for row in read(name)["rows"] if name.startswith(rule)]
        for setting in GroupSettings(RULES[rule]()).settings:
            assert len({row["settings"][setting] for row in rows}) > 1, (rule, setting)
