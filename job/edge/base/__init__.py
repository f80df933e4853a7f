"""The base model on the local disk: where it comes from, whether it is whole and safe to read, its copies in 4 bits."""
