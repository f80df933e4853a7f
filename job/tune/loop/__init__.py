"""One step, its optimizer and its state; evaluation and answers."""
