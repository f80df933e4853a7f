"""Conversations through a model's chat template, in a process that can do nothing else."""
