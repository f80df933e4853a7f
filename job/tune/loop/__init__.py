"""One step, its optimizer and its state; checkpoints, evaluation and answers, trackers."""
