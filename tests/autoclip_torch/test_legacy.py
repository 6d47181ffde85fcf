"""Checkpoints of autoclip 0.2.1, made by hand in the layout that it wrote."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from command import main
from torch import nn
from torch.optim import SGD

from autoclip.torch import Clipper, QuantileClip, StandardClip, StateError

# What 0.2.1 called a parameter: its `id` in a process that is long gone.
IDENTIFIERS = [139704945905248, 139704938135328, 139704938555152, 139704944344224]
CLIPPERS: dict[str, tuple[Any, float]] = {
    "quantile": (QuantileClip, 0.5),
    "deviations": (StandardClip, 1.5),
}
each_rule = pytest.mark.parametrize("setting", CLIPPERS)


@pytest.fixture(autouse=True)
def no_warnings() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def old_state_dict(
    setting: str,
    histories: Sequence[Sequence[float] | None],
    sizes: Sequence[int] | None = None,
    history_length: int = 100,
    global_history: Sequence[float] | None = None,
) -> dict[str, Any]:
    """As `Clipper.state_dict()` of 0.2.1 returned it.

    Args:
        setting: "quantile" or "deviations".
        histories: one a parameter; None for one that had no gradient yet.
        sizes: how many parameters each group has; by default there is one group.
        history_length: of all groups.
        global_history: the one history, in global mode.
    """
    state: dict[Any, Any] = {
        identifier: {"history": torch.tensor(history)}
        for identifier, history in zip(IDENTIFIERS, histories)
        if history is not None
    }
    if global_history is not None:
        state = {"global_history": torch.tensor(global_history)}
    groups, rest = [], IDENTIFIERS[: len(histories)]
    for size in sizes or [len(histories)]:
        group = {setting: CLIPPERS[setting][1], "history_length": history_length}
        groups.append({**group, "params": rest[:size]})
        rest = rest[size:]
    return {"state": state, "param_groups": groups}


def convert(old: Any, folder: Path, *arguments: str) -> Path:
    """Save an old state_dict and convert it with the command."""
    torch.save(old, folder / "old.pth")
    new = folder / "new.autoclip"
    assert main(["convert", str(folder / "old.pth"), str(new), *arguments]) == 0
    return new


def make(setting: str, *sizes: int, **settings: Any) -> Clipper:
    """A clipper with groups of so many parameters."""
    make_clipper, value = CLIPPERS[setting]
    groups = [
        {"params": [torch.zeros(2, requires_grad=True) for _ in range(size)]} for size in sizes
    ]
    clipper: Clipper = make_clipper(groups, value, 100, include_current=False, **settings)
    return clipper


def windows(clipper: Clipper) -> list[list[float]]:
    groups = clipper.export_state().groups
    return [window.tolist() for group in groups for window in group.windows()]


# -- what loads ----------------------------------------------------------------------------------


@each_rule
def test_one_history_a_parameter(path: str, setting: str, tmp_path: Path) -> None:
    clipper = make(setting, 3)
    old = old_state_dict(setting, [[1.0, 2.0, 4.0], None, [0.5]])
    clipper.load(convert(old, tmp_path))
    assert windows(clipper) == [[1.0, 2.0, 4.0], [], [0.5]]
    recorded = [group.recorded.tolist() for group in clipper.export_state().groups]
    assert recorded == [[3, 0, 1]]
    # Training goes on from there.
    for parameter in clipper.param_groups[0]["params"]:
        parameter.grad = torch.tensor([3.0, 0.0])
    clipper.step()
    assert windows(clipper) == [[1.0, 2.0, 4.0, 3.0], [3.0], [0.5, 3.0]]
    if setting == "quantile":
        assert clipper.last.thresholds.tolist() == [2.0, math.inf, 0.5]  # of the norms before


@each_rule
def test_one_global_history(path: str, setting: str, tmp_path: Path) -> None:
    clipper = make(setting, 3, global_clipping=True)
    old = old_state_dict(setting, [None] * 3, global_history=[1.0, 2.0, 4.0])
    clipper.load(convert(old, tmp_path))
    assert windows(clipper) == [[1.0, 2.0, 4.0]]


@each_rule
def test_one_global_history_of_several_groups(setting: str, tmp_path: Path) -> None:
    old = old_state_dict(setting, [None] * 4, [3, 1], global_history=[1.0, 2.0])
    for sizes in ([3, 1], [4], [2, 2]):
        clipper = make(setting, *sizes, global_clipping=True)
        clipper.load(convert(old, tmp_path))
        assert windows(clipper) == [[1.0, 2.0]]


def test_several_groups(tmp_path: Path) -> None:
    clipper = make("quantile", 1, 2)
    old = old_state_dict("quantile", [[1.0], [2.0], [3.0]], sizes=[1, 2])
    clipper.load(convert(old, tmp_path))
    assert windows(clipper) == [[1.0], [2.0], [3.0]]


def test_one_group_of_all_that_an_optimizer_had_in_several(tmp_path: Path) -> None:
    """So `as_optimizer` of 0.2.1 made it, and ours makes one a group."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))

    def make_optimizer() -> Any:
        return SGD(
            [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[1].parameters()}],
            lr=0.2,
            momentum=0.5,
        )

    old = {
        "optimizer": make_optimizer().state_dict(),
        "clipper": old_state_dict("quantile", [[1.0], [2.0, 3.0], None, [4.0]]),
    }
    optimizer = QuantileClip.as_optimizer(make_optimizer(), 0.5, 100, include_current=False)
    with pytest.raises(StateError, match=r"has 1 parameter group, .* convert again with --group-s"):
        optimizer.clipper.load(convert(old, tmp_path))
    optimizer.clipper.load(convert(old, tmp_path, "--group-sizes", "2,2"))
    assert windows(optimizer.clipper) == [[1.0], [2.0, 3.0], [], [4.0]]
    assert [len(group["params"]) for group in optimizer.clipper.param_groups] == [2, 2]


def test_zeros_nan_and_infinities_are_dropped(path: str, tmp_path: Path) -> None:
    """0.2.1 recorded them all."""
    clipper = make("quantile", 2)
    dirty = [0.0, 1.0, math.nan, 2.0, math.inf, 1e-42, 3.0]
    old = old_state_dict("quantile", [dirty, [math.nan, 0.0]])
    clipper.load(convert(old, tmp_path))
    assert windows(clipper) == [[1.0, 2.0, 3.0], []]
    whole = make("quantile", 2, global_clipping=True)
    old = old_state_dict("quantile", [None, None], global_history=dirty)
    whole.load(convert(old, tmp_path))
    assert windows(whole) == [[1.0, 2.0, 3.0]]


def test_of_a_longer_history_the_newest_norms_stay(path: str, tmp_path: Path) -> None:
    """True if the checkpoint's own length is exceeded, not the clipper's."""
    clipper = make("quantile", 1)
    norms = [float(i) for i in range(1, 121)]
    new = convert(old_state_dict("quantile", [norms]), tmp_path)
    clipper.load(new)
    assert windows(clipper) == [norms[-100:]]
    parameters = [torch.zeros(2, requires_grad=True)]
    short = QuantileClip(parameters, 0.5, 3, include_current=False)
    with pytest.warns(UserWarning, match="history_length=100 there and 3 here") as caught:
        short.load(new)
    assert [warning.filename for warning in caught] == [__file__]
    assert windows(short) == [norms[-3:]]


def test_settings_as_0_2_1_allowed_them(tmp_path: Path) -> None:
    """A tensor for a quantile, and keys of the optimizer's in a group that was added later."""
    old = old_state_dict("quantile", [[1.0], [2.0]], [1, 1])
    old["param_groups"][0]["quantile"] = torch.tensor(0.5)
    old["param_groups"][1].update(lr=0.1, momentum=0, foreach=None)
    clipper = make("quantile", 1, 1)
    clipper.load(convert(old, tmp_path))
    assert windows(clipper) == [[1.0], [2.0]]


def test_another_setting_is_said(tmp_path: Path) -> None:
    old = old_state_dict("quantile", [[1.0]])
    old["param_groups"][0]["quantile"] = 0.75
    with pytest.warns(UserWarning, match=r"quantile=0\.75 there and 0\.5 here"):
        make("quantile", 1).load(convert(old, tmp_path))


# -- what does not -------------------------------------------------------------------------------


def with_state(state: Any) -> dict[str, Any]:
    return {**old_state_dict("quantile", [[1.0], [2.0]]), "state": state}


def with_groups(groups: Any) -> dict[str, Any]:
    return {**old_state_dict("quantile", [[1.0], [2.0]]), "param_groups": groups}


group = old_state_dict("quantile", [[1.0], [2.0]])["param_groups"][0]
ONE_TENSOR = torch.ones(3)
MALFORMED: dict[str, dict[str, Any]] = {
    "a list of states": with_state([1, 2]),
    "no states": with_state(None),
    "no history": with_state({IDENTIFIERS[0]: {"step": 3}}),
    "a history of words": with_state({IDENTIFIERS[0]: {"history": ["one", "two"]}}),
    "a history of nothing": with_state({IDENTIFIERS[0]: {"history": None}}),
    "a global history of words": with_state({"global_history": "one"}),
    "no groups": with_groups([]),
    "groups of numbers": with_groups([1]),
    "groups that are none": with_groups(None),
    "no params": with_groups([{"quantile": 0.5, "history_length": 100}]),
    "no history_length": with_groups([{"quantile": 0.5, "params": IDENTIFIERS[:2]}]),
    "no quantile": with_groups([{"history_length": 100, "params": IDENTIFIERS[:2]}]),
    "a quantile of words": with_groups([{**group, "quantile": "half"}]),
    "a quantile of 2": with_groups([{**group, "quantile": 2.0}]),
    "a history_length of 0": with_groups([{**group, "history_length": 0}]),
    "params that are a number": with_groups([{**group, "params": 5}]),
    "a parameter twice": with_groups([{**group, "params": [IDENTIFIERS[0]] * 2}]),
    "a group twice": with_groups([group, group]),
    "an expanded history": with_state(
        {IDENTIFIERS[0]: {"history": torch.ones(1).expand(2**40)}},
    ),
    "an expanded global history": with_state({"global_history": torch.ones(1).expand(2**40)}),
    "one history of two parameters": with_state(
        {key: {"history": ONE_TENSOR} for key in IDENTIFIERS[:2]}
    ),
    "the state of an optimizer": SGD([torch.zeros(2, requires_grad=True)], lr=1.0).state_dict(),
    "no step": old_state_dict("quantile", [None, None]),
}


@pytest.mark.parametrize("fault", MALFORMED)
def test_a_malformed_one_is_not_converted(fault: str, tmp_path: Path, capsys: Any) -> None:
    torch.save(MALFORMED[fault], tmp_path / "old.pth")
    new = tmp_path / "new.autoclip"
    assert main(["convert", str(tmp_path / "old.pth"), str(new)]) == 1
    assert "autoclip 0.2.1" in capsys.readouterr().err
    assert not new.exists()


MISFITS: dict[str, tuple[dict[str, Any], str]] = {
    "fewer parameters": (
        old_state_dict("quantile", [[1.0]]),
        "1 parameters in group 0, but the clipper has 2",
    ),
    "more parameters": (
        old_state_dict("quantile", [[1.0], [2.0], [3.0]]),
        "3 parameters in group 0, but the clipper has 2",
    ),
    "more groups": (
        old_state_dict("quantile", [[1.0], [2.0]], [1, 1]),
        "2 parameter groups, but the clipper has 1",
    ),
    "the other mode": (
        old_state_dict("quantile", [None, None], global_history=[1.0]),
        "global_clipping=True",
    ),
}


@pytest.mark.parametrize("fault", MISFITS)
def test_a_converted_one_of_another_model_changes_nothing(
    path: str, fault: str, tmp_path: Path
) -> None:
    clipper = make("quantile", 2)
    for parameter in clipper.param_groups[0]["params"]:
        parameter.grad = torch.tensor([3.0, 4.0])
    clipper.step()
    before = clipper.state_dict()
    old, message = MISFITS[fault]
    with pytest.raises(StateError, match=message):
        clipper.load(convert(old, tmp_path))
    assert clipper.state_dict() == before


def test_an_old_state_dict_is_refused_with_the_command_that_converts_it() -> None:
    old = old_state_dict("quantile", [[1.0], [2.0]])
    clipper = make("quantile", 2)
    with pytest.raises(StateError, match="autoclip convert"):
        clipper.load_state_dict(old)
    weight = torch.zeros(2, requires_grad=True)
    optimizer: Any = QuantileClip.as_optimizer(SGD([weight], lr=0.1))
    pair = {"optimizer": SGD([weight], lr=0.2).state_dict(), "clipper": old}
    with pytest.raises(StateError, match="autoclip convert"):
        optimizer.load_state_dict(pair)
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert windows(clipper) == [[], []] and windows(optimizer.clipper) == [[]]
