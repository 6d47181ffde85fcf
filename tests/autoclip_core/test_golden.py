"""Files that were written once and are never written again: whatever reads them stays honest.

The two in `golden/` are what `State.to_bytes()` made of the states below, with safetensors 0.8.0,
when version 1 of the format was fixed. A later version of the format gets files of its own; these
must still load to the same states.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autoclip.core import GroupState, History, ParameterInfo, Quantile, State

GOLDEN = Path(__file__).parent / "golden"
PAGE = Path(__file__).parents[2] / "docs" / "state-format.md"

SMALLEST = 2.0**-126
LARGEST = float(np.finfo(np.float32).max)

STATES = {
    # Parameter-wise, in two groups; a name that is no ASCII, and ones that are not known; windows
    # that are full, partly filled and empty; norms at the ends of float32.
    "quantile.safetensors": State(
        rule="quantile",
        global_clipping=False,
        framework="torch",
        library_version="0.3.0",
        groups=(
            GroupState.from_windows(
                {"quantile": 0.9, "history_length": 4},
                [
                    ParameterInfo("encoder.weight", (2, 3)),
                    ParameterInfo("größe", ()),
                    ParameterInfo(None, (0,)),
                ],
                [[0.1, 0.2, 0.30000001192092896, 4.0], [SMALLEST, LARGEST], []],
                [1_000_000_007, 2, 0],
            ),
            GroupState.from_windows(
                {"quantile": 0.5, "history_length": 1000},
                [ParameterInfo("head.bias", None)],
                [[1.5, 2.5, 1.5]],
                [3],
            ),
        ),
    ),
    "standard-global.safetensors": State(
        rule="standard",
        global_clipping=True,
        framework="tensorflow",
        library_version="0.3.0",
        groups=(
            GroupState.from_windows(
                {"deviations": 2.0, "history_length": 3},
                [
                    ParameterInfo("dense/kernel", (3, 2)),
                    ParameterInfo("dense/bias", (2,)),
                ],
                [[1.0, 2.0, 3.0]],
                [3],
            ),
        ),
    ),
}


@pytest.fixture(params=sorted(STATES))
def name(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


def test_golden_files_load_to_what_they_were_made_of(name: str) -> None:
    loaded, expected = State.from_bytes((GOLDEN / name).read_bytes(), name), STATES[name]
    assert loaded.rule == expected.rule
    assert loaded.global_clipping is expected.global_clipping
    assert loaded.framework == expected.framework
    assert loaded.library_version == expected.library_version
    assert len(loaded.groups) == len(expected.groups)
    for found, group in zip(loaded.groups, expected.groups):
        assert found.settings == group.settings
        assert found.parameters == group.parameters
        for tensor in ("values", "lengths", "recorded"):
            assert getattr(found, tensor).dtype == getattr(group, tensor).dtype
            assert getattr(found, tensor).tolist() == getattr(group, tensor).tolist()


def test_the_same_states_are_still_the_same_bytes(name: str) -> None:
    assert STATES[name].to_bytes() == (GOLDEN / name).read_bytes()


def test_a_history_goes_on_from_a_golden_file() -> None:
    rules = [Quantile(0.9)] * 3 + [Quantile(0.5)]
    history = History(4, rules, 4)
    with pytest.warns(UserWarning, match=r"history_length=1000 there and 4 here \(group 1\)\.$"):
        history.load(GOLDEN / "quantile.safetensors")
    report = history.record([0.5, 1.0, 7.0, 3.5])
    windows = [[0.2, 0.3, 4.0, 0.5], [SMALLEST, LARGEST, 1.0], [7.0], [1.5, 2.5, 1.5, 3.5]]
    expected = [
        np.quantile(np.array(window, np.float32).astype(np.float64), rule.quantile)
        for window, rule in zip(windows, rules)
    ]
    assert report.thresholds.tolist() == pytest.approx(expected, rel=1e-15)
    assert history.recorded.tolist() == [1_000_000_008, 3, 1, 4]


READ = """
import sys
for path in sys.argv[1:]:
    state = read_state(path)
    for group in state["groups"]:
        group["windows"] = [window.tolist() for window in group["windows"]]
        group["recorded"] = group["recorded"].tolist()
    print(state)
assert not any(name.startswith(("autoclip", "safetensors")) for name in sys.modules)
"""


def test_the_reader_in_the_documentation_reads_them() -> None:
    """Thirty lines, in a process that has neither AutoClip nor safetensors."""
    (reader,) = re.findall(
        r"^```python\n((?:(?!^```).)*?^def read_state.*?)^```", PAGE.read_text("utf-8"), re.M | re.S
    )
    names = sorted(STATES)
    command = [sys.executable, "-c", reader + READ, *(str(GOLDEN / name) for name in names)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for name, line in zip(names, done.stdout.splitlines(), strict=True):
        assert ast.literal_eval(line) == as_documented(STATES[name])


def as_documented(state: State) -> dict[str, Any]:
    """What the documentation's reader returns for a state."""
    return {
        "format": "autoclip",
        "version": 1,
        "rule": state.rule,
        "global_clipping": state.global_clipping,
        "framework": state.framework,
        "library_version": state.library_version,
        "groups": [
            {
                "settings": dict(group.settings),
                "parameters": [
                    {"name": p.name, "shape": None if p.shape is None else list(p.shape)}
                    for p in group.parameters
                ],
                "windows": [window.tolist() for window in group.windows()],
                "recorded": group.recorded.tolist(),
            }
            for group in state.groups
        ],
    }
