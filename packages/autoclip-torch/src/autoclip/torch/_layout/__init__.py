"""Measuring and scaling gradients: all that follows from their shapes, dtypes and devices."""

from autoclip.torch._layout.layout import Layout
from autoclip.torch._layout.managed import is_distributed
from autoclip.torch._layout.rows import row_devices
from autoclip.torch._layout.sharding import layout_of

__all__ = ["Layout", "is_distributed", "layout_of", "row_devices"]
