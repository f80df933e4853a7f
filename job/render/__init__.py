"""Renders: values in, what people read out. Sees core alone."""
