"""AutoClip for TensorFlow and Keras 3: clip each gradient to a quantile of its norms' history.

>>> import keras
>>> from autoclip.tf import QuantileClip
>>> model = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(1)])
>>> optimizer = QuantileClip.as_optimizer(keras.optimizers.Adam(1e-3), quantile=0.9)
>>> model.compile(optimizer=optimizer, loss="mean_squared_error")  # and then model.fit
"""

from autoclip.core import Report, StateError, __version__
from autoclip.core.adapter import AttachmentHandle
from autoclip.tf._clipper import Clipper, QuantileClip, StandardClip

__all__ = [
    "AttachmentHandle",
    "Clipper",
    "QuantileClip",
    "Report",
    "StandardClip",
    "StateError",
    "__version__",
]
