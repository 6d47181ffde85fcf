"""Forks processes that run one test function each; one request a line of standard input."""

from __future__ import annotations

import faulthandler
import importlib.util
import json
import os
import signal
import sys
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # threads do not survive a fork, and cores are few
sys.path.insert(0, str(Path(__file__).parent))

import torch
import torch._dynamo
import torch.distributed as dist
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.tensor.parallel

import autoclip.torch  # noqa: F401

torch.set_num_threads(1)


def run(rank: int, request: dict[str, Any]) -> None:
    """One process of a test."""
    folder = Path(request["folder"])
    # Whoever hangs says where, a little before it is killed.
    with open(folder / f"{rank}.trace", "w") as trace:
        faulthandler.dump_traceback_later(request["seconds"] - 5, file=trace)
        store = dist.FileStore(str(folder / "store"), request["count"])
        dist.init_process_group(
            "gloo",
            store=store,
            rank=rank,
            world_size=request["count"],
            timeout=timedelta(seconds=request["seconds"] - 10),
        )
        spec = importlib.util.spec_from_file_location("the_test", request["path"])
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", module="autoclip")
            getattr(module, request["name"])(**request["arguments"])
        # Nobody leaves while others still talk to it.
        dist.barrier()
        faulthandler.cancel_dump_traceback_later()


def fork(rank: int, request: dict[str, Any]) -> int:
    """Start one process; it ends without the handlers of the one it came from."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        output = os.open(Path(request["folder"]) / f"{rank}.output", os.O_CREAT | os.O_WRONLY)
        os.dup2(output, 1)
        os.dup2(output, 2)
        run(rank, request)
        code = 0
    except BaseException:
        (Path(request["folder"]) / f"{rank}.error").write_text(traceback.format_exc())
    finally:
        os._exit(code)


def serve(request: dict[str, Any]) -> dict[int, str]:
    """Run one test in as many processes as it asks for; what went wrong, by rank."""
    running = {fork(rank, request): rank for rank in range(request["count"])}
    end = time.monotonic() + request["seconds"]
    failed: dict[int, str] = {}
    while running:
        process, status = os.waitpid(-1, os.WNOHANG)
        if process:
            rank = running.pop(process)
            if status:
                failed[rank] = f"ended with status {status}"
                end = min(end, time.monotonic() + 15)  # the others can only wait for it now
        elif time.monotonic() > end:
            for process, rank in running.items():
                os.kill(process, signal.SIGKILL)
                failed.setdefault(rank, "was still running")
                end = float("inf")
        else:
            time.sleep(0.005)
    for rank in failed:
        for kind in ("error", "trace", "output"):
            path = Path(request["folder"]) / f"{rank}.{kind}"
            if path.exists():
                failed[rank] += "\n" + path.read_text(errors="replace")[-4000:]
    return failed


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line))), flush=True)
