"""Computes: torch, transformers, peft, bitsandbytes, accelerate. Never the store, never the environment."""
