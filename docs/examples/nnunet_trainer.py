"""nnU-Net v2: a trainer that clips by AutoClip. `nnUNetv2_train ... -tr nnUNetTrainerAutoClip`."""

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from autoclip.torch import QuantileClip
from autoclip.torch.logging import log_values


class nnUNetTrainerAutoClip(nnUNetTrainer):
    def configure_optimizers(self):
        optimizer, lr_scheduler = super().configure_optimizers()
        return QuantileClip.as_optimizer(
            optimizer, quantile=0.9, global_clipping=True
        ), lr_scheduler

    def train_step(self, batch):
        # As in the base class, without clip_grad_norm_(self.network.parameters(), 12).
        data, target = batch["data"].to(self.device, non_blocking=True), batch["target"]
        if isinstance(target, list):
            target = [each.to(self.device, non_blocking=True) for each in target]
        else:
            target = target.to(self.device, non_blocking=True)
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", enabled=self.device.type == "cuda"):
            loss = self.loss(self.network(data), target)
        if self.grad_scaler is None:
            loss.backward()
            self.optimizer.step()
        else:
            self.grad_scaler.scale(loss).backward()
            self.grad_scaler.step(self.optimizer)
            self.grad_scaler.update()
        return {"loss": loss.detach().cpu().numpy()}

    def on_train_epoch_end(self, train_outputs):
        super().on_train_epoch_end(train_outputs)
        self.print_to_log_file(log_values(self.optimizer.clipper))
