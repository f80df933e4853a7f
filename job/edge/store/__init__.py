"""Objects by URI: what a store promises, its kinds, and a folder in it that is whole or does not exist."""
