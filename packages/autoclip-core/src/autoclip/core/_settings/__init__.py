"""Settings: their names, defaults, limits and checks, and the modes of a clipper."""
