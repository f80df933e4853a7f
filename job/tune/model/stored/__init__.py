"""What the files of a base hold, tensor by tensor, in the forms in which bases are published."""
