"""The recipe: its sections and fields, YAML and overrides into it, and every mistake by name."""
