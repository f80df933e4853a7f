"""Report (versioned schema) -> JSON: what a person and a script act on when the run is done."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from job.core.attempt.limits import StopFigures
from job.core.attempt.run_record import first_mistake
from job.core.data.packing import Rows
from job.core.data.report_data import DataReport, SourceReport
from job.core.judging.example_results import ChangeReport, ExamplesFile
from job.core.judging.held_out import Answer, Compared, ExactMatch, HeldOut, Tried
from job.core.judging.judged_answers import MetricReport
from job.core.judging.slices import SliceLoss
from job.core.nightly.promotion_report import PromotionReport
from job.core.plan.memory import ComputeDtype
from job.core.section import Section

SCHEMA_VERSION: Literal[1] = 1
OWN_NAME = "qlora-job"
"""What the job's own version is called among the others."""


class ModelReport(Section):
    """The base model and the adapter's size."""

    base: str
    revision: str
    """The hub's commit, or a hash over the files."""
    licence: str | None
    architecture: str
    left_out: str | None = None
    """What of a multimodal base was neither loaded nor adapted; None: the base is a language model alone."""
    quantisation: str
    in_mxfp4: bool = False
    """Whether the base is published with its experts in MXFP4, of which others make 16 bits and not NF4."""
    loaded_from: Literal["weights", "copy in 4 bits"] = "weights"
    """In this attempt: a copy that an earlier start had kept makes neither download nor quantisation needed."""
    trainable_parameters: int
    total_parameters: int


class SourceShare(Section):
    """What a run takes of one of several sources."""

    name: str
    examples: int
    """Drawn over all steps."""
    share: float
    """Of all that is drawn; at every step exact to less than one example."""
    epochs: float
    """Passes over the source."""


class PlanReport(Section):
    """How batches were cut for the device."""

    engine: str = "generic"
    """Which engine computed the gradients: fast, or generic."""
    engine_reason: str = ""
    micro_batch_tokens: int
    checkpointing: bool
    kept_layers: int = 0
    """Layers that kept their dequantised weights."""
    recomputed_layers: int = 0
    """Layers that recomputed their activations in the backward pass."""
    compiled: bool = False
    """Whether the generic engine's layers were compiled, up to the last step."""
    document_rows: Rows = "packed"
    """How the decoder got the documents of a micro-batch, up to the last step: in one row; one a row, padded together
    with those of like length; or one at a time."""
    recompilations: int = 0
    """How often a step of this attempt waited for the compiler, after layers had been compiled before the first."""
    compute_dtype: ComputeDtype = "bf16"
    """What the base computed in, up to the last step: fp32 on processors without instructions for bf16."""
    predicted_peak_bytes: int | None = None
    """The GPU's memory, at the peak of a step; None on the CPU."""
    reason: str
    steps: int
    epochs: float
    sources: tuple[SourceShare, ...] = ()
    """In the recipe's order; empty where there is but one."""
    out_of_memory: int
    """How often a batch was done again in smaller micro-batches."""
    allocation_retries: int = 0
    """How often this attempt's process gave GPU memory back and asked for it anew: many cost time."""


class SourceCurve(Section):
    """The training loss of one of several sources."""

    name: str
    loss: tuple[float | None, ...]
    """Nats a target token, for each step; None: the step has nothing of it."""


class TrainingCurve(Section):
    """One value for each step, from step 1."""

    loss: tuple[float, ...]
    """Nats a target token."""
    grad_norm: tuple[float, ...]
    """Before clipping."""
    learning_rate: tuple[float, ...]
    sources: tuple[SourceCurve, ...] = ()
    """In the recipe's order; empty where there is but one."""


class SourceLoss(Section):
    """The held-out examples of one of several sources at one step."""

    name: str
    examples: int
    tokens: int
    """Target tokens."""
    loss: float | None
    """Nats a target token; None: the source has no held-out example."""
    plus_minus: float | None = None
    """Half of its 95 % interval, over the examples; None: of one alone or none, or an earlier version of the job wrote
    the report."""


class EvaluationReport(Section):
    """The held-out examples at one step."""

    step: int
    loss: float
    """Nats a target token; every token counts the same."""
    perplexity: float
    token_accuracy: float
    tokens: int
    """Target tokens."""
    sources: tuple[SourceLoss, ...] = ()
    """Those of the held-out side, in the recipe's order; empty where there is but one."""
    slices: tuple[SliceLoss, ...] = ()
    """In the order of `evaluate.slices`, of each field the largest first."""


class SweetSpot(Section):
    """Which checkpoint was chosen, and why."""

    step: int
    loss: float
    best_step: int
    best_loss: float
    base_loss: float
    """At step 0, before training."""
    reason: str
    overfitting_from_step: int | None
    """First evaluation after the best that is significantly worse; None: not seen."""
    stopped_early: bool


class AdapterReport(Section):
    """What stands in adapter/, and the proof that it works."""

    uri: str
    files: dict[str, "AdapterFile"]
    proven_loss: float
    """Validation loss of the adapter as downloaded again and loaded by PEFT on a fresh 4-bit base."""
    reported_loss: float
    refused_by: tuple[str, ...] = ()
    """Servers that are known to refuse it, each with the reason and the way out."""


class AdapterFile(Section):
    """One file of the adapter."""

    size: int
    """Bytes."""
    sha256: str


class Throughput(Section):
    """How fast, over all attempts; evaluation and start-up apart."""

    tokens: int
    """Real tokens trained on."""
    seconds: float
    tokens_per_second: float
    step_seconds_median: float
    """Over this attempt's steps."""
    ranks: int = 1
    """Processes that made each step of this attempt, a GPU each."""
    nodes: int = 1
    placement: Literal["replicated", "sharded"] = "replicated"
    """Where the base is: the whole of it with each process, or its layers spread over all of them."""
    tokens_per_second_a_rank: float = 0.0
    """By this attempt's number of processes."""
    ceiling_share: float | None = None
    """What this attempt's steps reached of `ceiling_tflops`: real tokens a second, by the number of processes, times
    the floating-point operations of a token. Those are 4 a weight of the base that a token is multiplied with (forward,
    and the gradient of the input: a frozen weight has none of its own, QLoRA, arXiv 2305.14314), 6 a weight of the
    adapter, and attention (Kaplan et al. 2020, arXiv 2001.08361, section 2.1), as if no layer had a window; the head's
    for target tokens only, of experts those that a token goes through; recomputing and padding are no work. None: this
    attempt made no step, or it ran on a CPU or on a GPU whose pace is not known."""
    ceiling_tflops: float | None = None
    """TFLOP/s that large bf16 products sustain on one such GPU; None as above."""
    ceiling_from: Literal["measured", "derived"] | None = None
    """Whether that was measured on a GPU of this kind, or is derived from its data sheet; None as above."""
    waited_seconds: float = 0.0
    """Of this attempt's steps up to the last checkpoint, what a process has waited for the others, on the average."""
    bytes_a_step: int = 0
    """That each process of this attempt has sent to the others."""
    peak_memory_bytes: int
    """Allocated on the GPU, or resident on the CPU, in this attempt."""
    phase_seconds: dict[str, float]
    """This attempt's time by phase."""


class StartReport(Section):
    """This attempt's way to its first step: from the start of its process until that step was done."""

    seconds: float
    spent: dict[str, float]
    """Seconds by phase, which add up: `start` is what came before the first phase (the interpreter, the recipe),
    `first_step` the step itself with what it compiles, `other` what lies between phases."""


class AttemptReport(Section):
    """One process that worked on the run."""

    number: int
    started: str
    ended: str | None
    host: str
    device: str | None
    exit_code: int | None
    """None: it ended without a word (killed, or its node was lost)."""
    reason: str
    from_step: int | None
    last_committed_step: int | None
    passed_over: tuple[dict[str, str], ...] = ()
    """Checkpoints that did not verify, with the reason."""
    ranks: int | None = None
    """Processes that worked on it, a GPU each; None: an earlier version of the job began it."""
    lasted_at_least: int | None = None
    """Seconds for which one that ended without a word had renewed the run's lock; None: it left word, or nobody saw."""


class MachineReport(Section):
    """Where this attempt ran."""

    system: str
    """The container's distribution, and the host's kernel."""
    processor: str | None
    """As it names itself; None: it does not."""
    driver: str | None
    """NVIDIA's, of the kernel; None: there is none."""


_LARGEST = 1e15
"""Beyond it no number of a report is one that was measured, and what is drawn and counted up has no room."""


class Report(Section):
    """One finished run."""

    schema_version: Literal[1] = SCHEMA_VERSION
    run_id: str
    run_uri: str
    fence: int
    """Which owner of the run's lock wrote it, counted from 1."""
    finished: str
    """UTC, ISO 8601."""
    recipe: dict[str, Any]
    """The resolved recipe, defaults and overrides included."""
    data: DataReport
    model: ModelReport
    plan: PlanReport
    curve: TrainingCurve
    evaluations: tuple[EvaluationReport, ...]
    sweet_spot: SweetSpot
    exact_match: ExactMatch | None
    answers: tuple[Answer, ...]
    metric: MetricReport | None = None
    """None: no held-out example was answered and judged."""
    held_out: HeldOut | None = None
    """None: an earlier version of the job wrote the report."""
    tried: Tried | None = None
    """None: a trained step was chosen, or an earlier version of the job wrote the report."""
    per_example: ExamplesFile | None = None
    """Beside the report; None: an earlier version of the job wrote it, or it could not be written."""
    change: ChangeReport | None = None
    """Since the run before in the same output; None: there is none that was judged on the same examples."""
    adapter: AdapterReport
    throughput: Throughput
    start: StartReport | None = None
    """None: this attempt had no step left to do."""
    stop: StopFigures
    """What a stop costs, measured in the last attempt."""
    resume_exact: bool
    """Whether an interruption cannot have changed the numbers: every attempt had the same plan on the same device."""
    notes: tuple[str, ...]
    """What a reader should know: fallbacks, degradations, warnings."""
    versions: dict[str, str]
    """`qlora-job` is the job's own, which finished the run."""
    machine: MachineReport | None = None
    """None: an earlier version of the job wrote the report."""
    device: str
    attempts: tuple[AttemptReport, ...] = Field(min_length=1)
    promotion: PromotionReport | None = None
    """None: the recipe names no channel."""

    @model_validator(mode="after")
    def _sources_are_the_same_everywhere(self) -> Self:
        taken, judged = _names(self.data.train.sources), _names(self.data.validation.sources)
        drawn = [_names(self.plan.sources), _names(self.curve.sources)]
        if drawn != [taken] * 2 or any(_names(e.sources) != judged for e in self.evaluations):
            raise ValueError("sources: data, plan, curve and evaluations do not name the same ones")
        if len({tuple(each.slice for each in e.slices) for e in self.evaluations}) > 1:
            raise ValueError("evaluations: they do not have the same slices")
        return self

    @model_validator(mode="after")
    def _has_judged_its_choice(self) -> Self:
        judged = [e.step for e in self.evaluations]
        if self.sweet_spot.step not in judged or len(set(judged)) != len(judged):
            raise ValueError("sweet_spot: its step is none of the evaluations, or one stands there twice")
        if self.held_out is not None and (
            len(self.held_out.plus_minus) != len(judged) or len(self.held_out.base) != len(self.held_out.tuned)
        ):
            raise ValueError("held_out: has not one value for each evaluation, or not both losses of each example")
        if self.tried is not None and (
            self.tried.step not in judged or len(self.tried.base) != len(self.tried.tuned) or self.sweet_spot.step != 0
        ):
            raise ValueError("tried: its step is none of the evaluations, or another one was chosen, or losses miss")
        return self

    @property
    def compared(self) -> Compared | None:
        """What training did to the held-out examples at the chosen step; where that is the base, at the best other."""
        return self.tried if self.sweet_spot.step == 0 else self.held_out


def _names(sources: Sequence[SourceReport | SourceShare | SourceCurve | SourceLoss]) -> list[str]:
    return [source.name for source in sources]


def read_report(content: Mapping[str, Any]) -> Report:
    """The report that a JSON object is.

    Raises:
        ValueError: it is none, with the first value that is wrong.
    """
    measured = {name: part for name, part in content.items() if name != "recipe"}
    _refuse_absurd_numbers(measured)
    try:
        return Report.model_validate(content)
    except ValidationError as error:
        raise ValueError(first_mistake(error)) from error


def _refuse_absurd_numbers(content: object, where: str = "") -> None:
    if isinstance(content, int | float) and not abs(content) < _LARGEST:
        raise ValueError(f"{where}: {content:g} is no number that was measured")
    pairs = content.items() if isinstance(content, Mapping) else enumerate(content if isinstance(content, list) else ())
    for name, part in pairs:
        _refuse_absurd_numbers(part, f"{where}.{name:.40}" if isinstance(name, str) else where)
