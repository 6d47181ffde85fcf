"""The command `autoclip`: what it prints, its exit codes, and one line for each error."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from command import LOAD
from command import main as command
from hypothesis import given, settings
from hypothesis import strategies as st

import autoclip.core
from autoclip.core import GroupState, History, ParameterInfo, Quantile, State, StateError
from autoclip.core.adapter import GroupSettings
from autoclip.core.inspect import read_states, summarize

SETTINGS = GroupSettings(Quantile(0.5)).settings


def make(
    rule: str = "quantile", rows: int = 2, name: str = "encoder.weight", framework: str = "torch"
) -> State:
    infos = [ParameterInfo(f"{name}.{row}", (2, 2)) for row in range(rows)]
    windows = [[1.0 + row, 3.0, 2.0] for row in range(rows)]
    chosen = SETTINGS if rule == "quantile" else {**SETTINGS, "strength": 2}
    group = GroupState.from_windows(chosen, infos, windows, [3] * rows)
    return State(rule, "parameter", framework, (group,), "0.3.0")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.autoclip"
    path.write_bytes(make().to_bytes())
    return path


def run(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "autoclip.core", *map(str, arguments)],
        capture_output=True,
        text=True,
        **options,
    )


def main(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    try:
        code = command(list(map(str, arguments)))
    except SystemExit as stop:  # argparse's
        code = stop.code  # type: ignore[assignment]
    captured = capsys.readouterr()
    return code, captured.out, captured.err


class TestAsAProcess:
    def test_the_script_is_installed_and_shows(self, file: Path) -> None:
        script = Path(sys.executable).with_name("autoclip")
        found = subprocess.run([script, "show", file], capture_output=True, text=True)
        assert (found.returncode, found.stderr) == (0, "")
        assert "rule quantile, a history for each parameter; saved by torch" in found.stdout
        assert "encoder.weight.1" in found.stdout

    def test_it_needs_no_framework(self, file: Path) -> None:
        code = f"import sys; {LOAD} main(); print(*sys.modules, file=sys.stderr)"
        found = subprocess.run(
            [sys.executable, "-c", code, "show", file], capture_output=True, text=True
        )
        assert not {"torch", "tensorflow", "matplotlib"} & set(found.stderr.split())

    def test_the_core_does_without_it(self) -> None:
        """Summaries, plots and the command import the core; nothing in the core imports them."""
        code = (
            "import sys, autoclip.core, autoclip.core.adapter;"
            "print(*(name for name in sys.modules if name.startswith('autoclip.core.inspect')))"
        )
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert (found.returncode, found.stdout.strip()) == (0, "")

    def test_a_picture(self, file: Path, tmp_path: Path) -> None:
        environment = {**os.environ, "DISPLAY": "", "MPLBACKEND": "TkAgg"}
        found = run("plot", file, "-o", tmp_path / "run.png", env=environment)
        assert (found.returncode, found.stdout, found.stderr) == (0, "", "")
        assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")

    def test_a_damaged_file(self, file: Path) -> None:
        data = bytearray(file.read_bytes())
        data[-40] ^= 1
        file.write_bytes(data)
        found = run("check", file)
        assert (found.returncode, found.stdout) == (1, "")
        assert found.stderr.startswith(f"autoclip: {file}")
        assert found.stderr.count("\n") == 1

    def test_a_reader_that_has_seen_enough(self, tmp_path: Path) -> None:
        path = tmp_path / "large.autoclip"
        path.write_bytes(make(rows=3000).to_bytes())
        with subprocess.Popen(
            [sys.executable, "-m", "autoclip.core", "show", "--all", path],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as process:
            assert process.stdout is not None and process.stderr is not None
            process.stdout.readline()
            process.stdout.close()
            assert process.stderr.read() == b""
        assert process.returncode == 141  # as of cat and of git: 128 and the number of SIGPIPE

    @pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="Windows has no signals")
    def test_ctrl_c(self, tmp_path: Path) -> None:
        """While it reads."""
        code = (
            "import signal, sys\n"
            # A program in the background begins with it ignored.
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            "from autoclip.core import State\n"
            f"{LOAD}\n"
            "State.from_bytes = lambda data, source: signal.raise_signal(signal.SIGINT)\n"
            "sys.exit(main())"
        )
        path = tmp_path / "run.autoclip"
        path.write_bytes(make().to_bytes())
        found = subprocess.run(
            [sys.executable, "-c", code, "show", path], capture_output=True, text=True
        )
        assert (found.returncode, found.stdout, found.stderr) == (130, "", "")

    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no full device")
    def test_a_full_disk(self, file: Path) -> None:
        with open("/dev/full", "w") as full:
            found = subprocess.run(
                [sys.executable, "-m", "autoclip.core", "show", file],
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
            )
        assert found.returncode == 2
        assert found.stderr == "autoclip: [Errno 28] No space left on device\n"

    def test_a_file_of_another_kind_loads_no_framework(self, tmp_path: Path) -> None:
        show = "print(*sys.modules, file=sys.stderr)"
        code = f"import sys; {LOAD} code = main(); {show}; sys.exit(code)"
        (tmp_path / "notes.txt").write_text("some words about a run")
        found = subprocess.run(
            [sys.executable, "-c", code, "show", tmp_path / "notes.txt"],
            capture_output=True,
            text=True,
        )
        assert found.returncode == 1
        assert "neither its name nor its first bytes are those of a checkpoint" in found.stderr
        assert not {"torch", "tensorflow", "keras", "h5py"} & set(found.stderr.split())


class TestShow:
    def test_json(self, file: Path, capsys: Any) -> None:
        code, out, err = main(capsys, "show", "--json", file)
        found = json.loads(out)[""]
        assert (code, err) == (0, "")
        assert found["rule"] == "quantile"
        assert found["groups"] == [{"settings": SETTINGS, "parameters": 2}]
        assert [row["threshold"] for row in found["rows"]] == [2.0, 2.0]
        assert found["rows"][0]["shape"] == [2, 2]
        assert set(found["clipped_at"]) == {"0.1", "0.25", "0.5", "0.75", "0.9", "0.95", "0.99"}

    def test_all_rows(self, tmp_path: Path, capsys: Any) -> None:
        path = tmp_path / "run.autoclip"
        path.write_bytes(make(rows=40).to_bytes())
        shown = main(capsys, "show", path)[1]
        assert "40 rows, the 30 clipped hardest (the lowest coefficient first)" in shown
        coefficients = [
            float(line.split()[-1]) for line in shown.splitlines() if line.startswith("encoder.")
        ]
        assert len(coefficients) == 30
        assert coefficients == sorted(coefficients)
        _, out, _ = main(capsys, "show", "--all", path)
        assert out.count("encoder.weight.") == 40

    @pytest.mark.parametrize("width", [40, 80, 120, 200])
    @pytest.mark.parametrize("length", [5, 60, 300])
    def test_it_fits_the_terminal(
        self,
        width: int,
        length: int,
        tmp_path: Path,
        capsys: Any,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv("COLUMNS", str(width))
        path = tmp_path / "r"
        names = "".join(f"layer{i}." for i in range(length))[:length]
        path.write_bytes(make(rows=50, name=names).to_bytes())
        for line in main(capsys, "show", path)[1].splitlines():
            assert len(line) <= max(width, 60) or line == str(path)
        if width == 200 and length < 100:
            assert f"{names}.0 " in main(capsys, "show", path)[1]

    def test_settings_that_are_the_default_are_left_out(self, file: Path, capsys: Any) -> None:
        assert (
            "2 parameters, quantile=0.5, factor=1.0, history_length=1000\n"
            in (main(capsys, "show", file)[1])
        )
        other = GroupSettings(Quantile(0.5), max_norm=2.0, include_current=False)
        group = GroupState.from_windows(other.settings, [ParameterInfo("a", ())], [[1.0]], [1])
        file.write_bytes(State("quantile", "parameter", "numpy", (group,)).to_bytes())
        _, out, _ = main(capsys, "show", file)
        assert "max_norm=2.0" in out and "include_current=False" in out
        assert "on_spike" not in out and "warmup_steps" not in out

    @pytest.mark.parametrize(
        ("name", "shown"),
        [
            ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
            ("two\nlines", r"two\nlines"),
            ("right\u202eleft", r"right\u202eleft"),
            ("lone\udc80", r"lone\udc80"),
            ("größe", "größe"),
        ],
    )
    def test_names_are_printed_escaped(
        self, name: str, shown: str, tmp_path: Path, capsys: Any
    ) -> None:
        path = tmp_path / "run.autoclip"
        path.write_bytes(make(name=name, framework=name).to_bytes())
        code, out, err = main(capsys, "show", path)
        assert (code, err) == (0, "")
        assert f"{shown}.0 " in out
        assert f"saved by {shown}," in out
        assert out.replace("\n", "").isprintable()
        code, _, err = main(capsys, "plot", path, "-o", tmp_path / "a.png", "--row", "other")
        assert code == 2
        assert shown in err
        assert err.count("\n") == 1 and err.strip().isprintable()

    def test_a_terminal_that_has_few_characters(self, tmp_path: Path) -> None:
        path = tmp_path / "run.autoclip"
        path.write_bytes(make(name="größe").to_bytes())
        found = run("show", path, env={**os.environ, "PYTHONIOENCODING": "ascii"})
        assert (found.returncode, found.stderr) == (0, "")
        assert r"gr\xf6\xdfe.0" in found.stdout

    def test_a_rule_of_the_users(self, tmp_path: Path, capsys: Any) -> None:
        path = tmp_path / "run.autoclip"
        path.write_bytes(make("somebodys").to_bytes())
        code, out, _ = main(capsys, "show", path)
        assert code == 0
        assert "strength=2" in out
        assert "'somebodys' is not registered in this process: no thresholds" in out
        assert main(capsys, "plot", path, "-o", tmp_path / "run.png")[0] == 0


class TestPlot:
    @pytest.mark.parametrize("kind", ["overview", "norms", "distribution", "clipped"])
    def test_kinds(self, kind: str, file: Path, capsys: Any) -> None:
        output = file.with_suffix(".svg")
        arguments = ("--row", "encoder.weight.0", "--quantiles", "0.5,0.9")
        assert main(capsys, "plot", file, "-o", output, "--kind", kind, *arguments)[0] == 0
        assert "</svg>" in output.read_text()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--row", "decoder"), "There is no row 'decoder', only 'encoder.weight.0', "),
            (("--row", "encoder"), "2 rows have 'encoder' in their names: 'encoder.weight.0', "),
            (("--row", "2"), "There is no row 2"),
            (("--quantiles", "0.5,2"), "must be numbers from 0 to 1, as in 0.5,0.9, got '0.5,2'"),
            (("--quantiles", "x"), "must be numbers from 0 to 1, as in 0.5,0.9, got 'x'"),
            (("--kind", "pie"), "invalid choice: 'pie'"),
        ],
    )
    def test_wrong_arguments(
        self, arguments: tuple[str, ...], message: str, file: Path, capsys: Any
    ) -> None:
        code, out, err = main(capsys, "plot", file, "-o", file.with_suffix(".png"), *arguments)
        assert (code, out) == (2, "")
        assert message in err
        assert err.count("\n") == 1

    @pytest.mark.parametrize("row", ["encoder.weight.1", "1", "-1", "t.1"])
    def test_a_row_by_name_number_or_part(self, row: str, file: Path, capsys: Any) -> None:
        output = file.with_suffix(".svg")
        options = ("--kind", "norms", "--row", row)
        assert main(capsys, "plot", file, "-o", output, *options)[0] == 0
        assert "<!-- encoder.weight.1 -->" in output.read_text()

    def test_a_format_that_matplotlib_does_not_know(self, file: Path, capsys: Any) -> None:
        code, _, err = main(capsys, "plot", file, "-o", file.with_suffix(".xyz"))
        assert code == 2
        assert "Format 'xyz' is not supported" in err
        assert err.count("\n") == 1


class TestCheck:
    def test_several_files(self, file: Path, capsys: Any) -> None:
        other = file.with_name("other.autoclip")
        other.write_bytes(file.read_bytes()[:-1])
        assert main(capsys, "check", file) == (0, f"{file}: ok, 2 rows\n", "")
        code, out, err = main(capsys, "check", file, other)
        assert (code, out) == (1, f"{file}: ok, 2 rows\n")
        assert err.startswith(f"autoclip: {other}")
        code, out, _ = main(capsys, "check", "--json", file, other)
        found = json.loads(out)
        assert code == 1
        assert found[str(file)] == {"ok": True, "histories": 1, "rows": 2}
        assert not found[str(other)]["ok"]

    @pytest.mark.parametrize("length", [0, 20, 60])
    def test_a_state_file_that_is_cut_off_is_offered_to_no_reader(
        self, length: int, file: Path, capsys: Any
    ) -> None:
        file.write_bytes(file.read_bytes()[:length])
        code, _, err = main(capsys, "check", file)
        assert code == 1
        assert "cut off" in err

    @settings(max_examples=50)
    @given(st.data())
    def test_no_damage_ends_in_a_traceback(self, data: st.DataObject) -> None:
        whole = make().to_bytes()
        damaged = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
        if damaged:
            damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(0, 255))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "run.autoclip"
            path.write_bytes(damaged)
            assert command(["check", str(path)]) == (0 if bytes(damaged) == whole else 1)


class TestErrors:
    @pytest.mark.parametrize("subcommand", ["show", "check", "plot"])
    def test_a_file_that_is_not_there(self, subcommand: str, tmp_path: Path, capsys: Any) -> None:
        missing = tmp_path / "missing.autoclip"
        output = ("-o", tmp_path / "run.png") if subcommand == "plot" else ()
        code, out, err = main(capsys, subcommand, missing, *output)
        assert (code, out) == (2, "")
        assert err == f"autoclip: {missing}: No such file or directory\n"

    @pytest.mark.parametrize("suffix", ["", ".pt", ".keras", ".weights.h5", ".index", ".unknown"])
    def test_a_file_of_any_kind_that_is_not_there(
        self, suffix: str, file: Path, tmp_path: Path, capsys: Any
    ) -> None:
        missing = tmp_path / f"missing{suffix}"
        code, _, err = main(capsys, "check", file, missing)
        assert code == 2
        assert err == f"autoclip: {missing}: No such file or directory\n"

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no such pipes")
    def test_a_pipe_is_not_waited_for(self, tmp_path: Path, capsys: Any) -> None:
        os.mkfifo(tmp_path / "pipe")
        code, _, err = main(capsys, "show", tmp_path / "pipe")
        assert code == 1
        assert "is not a regular file" in err

    @pytest.mark.parametrize("arguments", [(), ("pain",), ("show",), ("show", "a", "b")])
    def test_wrong_arguments(self, arguments: tuple[str, ...], capsys: Any) -> None:
        code, out, err = main(capsys, *arguments)
        assert (code, out) == (2, "")
        assert err.startswith("autoclip")
        assert err.count("\n") == 1

    def test_help_and_version(self, capsys: Any) -> None:
        code, out, _ = main(capsys, "--version")
        assert (code, out) == (0, f"autoclip {autoclip.core.__version__}\n")
        code, out, _ = main(capsys, "-h")
        assert code == 0
        assert all(name in out for name in ("show", "plot", "check", "FILE"))


class TestExtensions:
    """Packages of others add readers and commands."""

    @pytest.fixture(autouse=True)
    def installed(self, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: Any) -> None:
        folder = tmp_path_factory.mktemp("site-packages")
        information = folder / "extension-1.0.dist-info"
        information.mkdir()
        (information / "METADATA").write_text("Metadata-Version: 2.1\nName: extension\n")
        (information / "entry_points.txt").write_text(
            "[autoclip.readers]\njax = extension:read\nfolder = extension:find_file\n"
            "broken = extension:read_nothing\n[autoclip.commands]\ncount = extension:add_count\n"
        )
        monkeypatch.setitem(sys.modules, "extension", sys.modules[__name__])
        monkeypatch.setattr(sys, "path", [str(folder), *without_packages()])

    def test_a_reader(self, tmp_path: Path, capsys: Any) -> None:
        path = tmp_path / "checkpoint.jax"
        path.write_text("two histories")
        code, out, _ = main(capsys, "show", path)
        assert code == 0
        assert f"{path} at first\n" in out
        assert f"{path} at second\n" in out
        code, out, _ = main(capsys, "show", "--json", "--history", "second", path)
        assert list(json.loads(out)) == ["second"]
        code, _, err = main(capsys, "show", "--history", "third", path)
        assert code == 1
        assert "It has 'first', 'second'" in err
        code, _, err = main(capsys, "plot", path, "-o", tmp_path / "run.png")
        assert code == 2
        assert "Choose one with --history: first, second" in err
        assert main(capsys, "check", path)[1] == f"{path}: ok, 3 rows\n"
        with pytest.raises(StateError, match="holds 2 histories: 'first', 'second'"):
            summarize(path)

    def test_what_a_framework_writes_is_not_shown(self, tmp_path: Path, capfd: Any) -> None:
        path = tmp_path / "checkpoint.jax"
        path.write_text("two histories")
        assert main(capfd, "check", path) == (0, f"{path}: ok, 3 rows\n", "")
        os.write(2, b"later")
        assert capfd.readouterr().err == "later"

    def test_a_folder(self, tmp_path: Path, capsys: Any) -> None:
        (tmp_path / "chosen.jax").write_text("two histories")
        (tmp_path / "newer.jax").write_text("two histories")
        assert f"{tmp_path / 'chosen.jax'} at first" in main(capsys, "show", tmp_path)[1]
        (tmp_path / "autoclip.safetensors").write_bytes(make(name="decoder").to_bytes())
        assert "decoder.0" in main(capsys, "show", tmp_path)[1]  # ours, without asking

    def test_a_file_without_a_history(self, tmp_path: Path, capsys: Any) -> None:
        path = tmp_path / "checkpoint.jax"
        path.write_text("nothing")
        assert main(capsys, "show", path) == (
            1,
            "",
            f"autoclip: {path} holds no history of AutoClip.\n",
        )

    def test_a_reader_that_fails(self, tmp_path: Path, capsys: Any) -> None:
        path = tmp_path / "checkpoint.broken"
        path.write_text("anything")
        code, _, err = main(capsys, "show", path)
        assert code == 1
        assert f"{path} cannot be read by extension:read_nothing: ZeroDivisionError" in err

    def test_a_command(self, file: Path, capsys: Any) -> None:
        assert main(capsys, "count", file, "--times", "3") == (7, "6\n", "")
        assert main(capsys, "count", file, "--times", "-1") == (1, "", "autoclip: two lines\n")
        assert "count" in main(capsys, "-h")[1]
        assert "--times" in main(capsys, "count", "-h")[1]

    def test_without_any(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
    ) -> None:
        monkeypatch.setattr(sys, "path", without_packages())
        for suffix, package in (("pt", "autoclip-torch"), ("keras", "autoclip-tf")):
            path = tmp_path / f"checkpoint.{suffix}"
            path.write_text("two histories")
            for subcommand in ("show", "check"):
                code, _, err = main(capsys, subcommand, path)
                assert code == 2
                assert err == (
                    f"autoclip: {path} is read by {package}, which is not installed. Install it "
                    f"with: pip install {package}\n"
                )
        assert "write the history in an autoclip 0.2.1 checkpoint" in main(capsys, "-h")[1]
        code, _, err = main(capsys, "convert", "old.pth", "new.autoclip", "--group-sizes", "3")
        assert code == 2
        assert err == (
            "autoclip: convert comes with autoclip-torch. Install it with: pip install "
            "autoclip-torch\n"
        )


def without_packages() -> list[str]:
    """The path without installed distributions; what is imported stays so."""
    return [each for each in sys.path if "site-packages" not in each]


def read(path: str) -> dict[str, State]:
    os.write(2, b"frameworks write this while they load")
    if Path(path).read_text() == "nothing":
        return {}
    return {"first": make(), "second": make(rows=1)}


def find_file(path: str) -> str:
    return str(Path(path) / "chosen.jax")


def read_nothing(path: str) -> dict[str, State]:
    raise ZeroDivisionError


def add_count(parser: Any) -> None:
    parser.add_argument("file")
    parser.add_argument("--times", type=int)

    def count(arguments: Any) -> int:
        if arguments.times < 0:
            raise StateError("two\nlines")
        [state] = read_states(arguments.file).values()
        print(arguments.times * len(state.groups[0].parameters))
        return 7

    parser.set_defaults(run=count)


def test_a_history_of_the_cores(tmp_path: Path, capsys: Any) -> None:
    history = History(rows=1, rule=Quantile(0.5))
    history.record([1.0])
    history.save(tmp_path / "any_name")
    assert "group 0 parameter 0" in main(capsys, "show", tmp_path / "any_name")[1]
