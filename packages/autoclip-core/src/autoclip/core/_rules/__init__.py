"""Rules, which turn a window of norms into a threshold, and the two that are built in."""
