"""A channel: the evidence on a night's model, the budget of errors, the decision."""
