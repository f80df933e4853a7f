"""The dataset from its objects to documents, and what held-out examples are judged by."""
