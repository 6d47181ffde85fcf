"""ultralytics: a trainer that clips by AutoClip. `python ultralytics_yolo.py DATA.yaml`."""

import sys

from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer

from autoclip.torch import QuantileClip
from autoclip.torch.logging import log_values


class AutoClipTrainer(DetectionTrainer):
    def build_optimizer(self, *args, **kwargs):
        optimizer = super().build_optimizer(*args, **kwargs)
        return QuantileClip.as_optimizer(optimizer, quantile=0.9, global_clipping=True)

    def optimizer_step(self):
        # As in the base class, without clip_grad_norm_(..., max_norm=10.0).
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.ema:
            self.ema.update(self.model)

    def save_metrics(self, metrics):
        super().save_metrics({**metrics, **log_values(self.optimizer.clipper)})


if __name__ == "__main__":
    YOLO("yolo11n.yaml").train(trainer=AutoClipTrainer, data=sys.argv[1], epochs=3)
