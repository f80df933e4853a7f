"""The base from its weights to a model on the device."""
