"""The clippers of trainers and engines: made from a callback's settings, asked by an engine."""
