"""The base in 4 bits and the adapter on it: loaded, attached, written."""
