"""Measure the cost of small hostile files until they are refused.

Each file of `tests/harness/hostile_files.py` is read by `autoclip check` or `autoclip convert` in a
process of its own, with a limit on its memory. Time and memory are those beyond the import of the
framework.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "harness"))
import hostile_files
from command import LOAD

KINDS = {
    "torch": (hostile_files.TORCH, "autoclip.torch", "check"),
    "legacy": (hostile_files.LEGACY, "autoclip.torch", "convert"),
    "keras": (hostile_files.KERAS, "autoclip.tf", "check"),
}
CHILD = f"""
{LOAD}
import importlib, json, resource, sys, time, warnings
module, limit, *arguments = sys.argv[1:]
warnings.simplefilter("ignore")
importlib.import_module(module)
resource.setrlimit(resource.RLIMIT_AS, (int(limit), int(limit)))
print("ready", flush=True)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
try:
    code = main(arguments)
except Exception as error:
    code = type(error).__name__
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([code, time.perf_counter() - start, (peak - before) / 1024]), flush=True)
"""


def measure(
    module: str, arguments: list[str], limit: int, seconds: float
) -> tuple[str, float, float]:
    """The outcome, seconds, and mebibytes beyond those of the import."""
    command = [sys.executable, "-c", CHILD, module, str(limit), *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        before = resident(child.pid, "VmRSS")
        start, peak = time.perf_counter(), [before]
        done = threading.Event()

        def watch() -> None:
            while not done.wait(0.05):
                peak[0] = max(peak[0], resident(child.pid, "VmHWM"))
                if time.perf_counter() - start > seconds:
                    child.kill()

        watcher = threading.Thread(target=watch)
        watcher.start()
        lines = child.stdout.read().splitlines()
        done.set()
        watcher.join()
        code = child.wait()
    took = time.perf_counter() - start
    for line in lines:
        if line.startswith("["):
            outcome, took, used = json.loads(line)
            return f"exit {outcome}", took, used
    return ("no end" if took > seconds else f"died {code}"), took, peak[0] - before


def resident(process: int, field: str) -> float:
    """Mebibytes of memory of a process, 0 if it has ended."""
    try:
        text = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0.0
    found = [line.split()[1] for line in text.splitlines() if line.startswith(f"{field}:")]
    return float(found[0]) / 1024 if found else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", default=list(KINDS), help=f"of {', '.join(KINDS)}")
    parser.add_argument("--memory", type=int, default=16, help="the limit, in GiB of addresses")
    parser.add_argument("--seconds", type=float, default=60.0, help="the limit on time")
    parser.add_argument("--only", help="a part of the names of files")
    options = parser.parse_args()
    print(f"{'file':46}{'bytes':>10}  {'outcome':14}{'s':>8}{'MiB':>8}")
    for kind in options.kinds:
        attacks, module, subcommand = KINDS[kind]
        worst_time = worst_memory = 0.0
        count = 0
        for name, attack in attacks.items():
            if options.only and options.only not in name:
                continue
            with tempfile.TemporaryDirectory() as folder:
                path = attack(Path(folder))
                size = path.stat().st_size if path.is_file() else 0
                output = [f"{folder}/new.autoclip"] if subcommand == "convert" else []
                outcome, seconds, used = measure(
                    module, [subcommand, str(path), *output], options.memory << 30, options.seconds
                )
            print(f"{name:46}{size:10}  {outcome:14}{seconds:8.2f}{used:8.0f}", flush=True)
            count += 1
            worst_time, worst_memory = max(worst_time, seconds), max(worst_memory, used)
        print(f"{kind}: {count} files, at most {worst_time:.2f} s and {worst_memory:.0f} MiB\n")


if __name__ == "__main__":
    main()
