"""The device we compute on, what names it as broken, and its random generators."""
