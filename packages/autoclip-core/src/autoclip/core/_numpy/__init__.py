"""Histories in NumPy arrays, with accelerations of the built-in rules."""
