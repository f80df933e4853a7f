"""Examples become documents: parts -> token ids with target spans -> Arrow files -> documents -> micro-batches."""
