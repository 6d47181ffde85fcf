"""Every script in docs/examples runs, at a small size."""

from __future__ import annotations

import importlib.util
import socket
from pathlib import Path

import pytest
from pages import ROOT, run_example
from processes import ForkServer

FOLDER = ROOT / "docs" / "examples"
# The size of each run, as the script's argument.
ARGUMENTS = {
    "deepspeed_zero.py": ["4"],
    "digits.py": ["--seeds", "1", "--epochs", "1"],
    "expert_parallel.py": ["4"],
    "fsdp2.py": ["4"],
    "hugging_face.py": ["4"],
    "keras_fit.py": ["1"],
    "lightning_module.py": ["1"],
    "mirrored_strategy.py": ["1"],
    "custom_rule.py": ["15"],
    "quantile_schedule.py": ["20"],
    "torch_loop.py": ["1"],
    "torch_to_keras.py": ["10"],
}
# Classes for frameworks that are not part of this environment; tests/frameworks runs them.
FRAMEWORKS = {"nnunet_trainer.py", "optax_transformation.py", "ultralytics_yolo.py"}
PROCESSES = {"deepspeed_zero.py": 2, "expert_parallel.py": 2, "fsdp2.py": 2}
# What a run must have printed, beyond ending without an error.
OUTPUT = {
    "digits.py": "a new clipper: the same state",
    "expert_parallel.py": "norms",
    "fsdp2.py": "all 2 processes measured the norm",
    "mirrored_strategy.py": "2 replicas share one history",
}


@pytest.mark.parametrize("name", sorted({path.name for path in FOLDER.glob("*.py")} - FRAMEWORKS))
def test_example_runs(server: ForkServer, name: str, tmp_path: Path) -> None:
    if name == "deepspeed_zero.py" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not part of this environment")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = {"path": FOLDER / name, "arguments": ARGUMENTS[name]}
    outcomes = server.run(run_example, arguments, PROCESSES.get(name, 1), port=port)
    for outcome in outcomes:
        assert outcome.status == 0, str(outcome)
    assert OUTPUT.get(name, "") in outcomes[0].output
