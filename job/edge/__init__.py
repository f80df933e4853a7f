"""Touches the world: stores, files, signals, devices, logs."""
