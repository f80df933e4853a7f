"""Hand-written forward and backward pairs: what both engines compute with. Stages and measurements: README.md."""
