"""One process's part in a run: its seat, what is on record, when it commits, how it may end."""
