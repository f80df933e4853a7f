"""Several processes of one run: what each orders, follows, and holds of the base."""
