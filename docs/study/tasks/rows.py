"""Handwritten digits, read row by row by a small GRU: quick enough for many conditions."""

from __future__ import annotations

from functools import partial

from design import Condition

from tasks.recurrent import Reading, run

READING = Reading(pixels=8, hidden=32, batch=32, steps=300)
run = partial(run, READING, Condition("pre-training", "Adam", "Adam", 3e-3))
