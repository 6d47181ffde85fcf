"""Gradients and rows: how norms are measured, joined to rows, and gradients scaled."""

from autoclip.tf._layout.layout import Layout
from autoclip.tf._layout.nonfinite import NonfiniteGradients
from autoclip.tf._layout.norms import Gradient

__all__ = ["Gradient", "Layout", "NonfiniteGradients"]
