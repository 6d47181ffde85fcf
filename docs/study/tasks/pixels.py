"""The first edition's `digits`, pixel by pixel, with all seeds of an arm trained at once."""

from __future__ import annotations

from functools import partial

from design import Condition

from tasks.recurrent import Reading, run

# 20 epochs of 17 batches.
READING = Reading(pixels=1, hidden=48, batch=64, steps=340, keep_last=True)
run = partial(run, READING, Condition("pre-training", "SGD", "SGD", 0.2))
