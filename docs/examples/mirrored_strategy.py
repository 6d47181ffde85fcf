"""Keras on several devices with MirroredStrategy. `python mirrored_strategy.py [EPOCHS]`.

Without two GPUs it divides the CPU into two logical devices.
"""

import sys

import keras
import tensorflow as tf
from sklearn.datasets import load_digits

from autoclip.tf import QuantileClip

EPOCHS = int(sys.argv[1]) if len(sys.argv) > 1 else 10
if len(tf.config.list_physical_devices("GPU")) >= 2:
    devices = [device.name for device in tf.config.list_logical_devices("GPU")]
else:
    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    devices = ["CPU:0", "CPU:1"]
strategy = tf.distribute.MirroredStrategy(
    devices, cross_device_ops=tf.distribute.ReductionToOneDevice()
)

digits = load_digits()
images, labels = digits.data.astype("float32") / 16, digits.target
keras.utils.set_random_seed(0)
with strategy.scope():
    model = keras.Sequential(
        [
            keras.layers.Input((64,)),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(10),
        ]
    )
    model.compile(
        optimizer=QuantileClip.as_optimizer(
            keras.optimizers.AdamW(1e-2), quantile=0.9, global_clipping=True
        ),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=False,  # Keras does not support XLA under this strategy
    )
model.fit(images, labels, batch_size=128, epochs=EPOCHS, verbose=2)
norm = float(model.optimizer.clipper.last.norms[0])
print(f"{strategy.num_replicas_in_sync} replicas share one history; the last norm was {norm:.4f}")
