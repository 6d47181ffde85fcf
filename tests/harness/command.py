"""The command `autoclip`, as its installed script finds it."""

from __future__ import annotations

from importlib.metadata import entry_points

LOAD = (
    "from importlib.metadata import entry_points;"
    "[script] = entry_points(group='console_scripts', name='autoclip');"
    "main = script.load();"
)
"""For a process of its own: makes `main`, and imports nothing else."""

[script] = entry_points(group="console_scripts", name="autoclip")
main = script.load()
