"""The stages of one run, each in its file; they see both what computes and what touches the world."""
