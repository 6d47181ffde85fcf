"""Lightning: clip by a callback. `python lightning_module.py [EPOCHS]`."""

import sys

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from autoclip.torch.lightning import AutoClipCallback

EPOCHS = int(sys.argv[1]) if len(sys.argv) > 1 else 5


class Digits(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        images, labels = batch
        loss = nn.functional.cross_entropy(self.network(images), labels)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


seed_everything(0)
digits = load_digits()
data = TensorDataset(
    torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
)
trainer = Trainer(
    max_epochs=EPOCHS,
    accelerator="cpu",
    logger=False,
    enable_progress_bar=False,
    callbacks=[AutoClipCallback(quantile=0.9, global_clipping=True)],
)
trainer.fit(Digits(), DataLoader(data, batch_size=64, shuffle=True))
print({name: round(float(value), 3) for name, value in trainer.callback_metrics.items()})

# The checkpoint has the history: one more epoch continues it.
path = trainer.checkpoint_callback.best_model_path
trainer.fit_loop.max_epochs = EPOCHS + 1
trainer.fit(Digits(), DataLoader(data, batch_size=64, shuffle=True), ckpt_path=path)
