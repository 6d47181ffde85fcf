"""The version of the installed distribution, from its metadata."""

from importlib.metadata import version

__version__ = version("autoclip-core")
