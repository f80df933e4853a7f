"""One run in the store: its lock, its records, its checkpoints and its adapter."""
