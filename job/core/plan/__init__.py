"""What a run needs and how it is cut: steps, memory, micro-batches, time, GPUs and what links them."""
