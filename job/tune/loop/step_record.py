"""What one step did: its numbers, and what made them differ from those planned."""

from dataclasses import dataclass

from job.core.plan.cut import Cut


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """What one step did, as it is logged."""

    step: int
    of: int
    """Steps of the whole run."""
    loss: float
    """In nats a target token."""
    grad_norm: float
    learning_rate: float
    tokens: int
    """Real tokens of the step."""
    seconds: float
    setbacks: "Setbacks"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setbacks:
    """What made a step's numbers differ from those planned."""

    cuts: tuple[Cut, ...] = ()
    """Smaller cuts that the step was tried with after running out of memory, in order."""
    compiler_failure: str | None = None
    """Why compiled layers run uncompiled from this step on; None: nothing has failed."""
    recompilations: tuple[str, ...] = ()
    """Why the step waited for the compiler, once for each time."""
