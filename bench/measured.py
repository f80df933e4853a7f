"""What a contestant achieved, whoever it is."""

import statistics
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Rates of the steps after the warm-up, and what was measured beside them."""

    rates: tuple[float, ...]
    """Real tokens a second, one for each step that was timed (or each group of steps)."""
    steps: int
    """Steps that were timed."""
    tokens_per_step: float
    """Real tokens of a step."""
    real_share: float
    """Share of the tokens computed that are real, and no padding."""
    losses: tuple[float, float]
    """Loss of the first and the last step, nats a target: one that stays, or is far from the others', is wrong."""
    peak_bytes: int | None
    adapter_parameters: int
    plan: dict = field(default_factory=dict)
    """Of ours: the report's plan."""
    about: str = ""
    """What it chose by itself, in words."""
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def rate(self):
        """The median."""
        return statistics.median(self.rates)
