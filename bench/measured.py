"""What a contestant achieved, whoever it is."""

import statistics
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Times of the steps after the warm-up, and what was seen meanwhile."""

    rates: tuple[float, ...]
    """Real tokens a second, one for each step that was timed (or each group of steps)."""
    steps: int
    """How many were timed."""
    tokens_per_step: float
    """Real tokens."""
    real_share: float
    """Of the tokens that were computed, those that are real."""
    losses: tuple[float, float]
    """Of the first and the last step, nats a target: one that does not move, or is not near the others', is wrong."""
    peak_bytes: int | None
    adapter_parameters: int
    about: str = ""
    """What it chose by itself."""
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def rate(self):
        """The median."""
        return statistics.median(self.rates)
