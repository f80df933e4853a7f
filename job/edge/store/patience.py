"""How long a remote service may be away before the job gives up: one retry policy for all."""

import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How often and how long to ask again; the libraries' own retries are off, for two policies multiply."""

    attempts: int = 8
    """Requests in all."""
    budget_seconds: float = 120.0
    """No further attempt begins later than this."""
    first_pause_seconds: float = 0.5
    """Upper bound of the first pause; each further bound is twice as long."""
    longest_pause_seconds: float = 20.0
    """Largest upper bound: with 8 attempts a store may restart, about a minute, unnoticed."""
    answer_seconds: float = 30.0
    """How long the hub may take to list a model's files."""

    def pause_seconds(self, failures: int) -> float:
        """Exponential with full jitter: many jobs that failed together do not come back together."""
        bound = min(self.longest_pause_seconds, self.first_pause_seconds * 2 ** (failures - 1))
        return random.uniform(0, bound)  # noqa: S311 - no secret


STORE_PATIENCE = Patience()
"""With a store that fails."""
