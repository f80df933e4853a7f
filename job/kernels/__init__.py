"""Hand-written forward and backward pairs: what both engines compute with. Rules and stages: README.md."""
