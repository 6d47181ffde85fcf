"""Rules: how a window of norms becomes a threshold, and the two that are built in."""
