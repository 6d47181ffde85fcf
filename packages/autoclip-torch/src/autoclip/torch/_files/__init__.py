"""Other programs' files: checkpoints of PyTorch, of its trainers, and of autoclip 0.2.1."""
