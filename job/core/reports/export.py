"""What an export proves: when a merged model is the one that was judged, and what export.json says of it."""

from typing import Literal

from job.core.reports.onto import Onto
from job.core.reports.report import AdapterFile
from job.core.section import Section

EXPORT_VERSION: Literal[1] = 1
ROUNDING = 0.01
"""Share of the loss by which rounding may move it: what two devices that compute in bf16 differ by."""
ROUNDING_OF_GAIN = 0.0005
"""And share of what training gained: where next to nothing is left of the loss, rounding is most of it."""
QUANTISATION = 0.1
"""Share of the loss, or of what training gained if that is less, that the base's own weights may cost an adapter which
was trained on 4 bits, ..."""
LEAST = 0.01
"""... and nats that they may cost in any case: a token is less likely by a hundredth."""


class ExportLosses(Section):
    """Validation losses over the same held-out examples, in nats a target token."""

    examples: int
    of_examples: int
    """Held out in all."""
    tokens: int
    """Target tokens of the examples."""
    merged: float
    """Of the merged model, read from its files."""
    unmerged: float
    """Of the adapter beside the base's own weights, in 16 bits."""
    reported: float
    """Of the adapter beside the base in 4 bits, as the report has it."""
    base: float
    """Of the base in 4 bits before training, as the report has it; over all held-out examples."""

    @property
    def gain(self) -> float:
        """What training gained; never below nothing."""
        return max(0.0, self.base - self.reported)


class Limits(Section):
    """The differences above which nothing is exported."""

    rounding: float
    """Of the merged model from what it was merged of, in nats."""
    quantisation: float | None
    """By which it may be worse than what was reported, in nats; None: that is what it was merged of."""


class Export(Section):
    """One merged model: export.json."""

    export_version: Literal[1] = EXPORT_VERSION
    run_uri: str
    step: int
    """Whose adapter it is."""
    adapter_sha256: str
    base: str
    revision: str
    onto: Onto
    dtype: str
    """Of most weights, as safetensors writes it."""
    quantised_base: bool
    """Whether the base is published in 4 bits, and was dequantised."""
    untied: bool
    """Whether head and embeddings shared their weights in the base, and no longer do."""
    eos_token_id: tuple[int, ...]
    """What generation_config.json stops at."""
    losses: ExportLosses
    limits: Limits
    files: dict[str, AdapterFile]
    versions: dict[str, str]


def limits_of(losses: ExportLosses, onto: Onto) -> Limits:
    """What may differ: the loss itself, and what training gained, say how much a nat is worth here."""
    compared = losses.reported if onto == "quantised" else losses.unmerged
    rounding = ROUNDING * compared + ROUNDING_OF_GAIN * losses.gain
    if onto == "quantised":
        return Limits(rounding=rounding, quantisation=None)
    return Limits(rounding=rounding, quantisation=max(LEAST, QUANTISATION * min(losses.reported, losses.gain)))


def refusal(losses: ExportLosses, onto: Onto) -> str | None:
    """Why a merged model is not what was judged, and what to do; None: it is."""
    limits = limits_of(losses, onto)
    compared, named = (
        (losses.reported, "the adapter beside the base in 4 bits")
        if onto == "quantised"
        else (losses.unmerged, "the same adapter beside the same base")
    )
    if abs(losses.merged - compared) > limits.rounding:
        return (
            f"the merged model has a validation loss of {losses.merged:.4f}, {named} {compared:.4f}: they may differ "
            f"by {limits.rounding:.4f}; the adapter does not survive being rounded into the weights: serve it beside "
            "its base"
        )
    if limits.quantisation is not None and losses.merged - losses.reported > limits.quantisation:
        return (
            f"the merged model has a validation loss of {losses.merged:.4f}, and {losses.reported:.4f} was reported of "
            f"the adapter beside the base in 4 bits: it may be worse by {limits.quantisation:.4f}; the adapter makes "
            "up for what 4 bits do to this base: merge it onto that, with --onto quantised"
        )
    return None
