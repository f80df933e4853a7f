"""A channel: what is new, is tonight's model better than the one in use, and if so, it takes its place."""
