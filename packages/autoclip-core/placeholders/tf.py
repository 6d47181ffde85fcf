"""In the place of `autoclip.tf` as long as autoclip-tf is not installed."""

from autoclip.core._installation import load_adapter

load_adapter(__name__, "autoclip-tf")
