"""What a base is by its files' own words: its 4 bits, its promised tensors, what servers take of it."""
