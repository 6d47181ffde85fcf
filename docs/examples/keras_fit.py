"""Keras's `fit`: attach, train, log, save, resume. `python keras_fit.py [EPOCHS]`."""

import sys

import keras
from sklearn.datasets import load_digits

from autoclip.tf import QuantileClip
from autoclip.tf.callbacks import AutoClipCallback

EPOCHS = int(sys.argv[1]) if len(sys.argv) > 1 else 10
digits = load_digits()
images, labels = digits.data.astype("float32") / 16, digits.target

keras.utils.set_random_seed(0)
model = keras.Sequential(
    [
        keras.layers.Input((64,)),
        keras.layers.Dense(64, activation="relu"),
        keras.layers.Dense(10),
    ]
)
optimizer = keras.optimizers.AdamW(1e-2)
model.compile(
    optimizer=QuantileClip.as_optimizer(optimizer, quantile=0.9, global_clipping=True),
    loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=["accuracy"],
)
history = model.fit(
    images, labels, batch_size=64, epochs=EPOCHS, callbacks=[AutoClipCallback()], verbose=2
)
print("share clipped, epoch by epoch:", history.history["autoclip/clipped"])

model.save("digits.keras")
model = keras.models.load_model("digits.keras")  # with the history
print("resumed with the threshold", float(model.optimizer.clipper.thresholds[0]))
model.fit(images, labels, batch_size=64, epochs=1, verbose=2)
