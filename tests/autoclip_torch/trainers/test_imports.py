"""Whose library is imported when, seen in fresh processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from processes import HARNESS, ForkServer, execute

LIBRARIES = ["lightning", "pytorch_lightning", "transformers", "accelerate"]


@pytest.fixture(scope="module")
def run() -> Iterator[Callable[[str], str]]:
    """Runs a program in a process that has imported torch alone, and returns what it printed."""
    server = ForkServer(HARNESS / "torch_alone.py")
    yield lambda code: server.call(execute, code=code).strip()
    server.close()


def test_autoclip_torch_imports_no_trainer(run: Callable[[str], str]) -> None:
    code = "import sys, autoclip.torch, autoclip.torch.logging; print(*sys.modules)"
    modules = run(code).split()
    assert "autoclip.torch" in modules
    assert not set(modules) & set(LIBRARIES)


@pytest.mark.parametrize(
    ("module", "missing", "extra"),
    [
        ("lightning", "lightning pytorch_lightning", "lightning"),
        ("transformers", "transformers", "transformers"),
        ("transformers", "accelerate", "transformers"),
    ],
)
def test_a_missing_library_is_named_with_the_command(
    run: Callable[[str], str], module: str, missing: str, extra: str
) -> None:
    said = run(
        f"""
import sys
for name in {missing!r}.split():
    sys.modules[name] = None  # as if it were not installed
try:
    import autoclip.torch.{module}
except ImportError as error:
    print(error)
"""
    )
    assert f'pip install "autoclip-torch[{extra}]"' in said


@pytest.mark.parametrize("missing", [pytest.param("", marks=pytest.mark.nightly), "lightning"])
def test_the_callback_works_with_pytorch_lightning(
    run: Callable[[str], str], missing: str, tmp_path: Path
) -> None:
    """With Lightning under its other name, whether or not `lightning` is installed as well."""
    said = run(
        f"""
import sys
if {missing!r}:
    sys.modules[{missing!r}] = None
import torch
import pytorch_lightning as pl
from autoclip.torch.lightning import AutoClipCallback

class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch):
        return self.layer(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())

def fit(epochs, **options):
    module = Module()
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, log_every_n_steps=1, default_root_dir={str(tmp_path)!r},
        callbacks=[AutoClipCallback(quantile=0.5)],
    )
    data = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=2), **options)
    return trainer, module.optimizers().optimizer.clipper

whole, expected = fit(2)
half, _ = fit(1)
half.save_checkpoint({str(tmp_path / "half.ckpt")!r})
_, resumed = fit(2, ckpt_path={str(tmp_path / "half.ckpt")!r})
print(sorted(whole.callback_metrics), resumed.state_dict() == expected.state_dict())
"""
    )
    assert "'autoclip/clipped'" in said and "'autoclip/total_norm'" in said
    assert said.endswith("True")
