"""What `plan --json` prints: one object for scripts, with the unit in a key's name."""

from collections.abc import Sequence
from typing import Literal

from job.core.data.lengths import Candidate
from job.core.data.packing import Rows
from job.core.data.report_data import DataReport
from job.core.plan.forecast import Ask, Forecast, Workload, ask_for, trained_tokens
from job.core.plan.memory import EngineName, Placement
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
    """One kind of GPU; memory is that of each of them, where there are several."""

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
    gpus: int
    """How many train together: `--gpus` times `--nodes`."""
    placement: Placement
    """`replicated`: each GPU has the whole base; `sharded`: a part of each layer, for the base does not fit one GPU."""
    tokens_per_second: float | None
    """Real tokens, in training, of all GPUs together; null: it does not fit, or the GPU's speed is not known."""
    tokens_per_second_a_gpu: float | None
    """The same by their number; null as above."""
    times_one_gpu: float | None
    """How many times as fast as one of them, computed; null as above, and for one GPU."""
    busiest_share: float | None
    """Tokens of the GPU that has the most in a step, by those of an even share; null as above, and for one GPU."""
    sent_bytes_a_step: int
    """Bytes that each GPU sends to the others in a step, to sum gradients."""
    exchange_seconds_a_step: float | None
    """Seconds of a step in which GPUs only exchange, after what is hidden; null as above, and for one GPU."""
    link: str | None
    """What joins the GPUs of a node, as they are usually built; null: the GPU is not known."""
    network_gbit_per_second: float | None
    """What a node's network carries each way; null: there is one node."""
    speed_from: Literal["measured", "derived"] | None
    """Whether the GPU's pace was measured, or is derived from its data sheet; null: it is not known."""
    start_seconds: float
    """Until the first step is done, with the base on the local disk."""
    training_seconds: float | None
    """All steps and evaluations; null as above."""
    seconds: float | None
    """From start to report: both together; null as above."""
    usd: float | None
    """Cost of the run on all GPUs; null as above, and without `--usd-per-hour`."""


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
        ask=ask_for(work, forecasts[0].cluster, forecasts[0].placement),
    )


def _forecast(found: Forecast, usd_per_hour: float | None) -> ForecastJson:
    cut, cluster, fits = found.memory.cut, found.cluster, found.fits
    # What one example alone does not fit into gets no time: it would look like the cheapest choice.
    speed, scaled = (found.tokens_per_second, found.scaled) if fits else (None, None)
    return ForecastJson(
        name=found.gpu.name,
        memory_gib=found.gpu.memory_gib,
        fits=fits,
        predicted_peak_bytes=found.memory.predicted_peak_bytes,
        micro_batch_tokens=cut.micro_batch_tokens,
        evaluation_tokens=cut.evaluation_tokens,
        kept_layers=cut.kept_layers,
        recomputed_layers=cut.recomputed_layers,
        gpus=cluster.ranks,
        placement=found.placement,
        tokens_per_second=speed,
        tokens_per_second_a_gpu=None if speed is None else speed / cluster.ranks,
        times_one_gpu=None if scaled is None else scaled.times_one,
        busiest_share=None if scaled is None else scaled.busiest,
        sent_bytes_a_step=found.sent_bytes,
        exchange_seconds_a_step=None if scaled is None else scaled.exchange_seconds,
        link=None if found.gpu.link is None else found.gpu.link.name,
        network_gbit_per_second=None if cluster.network is None else 8 * cluster.network.rate / 1e9,
        speed_from=None if found.gpu.speed is None else found.gpu.speed.source,
        start_seconds=found.start_seconds,
        training_seconds=found.training_seconds if fits else None,
        seconds=found.seconds if fits else None,
        usd=found.usd(usd_per_hour) if fits else None,
    )
