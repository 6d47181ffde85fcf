"""The parts of a clipper that all frameworks share."""
