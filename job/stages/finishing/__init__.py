"""After training: proof, answers, report, hub and export."""
