"""Examples before they are tokens: records, conversations, sources and their mixture, lengths, packing."""
