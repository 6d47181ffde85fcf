"""Saved states: the schema, its bytes and files, and how they are matched to a clipper."""
