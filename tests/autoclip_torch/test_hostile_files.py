"""Files of PyTorch that are made to cost much: each is refused at once, and nothing in it runs."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path
from typing import Any

import hostile_files
import pytest
import torch
from command import main
from hypothesis import given, settings
from hypothesis import strategies as st

from autoclip.core.inspect import read_states
from autoclip.torch import QuantileClip

resource = pytest.importorskip("resource", reason="Windows has neither this nor named pipes")
MOST_MEMORY = 150 * 2**10 * (2**10 if sys.platform == "darwin" else 1)  # as getrusage counts it
SLOW_TO_WRITE = {"an_archive_that_deflates_to_4_gib"}

pytestmark = pytest.mark.timeout(60)


def refuse(arguments: list[str], folder: Path, capsys: Any) -> str:
    """Run the command, which must refuse the file in one line, without taking memory for it."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    code = main(arguments)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    captured = capsys.readouterr()
    assert (code, captured.out) == (1, "")
    assert captured.err.startswith(f"autoclip: {folder}")
    assert captured.err.count("\n") == 1
    assert after - before < MOST_MEMORY
    assert not (folder / "unpickled").exists()
    return str(captured.err)


@pytest.mark.parametrize("attack", sorted(hostile_files.TORCH.keys() - SLOW_TO_WRITE))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_checkpoints(attack: str, tmp_path: Path, capsys: Any) -> None:
    path = hostile_files.TORCH[attack](tmp_path)
    refuse(["check", str(path)], tmp_path, capsys)


@pytest.mark.parametrize("attack", hostile_files.LEGACY)
def test_checkpoints_of_0_2_1(attack: str, tmp_path: Path, capsys: Any) -> None:
    path = hostile_files.LEGACY[attack](tmp_path)
    refuse(["convert", str(path), str(tmp_path / "new.autoclip")], tmp_path, capsys)
    assert not (tmp_path / "new.autoclip").exists()


def test_a_state_in_several_places_is_parsed_once(tmp_path: Path) -> None:
    """A checkpoint in which it is the same object, as a copied optimizer's is."""
    saved = {"format": "autoclip", "version": 1, "data": hostile_files.state()}
    path = hostile_files.torch_save({"a": saved, "b": [saved], "c": dict(saved)}, tmp_path / "r.pt")
    states = read_states(path)
    assert list(states) == ["a", "c"]
    assert states["a"] is states["c"]


def test_a_checkpoint_with_python_objects_is_read(tmp_path: Path) -> None:
    """Lightning and trainers save such objects next to the optimizer's state."""
    optimizer = QuantileClip.as_optimizer(torch.optim.Adam([torch.ones(2, requires_grad=True)]))
    optimizer.param_groups[0]["params"][0].grad = torch.ones(2)
    optimizer.step()
    others = {
        "path": Path("x"),
        "error": ValueError("y"),
        "set": {1},
        "device": torch.device("cpu"),
    }
    torch.save({"args": others, "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    [(place, found)] = read_states(tmp_path / "run.pt").items()
    assert place == "optimizer.autoclip"
    assert found.to_bytes() == optimizer.clipper.state_dict()["data"]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("zipped", [True, False])
def test_all_protocols(protocol: int, zipped: bool, tmp_path: Path) -> None:
    saved = {"format": "autoclip", "version": 1, "data": hostile_files.state(3)}
    value = {"model": torch.ones(3), "é": [None, True, 1.5, 2**40, (), {"state": saved}]}
    torch.save(
        value,
        tmp_path / "run.pt",
        pickle_protocol=protocol,
        _use_new_zipfile_serialization=zipped,
    )
    [(place, found)] = read_states(tmp_path / "run.pt").items()
    assert place == "é.5.state"
    assert found.to_bytes() == saved["data"]


@pytest.mark.timeout(1200)  # of many more examples at night
@settings(max_examples=150)
@given(data=st.data())
def test_no_changed_instruction_of_a_pickle_ends_in_a_traceback(
    data: st.DataObject, tmp_path_factory: Any
) -> None:
    """Inside an archive whose checksums are right, for both commands that read it."""
    folder = tmp_path_factory.mktemp("changed")
    legacy = {"state": {1: {"history": torch.ones(3)}}, "param_groups": [{"quantile": 0.5}]}
    legacy["param_groups"][0].update(history_length=10, params=[1])
    state = {"format": "autoclip", "version": 1, "data": hostile_files.state()}
    path = hostile_files.torch_save({"a": state, "b": legacy}, folder / "run.pt")
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    pickled = bytearray(entries["run/data.pkl"])
    for _ in range(data.draw(st.integers(1, 3))):
        index = data.draw(st.integers(0, len(pickled) - 1))
        length = data.draw(st.integers(0, 3))
        pickled[index : index + length] = data.draw(st.binary(max_size=4))
    with zipfile.ZipFile(path, "w") as archive:
        for name, contents in entries.items():
            archive.writestr(name, bytes(pickled) if name.endswith("data.pkl") else contents)
    assert main(["check", str(path)]) in (0, 1)
    assert main(["convert", str(path), str(folder / "new.autoclip")]) in (0, 1, 2)
