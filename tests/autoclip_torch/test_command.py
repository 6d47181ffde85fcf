"""The command `autoclip` on the files that PyTorch writes, and checkpoints of autoclip 0.2.1."""

from __future__ import annotations

import os
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from command import main
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from autoclip.core import StateError
from autoclip.core.inspect import read_states
from autoclip.torch import QuantileClip, StandardClip


def make(
    *sizes: int, clipper_class: Any = QuantileClip, **options: Any
) -> tuple[Any, list[Tensor]]:
    parameters = [torch.zeros(2, requires_grad=True) for _ in range(sum(sizes))]
    rest = iter(parameters)
    groups = [{"params": [next(rest) for _ in range(size)]} for size in sizes]
    optimizer = torch.optim.Adam(groups)
    return clipper_class.as_optimizer(optimizer, **options), parameters


def train(optimizer: Any, parameters: list[Tensor], steps: int = 4) -> None:
    for step in range(steps):
        for i, parameter in enumerate(parameters):
            parameter.grad = torch.tensor([1.0 + step, 2.0 + i])
        optimizer.step()


def data(states: dict[str, Any]) -> dict[str, bytes]:
    return {place: state.to_bytes() for place, state in states.items()}


def test_every_history_in_a_checkpoint_by_its_place(tmp_path: Path) -> None:
    first, second = make(2), make(1, global_clipping=True)
    for each in (first, second):
        train(*each)
    saved = [optimizer.clipper.state_dict()["data"] for optimizer, _ in (first, second)]
    path = tmp_path / "checkpoint.pt"
    torch.save(
        {
            "epoch": 3,
            "model": nn.Linear(2, 2).state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer, _ in (first, second)],
            "alone": OrderedDict(clipper=first[0].clipper.state_dict()),
        },
        path,
    )
    assert data(read_states(path)) == {
        "optimizers.0.autoclip": saved[0],
        "optimizers.1.autoclip": saved[1],
        "alone.clipper": saved[0],
    }


@pytest.mark.parametrize("name", ["run.pt", "run.pth", "run.ckpt", "run.bin"])
@pytest.mark.parametrize("zipped", [True, False])
def test_names_and_formats(name: str, zipped: bool, tmp_path: Path) -> None:
    optimizer, parameters = make(1)
    train(optimizer, parameters)
    state = optimizer.clipper.state_dict()
    torch.save(state, tmp_path / name, _use_new_zipfile_serialization=zipped)
    assert data(read_states(tmp_path / name)) == {"": state["data"]}


class Anything:
    """Objects that a checkpoint may hold, and those that must not be unpickled."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("unpickled"),))


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    optimizer, _ = make(1)
    torch.save({"optimizer": optimizer.state_dict(), "args": Anything()}, "run.pt")
    assert main(["check", "run.pt"]) == 0
    assert capsys.readouterr().out == "run.pt: ok, 1 row\n"
    assert not Path("unpickled").exists()


@settings(max_examples=30)
@given(drawn=st.data())
def test_no_damage_ends_in_a_traceback(drawn: st.DataObject, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.mktemp("damaged") / "run.pt"
    optimizer, parameters = make(1)
    train(optimizer, parameters)
    torch.save(optimizer.state_dict(), path)
    whole = path.read_bytes()
    damaged = bytearray(whole[: drawn.draw(st.integers(0, len(whole)))])
    if damaged:
        damaged[drawn.draw(st.integers(0, len(damaged) - 1))] ^= drawn.draw(st.integers(1, 255))
    path.write_bytes(damaged)
    # A changed byte may be one of the optimizer's own.
    assert main(["check", str(path)]) in (0, 1)


def test_a_damaged_history_is_named(tmp_path: Path, capsys: Any) -> None:
    optimizer, parameters = make(1)
    train(optimizer, parameters)
    saved = optimizer.state_dict()
    saved["autoclip"]["data"] = saved["autoclip"]["data"][:-1]
    torch.save({"optimizer": saved}, tmp_path / "run.pt")
    assert main(["show", str(tmp_path / "run.pt")]) == 1
    error = capsys.readouterr().err
    assert f"{tmp_path / 'run.pt'} at optimizer.autoclip" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("suffix", ["pt", "pth", "ckpt", "bin", "keras", "h5", "run.1"])
def test_a_state_file_may_have_any_suffix(suffix: str, tmp_path: Path) -> None:
    optimizer, parameters = make(1)
    train(optimizer, parameters)
    path = tmp_path / f"history.{suffix}"
    optimizer.clipper.save(path)
    assert data(read_states(path)) == {"": optimizer.clipper.state_dict()["data"]}


class TestFolders:
    def test_the_newest_checkpoint_of_a_trainer(self, tmp_path: Path) -> None:
        optimizer, parameters = make(1)
        newest = b""
        for step in (2, 10, 9):
            train(optimizer, parameters, 1)
            folder = tmp_path / f"checkpoint-{step}"
            folder.mkdir()
            torch.save(optimizer.state_dict(), folder / "optimizer.pt")
            newest = optimizer.clipper.state_dict()["data"] if step == 10 else newest
        assert data(read_states(tmp_path)) == {"autoclip": newest}
        optimizer.clipper.save(tmp_path / "checkpoint-10" / "autoclip.safetensors")
        assert data(read_states(tmp_path)) == {"": optimizer.clipper.state_dict()["data"]}

    def test_plain_files_the_newest_with_a_history(self, tmp_path: Path, capsys: Any) -> None:
        optimizer, parameters = make(1)
        for number, name in enumerate(["step-9.pt", "step-10.pt", "model.pt", "notes.txt"]):
            train(optimizer, parameters, 1)
            saved = optimizer.state_dict() if "step" in name else nn.Linear(2, 2).state_dict()
            torch.save(saved, tmp_path / name)
            os.utime(tmp_path / name, ns=(number, number))
        newest = torch.load(tmp_path / "step-10.pt")["autoclip"]["data"]
        assert data(read_states(tmp_path)) == {"autoclip": newest}
        assert main(["show", str(tmp_path)]) == 0
        assert str(tmp_path / "step-10.pt") in capsys.readouterr().out

    def test_weights_in_safetensors_files_are_passed_over(self, tmp_path: Path) -> None:
        optimizer, parameters = make(1)
        train(optimizer, parameters, 1)
        optimizer.clipper.save(tmp_path / "history.autoclip")
        save_file({"weight": torch.zeros(3)}, tmp_path / "model.safetensors")
        os.utime(tmp_path / "history.autoclip", ns=(1, 1))
        assert data(read_states(tmp_path)) == {"": optimizer.clipper.state_dict()["data"]}

    @pytest.mark.parametrize("name", ["train.bin", "data.pt", "corpus.tar", "digits.h5"])
    def test_so_are_other_programs_files(self, name: str, tmp_path: Path) -> None:
        optimizer, parameters = make(1)
        train(optimizer, parameters, 1)
        torch.save(optimizer.state_dict(), tmp_path / "checkpoint.pth.tar")
        os.utime(tmp_path / "checkpoint.pth.tar", ns=(1, 1))
        (tmp_path / name).write_bytes(bytes(range(1, 100)))
        expected = optimizer.clipper.state_dict()["data"]
        assert data(read_states(tmp_path)) == {"autoclip": expected}
        optimizer.clipper.save(tmp_path / name)  # as state files are not
        assert data(read_states(tmp_path)) == {"": expected}

    @pytest.mark.parametrize("contents", [b"", bytes(100)])
    def test_a_file_that_a_crash_has_cut_off_is_not(self, contents: bytes, tmp_path: Path) -> None:
        (tmp_path / "1.pt").write_bytes(contents)
        with pytest.raises(StateError, match=r"1\.pt is damaged"):
            read_states(tmp_path)

    def test_a_damaged_file_is_not_passed_over(self, tmp_path: Path) -> None:
        optimizer, parameters = make(1)
        train(optimizer, parameters, 1)
        torch.save(optimizer.state_dict(), tmp_path / "1.pt")
        (tmp_path / "2.pt").write_bytes((tmp_path / "1.pt").read_bytes()[:-100])
        with pytest.raises(StateError, match=r"2\.pt is damaged"):
            read_states(tmp_path)

    def test_folders_without_a_history(self, tmp_path: Path) -> None:
        with pytest.raises(StateError, match="holds no file with a history of AutoClip"):
            read_states(tmp_path)
        torch.save(torch.optim.SGD(nn.Linear(2, 2).parameters()).state_dict(), tmp_path / "x.ckpt")
        with pytest.raises(StateError, match="holds no file with a history of AutoClip"):
            read_states(tmp_path)
        (tmp_path / ".metadata").touch()
        with pytest.raises(StateError, match=r"only torch\.distributed\.checkpoint reads"):
            read_states(tmp_path)


# -- autoclip 0.2.1 ------------------------------------------------------------------------------

HISTORIES = st.lists(
    st.lists(st.floats(0.125, 100.0, width=32), min_size=1, max_size=5), min_size=2, max_size=4
)


def legacy(setting: str, histories: list[list[float]]) -> dict[str, Any]:
    """The result of `Clipper.state_dict()` of 0.2.1, which called parameters by their `id`."""
    ids = [139704945905248 + 96 * i for i in range(len(histories))]
    return {
        "state": {i: {"history": torch.tensor(each)} for i, each in zip(ids, histories)},
        "param_groups": [{setting: 0.75, "history_length": 100, "params": ids}],
    }


def windows(clipper: Any) -> list[list[float]]:
    return [w.tolist() for group in clipper.export_state().groups for w in group.windows()]


@settings(max_examples=20)
@given(
    HISTORIES,
    st.sampled_from([("quantile", QuantileClip), ("deviations", StandardClip)]),
    st.integers(1, 3),
    st.sampled_from(["clipper", "pair", "checkpoint"]),
)
def test_converted_files_hold_the_histories_of_the_old_checkpoint(
    tmp_path_factory: Any, histories: Any, rule: Any, first: int, layout: str
) -> None:
    setting, clipper_class = rule
    folder = tmp_path_factory.mktemp("old")
    first = min(first, len(histories) - 1)
    sizes = (first, len(histories) - first)
    old = legacy(setting, histories)
    inner = torch.optim.SGD([torch.zeros(2, requires_grad=True) for _ in histories]).state_dict()
    saved: Any = {
        "clipper": old,
        "pair": {"optimizer": inner, "clipper": old},
        "checkpoint": {"epoch": 1, "states": [inner, old]},
    }[layout]
    torch.save(saved, folder / "old.pth")
    division = ["--group-sizes", ",".join(map(str, sizes))]
    assert main(["convert", str(folder / "old.pth"), str(folder / "new.autoclip"), *division]) == 0
    options = {"history_length": 100, setting: 0.75, "include_current": False}
    loaded = make(*sizes, clipper_class=clipper_class, **options)[0].clipper
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # not even a setting differs
        loaded.load(folder / "new.autoclip")
    assert windows(loaded) == histories


class TestConvert:
    def test_a_file_that_is_not_there(self, tmp_path: Path, capsys: Any) -> None:
        missing = tmp_path / "old.pth"
        assert main(["convert", str(missing), str(tmp_path / "new.autoclip")]) == 2
        assert capsys.readouterr().err == f"autoclip: {missing}: No such file or directory\n"

    @pytest.fixture
    def old(self, tmp_path: Path) -> Path:
        path = tmp_path / "old.pth"
        torch.save(legacy("quantile", [[1.0, 2.0], [3.0]]), path)
        return path

    def test_it_says_what_it_wrote(self, old: Path, capsys: Any) -> None:
        new = old.with_name("new.autoclip")
        assert main(["convert", str(old), str(new)]) == 0
        assert capsys.readouterr().out == f"{new}: rule quantile, mode parameter, 2 rows\n"

    def test_other_commands_point_to_it(self, old: Path, capsys: Any) -> None:
        assert main(["show", str(old)]) == 1
        assert "was saved by autoclip 0.2.1. Convert it first" in capsys.readouterr().err

    def test_one_of_several(self, old: Path, capsys: Any) -> None:
        both = [legacy("quantile", [[1.0]]), legacy("deviations", [[2.0]])]
        torch.save({"clippers": both}, old)
        new = old.with_name("new.autoclip")
        assert main(["convert", str(old), str(new)]) == 2
        error = capsys.readouterr().err
        assert "Choose one with --history: clippers.0, clippers.1" in error
        assert not new.exists()
        assert main(["convert", str(old), str(new), "--history", "clippers.1"]) == 0
        assert read_states(new)[""].rule == "standard"
        assert main(["convert", str(old), str(new), "--history", "clippers.2"]) == 1

    def test_the_old_file_is_not_overwritten(self, old: Path, capsys: Any) -> None:
        before = old.read_bytes()
        link = old.with_name("link.pth")
        link.symlink_to(old)
        for new in (old, link):
            assert main(["convert", str(old), str(new)]) == 2
            assert f"{new} is OLD itself" in capsys.readouterr().err
        assert old.read_bytes() == before

    @pytest.mark.parametrize("sizes", ["x", "1,", "2,-1"])
    def test_sizes_that_are_no_numbers(self, sizes: str, old: Path, capsys: Any) -> None:
        with pytest.raises(SystemExit, match="2"):
            main(["convert", str(old), "new.autoclip", "--group-sizes", sizes])
        says = f"argument --group-sizes: must be ints ≥ 0, as in 10,4, got {sizes!r}"
        assert says in capsys.readouterr().err

    @pytest.mark.parametrize("sizes", ["1", "2,1"])
    def test_sizes_that_do_not_add_up(self, sizes: str, old: Path, capsys: Any) -> None:
        new = old.with_name("new.autoclip")
        assert main(["convert", str(old), str(new), "--group-sizes", sizes]) == 2
        assert "does not divide groups of [2] parameters" in capsys.readouterr().err
        assert not new.exists()

    def test_a_checkpoint_without_one(self, old: Path, capsys: Any) -> None:
        new = old.with_name("new.autoclip")
        optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters())
        torch.save(optimizer.state_dict(), old)
        assert main(["convert", str(old), str(new)]) == 1
        assert "holds no history of autoclip 0.2.1" in capsys.readouterr().err
        torch.save(
            {"state": {}, "param_groups": [{"quantile": 0.9, "history_length": 9, "params": [1]}]},
            old,
        )
        assert main(["convert", str(old), str(new)]) == 1
        assert "had recorded nothing" in capsys.readouterr().err
