"""The parent of several workers."""
