"""Files that were written once and are never written again: what reads them cannot change silently.

The files in `golden/` hold the contents below in version 1 of the format, byte for byte as
`docs/state-format.md` describes it: `by_hand` follows that page and uses nothing of AutoClip. A
later version of the format gets files of its own; these must still load to the same states.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import struct
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
LARGEST = (2 - 2.0**-23) * 2.0**127

CONTENTS: dict[str, dict[str, Any]] = {
    # One row a parameter, in two groups; a name that is not ASCII, and ones that are not known;
    # windows that are full, partly filled and empty; norms at the ends of float32.
    "quantile.safetensors": {
        "format": "autoclip",
        "version": 1,
        "rule": "quantile",
        "mode": "parameter",
        "framework": "torch",
        "library_version": "0.3.0",
        "groups": [
            {
                "settings": {
                    "quantile": 0.9,
                    "factor": 1.0,
                    "history_length": 4,
                    "max_norm": None,
                    "warmup_steps": 0,
                    "include_current": True,
                    "record": "raw",
                    "on_spike": "clip",
                    "on_nonfinite": "keep",
                },
                "parameters": [
                    {"name": "encoder.weight", "shape": [2, 3]},
                    {"name": "größe", "shape": []},
                    {"name": None, "shape": [0]},
                ],
                "windows": [[0.25, 0.5, 0.30000001192092896, 4.0], [SMALLEST, LARGEST], []],
                "recorded": [1_000_000_007, 2, 0],
            },
            {
                "settings": {
                    "quantile": 0.5,
                    "factor": 2.0,
                    "history_length": 1000,
                    "max_norm": 1e-05,
                    "warmup_steps": 10,
                    "include_current": False,
                    "record": "clipped",
                    "on_spike": "zero",
                    "on_nonfinite": "raise",
                },
                "parameters": [{"name": "head.bias", "shape": None}],
                "windows": [[1.5, 2.5, 1.5]],
                "recorded": [3],
            },
        ],
    },
    # One row for all parameters.
    "standard-global.safetensors": {
        "format": "autoclip",
        "version": 1,
        "rule": "standard",
        "mode": "global",
        "framework": "tensorflow",
        "library_version": "0.3.0",
        "groups": [
            {
                "settings": {
                    "deviations": 2.0,
                    "decay": 0.97,
                    "factor": 1.0,
                    "shrink": True,
                    "history_length": 3,
                    "max_norm": None,
                    "warmup_steps": 25,
                    "include_current": False,
                    "record": "raw",
                    "on_spike": "clip",
                    "on_nonfinite": "keep",
                },
                "parameters": [
                    {"name": "dense/kernel", "shape": [3, 2]},
                    {"name": "dense/bias", "shape": [2]},
                ],
                "windows": [[1.0, 2.0, 3.0]],
                "recorded": [3],
            },
        ],
    },
    # One row a group, more than ten groups, and a rule that only its user has, with settings that
    # no built-in rule has.
    "user-rule-group.safetensors": {
        "format": "autoclip",
        "version": 1,
        "rule": "my rule",
        "mode": "group",
        "framework": "jax",
        "library_version": "",
        "groups": [
            {
                "settings": {
                    "largest": None,
                    "kind": "x",
                    "count": -3,
                    "layers": [0.5, {"größe": None}],
                    "history_length": 9223372036854775807,
                    "max_norm": None,
                    "warmup_steps": 0,
                    "include_current": True,
                    "record": "raw",
                    "on_spike": "skip",
                    "on_nonfinite": "zero",
                },
                "parameters": [{"name": f"layer{i}", "shape": [i]}] * (i % 3),
                "windows": [[i + 0.5] * (i % 2)],
                "recorded": [i],
            }
            for i in range(12)
        ],
    },
}


def by_hand(contents: dict[str, Any]) -> bytes:
    """The file, as the documentation says."""
    groups = [
        {"settings": group["settings"], "parameters": group["parameters"]}
        for group in contents["groups"]
    ]
    what = contents | {"groups": groups, "sha256": "0" * 64}
    metadata = json.dumps(what, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(metadata.encode("ascii"))
    tensors = {}
    for i, group in enumerate(contents["groups"]):
        norms = [norm for window in group["windows"] for norm in window]
        lengths = [len(window) for window in group["windows"]]
        tensors[f"groups.{i}.lengths"] = "I64", struct.pack(f"<{len(lengths)}q", *lengths)
        tensors[f"groups.{i}.recorded"] = (
            "I64",
            struct.pack(f"<{len(lengths)}q", *group["recorded"]),
        )
        tensors[f"groups.{i}.values"] = "F32", struct.pack(f"<{len(norms)}f", *norms)
    for name in sorted(tensors):
        digest.update(tensors[name][1])
    before, _, after = metadata.rpartition("0" * 64)
    metadata = before + digest.hexdigest() + after
    entries, payload = [f'"__metadata__":{{"autoclip":{json.dumps(metadata)}}}'], b""
    for dtype, size in (("I64", 8), ("F32", 4)):
        for name in sorted(tensors):
            if tensors[name][0] == dtype:
                data = tensors[name][1]
                entries.append(entry(name, dtype, len(data) // size, len(payload), len(data)))
                payload += data
    header = ("{" + ",".join(entries) + "}").encode("ascii")
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + payload


def entry(name: str, dtype: str, count: int, begin: int, size: int) -> str:
    return (
        f'"{name}":{{"dtype":"{dtype}","shape":[{count}],"data_offsets":[{begin},{begin + size}]}}'
    )


@pytest.fixture(params=sorted(CONTENTS))
def name(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


def test_golden_files_are_what_the_documentation_says(name: str) -> None:
    assert (GOLDEN / name).read_bytes() == by_hand(CONTENTS[name])


def test_golden_files_load_to_what_they_were_made_of(name: str) -> None:
    state, expected = State.from_bytes((GOLDEN / name).read_bytes(), name), CONTENTS[name]
    for key in ("rule", "mode", "framework", "library_version"):
        assert getattr(state, key) == expected[key]
    assert len(state.groups) == len(expected["groups"])
    for found, group in zip(state.groups, expected["groups"]):
        assert found.settings == group["settings"]
        assert [
            {"name": p.name, "shape": None if p.shape is None else list(p.shape)}
            for p in found.parameters
        ] == group["parameters"]
        assert [window.tolist() for window in found.windows()] == group["windows"]
        assert found.recorded.tolist() == group["recorded"]
        assert (found.values.dtype, found.recorded.dtype) == (np.float32, np.int64)


def test_the_same_states_are_still_the_same_bytes(name: str) -> None:
    contents = CONTENTS[name]
    groups = tuple(
        GroupState.from_windows(
            group["settings"],
            [
                ParameterInfo(p["name"], None if p["shape"] is None else tuple(p["shape"]))
                for p in group["parameters"]
            ],
            group["windows"],
            group["recorded"],
        )
        for group in contents["groups"]
    )
    keys = ("rule", "mode", "framework", "library_version")
    state = State(groups=groups, **{key: contents[key] for key in keys})
    assert state.to_bytes() == (GOLDEN / name).read_bytes()


def test_a_history_goes_on_from_a_golden_file() -> None:
    """One group of it: a history has one length for all its rows."""
    state = State.from_bytes((GOLDEN / "quantile.safetensors").read_bytes())
    first = State("quantile", "parameter", "torch", state.groups[:1])
    history = History(3, Quantile(0.9), 4)
    history.load_state_dict(first.to_dict())
    report = history.record([0.5, 1.0, 7.0])
    windows = [[0.5, 0.30000001192092896, 4.0, 0.5], [SMALLEST, LARGEST, 1.0], [7.0]]
    expected = [np.quantile(np.array(window), 0.9) for window in windows]
    assert report.thresholds.tolist() == pytest.approx(expected, rel=1e-15)
    assert history.recorded.tolist() == [1_000_000_008, 3, 1]


READ = """
import sys
for path in sys.argv[1:]:
    state = read_state(path)
    for group in state["groups"]:
        group["windows"] = [window.tolist() for window in group["windows"]]
        group["recorded"] = group["recorded"].tolist()
    del state["sha256"]
    print(state)
assert not any(name.startswith(("autoclip", "safetensors")) for name in sys.modules)
"""


def test_the_reader_in_the_documentation_reads_them() -> None:
    """Thirty lines, in a process that has neither AutoClip nor safetensors."""
    (reader,) = re.findall(
        r"^```python\n((?:(?!^```).)*?^def read_state.*?)^```", PAGE.read_text("utf-8"), re.M | re.S
    )
    names = sorted(CONTENTS)
    command = [sys.executable, "-c", reader + READ, *(str(GOLDEN / name) for name in names)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for name, line in zip(names, done.stdout.splitlines(), strict=True):
        assert ast.literal_eval(line) == CONTENTS[name]
