"""In the place of `autoclip.torch` as long as autoclip-torch is not installed."""

from autoclip.core._installation import load_adapter

load_adapter(__name__, "autoclip-torch")
