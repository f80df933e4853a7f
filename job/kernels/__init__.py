"""The fast path: a hand-written step for decoders of the Llama family. Stages and measurements: README.md."""
