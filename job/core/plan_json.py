"""What `plan --json` prints: one object for scripts, with the unit in a key's name."""

from collections.abc import Sequence
from typing import Literal

from job.core.forecast import Ask, Candidate, Forecast, Workload, ask_for, trained_tokens
from job.core.memory import EngineName
from job.core.packing import Rows
from job.core.report import DataReport
from job.core.section import Section


class DataJson(Section):
    """Lengths of the training examples, and the limit that follows from them."""

    length_tokens: dict[str, int]
    """Percentiles of a training example's length before the cut: `p50`, `p90`, `p95`, `p99`, `p100`."""
    max_length_tokens: int
    """The longest example that is trained on."""
    max_length_reason: str
    """Why it is this one, and what it cuts."""
    candidates: tuple[Candidate, ...]


class SourceJson(Section):
    """One of several sources."""

    name: str
    """As the recipe calls it, or the last part of its URI."""
    examples: int
    """Training examples that it has."""
    tokens: int
    """Real tokens of all of them."""
    share: float
    """Of each step's examples."""
    epochs: float
    """Passes over it in all steps."""


class WorkJson(Section):
    """What is to be done, on whichever GPU."""

    steps: int
    """Optimizer steps."""
    epochs: float
    """Passes over the training examples."""
    batch_size: int
    """Examples of a step."""
    tokens: int
    """Real tokens of all steps."""
    evaluations: int
    """How often the held-out examples are judged, before the first step included."""
    validation_tokens: int
    """Real tokens of one evaluation."""
    parameters: int
    """Parameters of the base."""
    trained_parameters: int
    """Parameters of the adapter."""
    engine: EngineName
    """What computes the gradients: `fast` or `generic`."""
    compiled: bool
    """Whether the generic engine's layers will be compiled; false for the fast one, which has none that could be."""
    document_rows: Rows
    """How documents will stand in a micro-batch: `packed` in one row; one a row, `padded`; or each `alone`."""
    sources: tuple[SourceJson, ...]
    """In the recipe's order; empty where there is but one."""


class ForecastJson(Section):
    """One kind of GPU."""

    name: str
    """As `--gpu` takes it, or `your GPU` for one that is known by its memory alone."""
    memory_gib: float
    """All of the GPU's memory, as CUDA reports it."""
    fits: bool
    """Whether it trains there, by estimate; where not, one example alone is too large."""
    predicted_peak_bytes: int | None
    """Memory at the peak of a step."""
    micro_batch_tokens: int
    """Tokens of a micro-batch, at most."""
    evaluation_tokens: int
    """Tokens of a forward pass of an evaluation, at most."""
    kept_layers: int
    """Layers that keep their dequantised weights."""
    recomputed_layers: int
    """Layers that recompute their activations in the backward pass."""
    tokens_per_second: float | None
    """Real tokens, in training; null: it does not fit, or the GPU's speed is not known."""
    speed_from: Literal["measured", "derived"] | None
    """Whether the GPU's pace was measured, or is derived from its data sheet; null: it is not known."""
    start_seconds: float
    """Until the first step is done, with the base on the local disk."""
    training_seconds: float | None
    """All steps and evaluations; null as above."""
    seconds: float | None
    """From start to report: both together; null as above."""
    usd: float | None
    """Cost of the run; null as above, and without `--usd-per-hour`."""


class PlanJson(Section):
    """A run before it has a GPU."""

    data: DataJson
    work: WorkJson
    forecasts: tuple[ForecastJson, ...]
    ask: Ask


def plan_json(
    data: DataReport,
    candidates: Sequence[Candidate],
    work: Workload,
    forecasts: Sequence[Forecast],
    *,
    usd_per_hour: float | None,
) -> PlanJson:
    """The same findings as the text, as values."""
    return PlanJson(
        data=DataJson(
            length_tokens=data.train.percentiles,
            max_length_tokens=data.max_length,
            max_length_reason=data.max_length_reason,
            candidates=tuple(candidates),
        ),
        work=WorkJson(
            steps=work.course.steps,
            epochs=work.course.epochs,
            batch_size=work.course.batch_size,
            tokens=trained_tokens(work),
            evaluations=work.evaluations,
            validation_tokens=work.validation_tokens,
            parameters=work.shape.parameters,
            trained_parameters=work.adapter.parameters,
            engine=work.engine,
            compiled=work.compiled,
            document_rows=work.rows,
            sources=tuple(
                SourceJson(
                    name=source.name,
                    examples=source.used,
                    tokens=source.tokens,
                    share=work.course.mixture.share(place),
                    epochs=work.course.passes(place),
                )
                for place, source in enumerate(data.train.sources)
            ),
        ),
        forecasts=tuple(_forecast(each, usd_per_hour) for each in forecasts),
        ask=ask_for(work),
    )


def _forecast(found: Forecast, usd_per_hour: float | None) -> ForecastJson:
    cut = found.memory.cut
    return ForecastJson(
        name=found.gpu.name,
        memory_gib=found.gpu.memory_gib,
        fits=found.fits,
        predicted_peak_bytes=found.memory.predicted_peak_bytes,
        micro_batch_tokens=cut.micro_batch_tokens,
        evaluation_tokens=cut.evaluation_tokens,
        kept_layers=cut.kept_layers,
        recomputed_layers=cut.recomputed_layers,
        # What one example alone does not fit into gets no time: it would look like the cheapest choice.
        tokens_per_second=found.tokens_per_second if found.fits else None,
        speed_from=None if found.gpu.speed is None else found.gpu.speed.source,
        start_seconds=found.start_seconds,
        training_seconds=found.training_seconds if found.fits else None,
        seconds=found.seconds if found.fits else None,
        usd=found.usd(usd_per_hour) if found.fits else None,
    )
