"""A trained adapter merged into its base: tensor by tensor from the base's files into files of the same cut."""
