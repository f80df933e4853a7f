"""Decides: pure values and functions. Never torch, never the network, never a file."""
