"""The recipe: frozen sections, each field with its unit and reason, and a JSON Schema for editors."""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from job.core.judging.answer_metrics import AnswerMetric, MetricName, why_no_pattern
from job.core.recipe.data_section import OF_CHATS, DataSection, Source
from job.core.recipe.promote_section import PromoteSection
from job.core.section import Count, Flag, NotNegative, Positive, Section, Seed, Share, Text, Uri, Whole

HUB_ID = r"^[A-Za-z0-9][\w.-]*/[\w.-]+$"
"""`owner/name`."""

ALL_LINEAR, EXPERTS = "all-linear", "experts"
"""What `lora.targets` can name beside modules."""


class ModelSection(Section):
    """The base model. It is read in 4 bits (NF4, double quantisation) and computes in bf16.

    On processors without instructions for bf16 (AVX512-BF16, AMX-BF16, Arm's BF16) it computes in fp32, which is many
    times faster there; log and report say which.

    One that is published in 4 bits of bitsandbytes is trained as it is, and the report says in which form; gpt-oss's
    experts in MXFP4 are decoded exactly, and put into NF4. One that is quantised in another way is refused, and so is
    one whose weights are not those that its config describes.

    Of a model that takes pictures or sound too, the text decoder is trained: nothing else of it is read, the adapter is
    one of the whole model as it is published, and the report names what was left out; `docs/models.md` has them.
    """

    base: Uri
    """Hub id (`owner/name`), local folder, or `s3://` prefix of a causal language model in safetensors."""
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None = None
    """Full commit of a hub id (40 hex digits): what is trained on must be reproducible. Only hub ids have one."""
    quantised_copies: Uri | None = None
    """`s3://` prefix or folder that keeps the base in 4 bits for other machines as well as the work folder does."""

    @model_validator(mode="after")
    def _hub_ids_name_their_commit(self) -> Self:
        if is_hub_id(self.base) and self.revision is None:
            raise ValueError(
                f"model.revision is missing: {self.base} is a hub id, and a name like `main` moves; "
                "give the full commit (or write ./folder for a local one)"
            )
        if self.revision is not None and not is_hub_id(self.base):
            raise ValueError(f"only a hub id has a revision, and {self.base} is none; remove it, or set it to null")
        return self


class LoraSection(Section):
    """The adapter."""

    r: Count = 32
    """Rank."""
    alpha: Positive = 64
    """Scale: the adapter's output is multiplied by alpha / r."""
    dropout: Share = 0.0
    """Dropout before the adapter. Above 0 the masks depend on the micro-batches, so another GPU gives other numbers."""
    targets: Annotated[
        Annotated[Literal["all-linear", "experts"], Tag("<name>")]
        | Annotated[tuple[Text, ...], Field(min_length=1), Tag("<list>")],
        Discriminator(lambda value: "<name>" if isinstance(value, str) else "<list>"),
    ] = "all-linear"
    """Names of the linear modules that get an adapter, or `all-linear` (all but the head). `lm_head` may be listed.

    `experts`, alone or in a list, with `all-linear` or names beside it, gives each expert of a mixture factors of its
    own: they are many. Without it experts get none, and routers never do.
    """

    @property
    def on_experts(self) -> bool:
        """Whether experts get an adapter."""
        return EXPERTS in ((self.targets,) if isinstance(self.targets, str) else self.targets)

    @model_validator(mode="after")
    def _experts_have_no_dropout(self) -> Self:
        if self.on_experts and self.dropout:
            raise ValueError(
                f"PEFT has no dropout before the adapters of experts; set lora.dropout to 0, or leave {EXPERTS} out of "
                "lora.targets"
            )
        return self


Optimizer = Literal[
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_8bit",
    "paged_adamw_8bit",
    "paged_adamw_32bit",
    "lion_8bit",
    "paged_lion_8bit",
    "sgd",
]
Schedule = Literal[
    "linear",
    "cosine",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "polynomial",
    "cosine_with_min_lr",
    "cosine_with_restarts",
]


class TrainSection(Section):
    """The optimisation. How a batch is cut into micro-batches is the job's business, not the recipe's."""

    steps: Count | None = None
    """Optimizer steps. Give `steps` or `epochs`."""
    epochs: Positive | None = None
    """Passes over the training examples."""
    batch_size: Count
    """Examples per optimizer step, over all devices."""
    learning_rate: Positive
    """Peak learning rate."""
    warmup_steps: Whole = 0
    """Steps of linear warm-up to the peak; fewer than the run has."""
    schedule: Schedule = "linear"
    """Learning rate after the warm-up, by transformers' names."""
    optimizer: Optimizer = "adamw_8bit"
    """`paged_` moves the state to the host when the GPU is short of memory; the state of an adapter is small."""
    weight_decay: NotNegative = 0.0
    """Weight decay of the adapter; decoupled from the gradient in AdamW and Lion."""
    max_grad_norm: Positive = 1.0
    """Gradients are scaled down to this norm (L2, over the whole adapter)."""
    seed: Seed = 0
    """Seed of the adapter's first values, the order of the examples and dropout."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either `steps` or `epochs`")
        return self

    @model_validator(mode="after")
    def _a_warm_up_happens(self) -> Self:
        if self.warmup_steps and self.schedule == "constant":
            raise ValueError(
                "`schedule: constant` has no warm-up; write constant_with_warmup, or leave out warmup_steps"
            )
        return self


class CheckpointSection(Section):
    """How much work an attempt can lose."""

    every_steps: Count = 50
    """Optimizer steps between checkpoints; every evaluation commits one too."""
    keep: Count = 3
    """Newest checkpoints kept in the store, besides those that may become the chosen one."""


def _pattern(value: str) -> str:
    reason = why_no_pattern(value)
    if reason is not None:
        raise ValueError(reason)
    return value


def _each_once(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) != len(names):
        raise ValueError(f"names {next(name for name in names if names.count(name) > 1)!r} twice")
    return names


_MOST_SLICED = 8


class EvaluateSection(Section):
    """What is measured on the held-out examples, and when."""

    every_steps: Count = 50
    """Optimizer steps between evaluations; one at step 0 and one at the end come by themselves."""
    max_examples: Count | None = None
    """The most held-out examples to use, chosen by a hash of the example."""
    patience: Count | None = None
    """Stop after this many evaluations in a row without a lower validation loss."""
    prompts: tuple[Text, ...] = ()
    """Texts that base and tuned model answer, side by side in the report."""
    answers: Whole = 0
    """Held-out examples that base and tuned model answer from their prompt, compared word for word (exact match). On a
    channel the model in use answers them too, and a run that answers significantly worse does not replace it."""
    max_new_tokens: Count = 256
    """Longest answer in tokens."""
    metric: MetricName = "exact_match"
    """What makes an answer right, for each of `answers`; the section above says what each metric compares."""
    pattern: Annotated[Text, AfterValidator(_pattern)] | None = None
    """With `metric: pattern`: a regular expression of RE2. Its group, or all of it, is what is compared."""
    metric_field: Text | None = None
    """Field of the record that answers are compared with; without it they are with the answer that is learned."""
    slices: Annotated[tuple[Text, ...], Field(max_length=_MOST_SLICED), AfterValidator(_each_once)] = ()
    """Fields of the record: held-out losses and metrics are given for each of their values as well."""

    @model_validator(mode="after")
    def _metric_has_what_it_needs(self) -> Self:
        if (self.metric == "pattern") != (self.pattern is not None):
            raise ValueError(
                "`metric: pattern` and `pattern` go together: give the regular expression that finds the answer, as "
                "`pattern: '#### (-?[0-9]+(?:[.,][0-9]+)*)'`"
            )
        if not self.answers and (self.metric != "exact_match" or self.metric_field is not None):
            raise ValueError(
                "`metric` and `metric_field` judge answers, and none is asked for; give `answers`, the number of "
                "held-out examples that both models answer"
            )
        return self

    @property
    def answer_metric(self) -> AnswerMetric:
        """What makes an answer right."""
        return AnswerMetric(name=self.metric, pattern=self.pattern, field=self.metric_field)

    @property
    def kept_fields(self) -> tuple[str, ...]:
        """Fields of held-out records that are needed beside their text."""
        return tuple(dict.fromkeys((*self.slices, *((self.metric_field,) if self.metric_field is not None else ()))))


class StoreSection(Section):
    """How the object store is spoken to; where it is and who we are comes from the AWS variables."""

    sse_kms_key: Text | None = None
    """Key id for SSE-KMS of what is written; without it the bucket's own encryption holds."""
    checksums: Flag = True
    """Checksums on every request; `false` for stores that refuse them."""


class TrackSection(Section):
    """Trackers that follow the run; none by default. `docs/tracking.md` says what they hear; it never costs a run."""

    trackers: tuple[Literal["wandb", "mlflow", "tensorboard"], ...] = ()
    """Where losses, evaluations, verdict and page are sent as well. Each needs its package in the image."""
    project: Text = "qlora-job"
    """Project (W&B) or experiment (MLflow)."""


class Recipe(Section):
    """One run, as a person writes it."""

    model: ModelSection
    data: DataSection
    lora: LoraSection = LoraSection()
    train: TrainSection
    checkpoint: CheckpointSection = CheckpointSection()
    evaluate: EvaluateSection = EvaluateSection()
    store: StoreSection = StoreSection()
    track: TrackSection = TrackSection()
    promote: PromoteSection = PromoteSection()
    output: Uri
    """`s3://bucket/prefix` or `file:///folder` that gets runs/{run_id}/: checkpoints, adapter, report."""
    output_hub: Annotated[str, Field(pattern=HUB_ID)] | None = None
    """`owner/name` on the model hub, which gets adapter, card, page and report of the finished run by HF_TOKEN; private
    where it does not exist yet."""

    @model_validator(mode="after")
    def _answers_need_a_prompt(self) -> Self:
        judged = self.data.held_out_sources or self.data.sources
        if self.evaluate.answers and not any(source.data.has_prompt for source in judged):
            raise ValueError(
                "evaluate.answers needs data.prompt and data.completion, or data.chat: with `text` there is no prompt "
                "to answer"
            )
        return self

    @model_validator(mode="after")
    def _nights_can_be_compared(self) -> Self:
        promote = self.promote
        if promote.channel is None:
            return self
        if not self.data.held_out_sources:
            raise ValueError(
                "promote.channel: every night's model is judged on the same examples, and `data.validation` is a "
                "fraction, which grows with the data; give it files of its own"
            )
        if promote.regression is not None and not self.data.makes_text:
            raise ValueError(
                "promote.regression is read by the templates of `data`, and here only its sources have some; give "
                "`data` the templates of the regression set"
            )
        read = {uri for source in (*self.data.sources, *self.data.held_out_sources) for uri in source.uris}
        if both := sorted(read & {*(promote.regression or ())}):
            raise ValueError(f"promote.regression: {both[0]} is trained or judged on already; give it files of its own")
        if promote.seeds > 1 and promote.start_from == "promoted":
            raise ValueError(
                "promote.seeds: the adapter's first values are those of the one in use, so that another seed hardly "
                "makes another model; leave `seeds` or `start_from` out"
            )
        return self

    @model_validator(mode="after")
    def _epochs_of_a_source_are_counted(self) -> Self:
        if self.train.epochs is None and any(isinstance(s, Source) and s.epochs is not None for s in self.data.train):
            raise ValueError(
                "data.train: a source's `epochs` go with train.epochs, and train.steps is given; "
                "give the sources a `weight`, or the run its epochs"
            )
        return self


def is_hub_id(base: str) -> bool:
    """Whether a base is named by its hub id; anything with a scheme, or that starts like a path, is not."""
    return re.fullmatch(HUB_ID, base) is not None


def identity_of(recipe: Recipe) -> dict[str, Any]:
    """The part of the recipe that can change the weights or their evaluation, as JSON values."""
    left_out = {"checkpoint", "store", "track", "promote", "output", "output_hub"}
    part = recipe.model_dump(mode="json", exclude=left_out)
    if recipe.promote.start_from == "promoted":  # what it starts from stands in run.json, as `parent`
        part["promote"] = {"channel": recipe.promote.channel, "start_from": "promoted"}
    del part["model"]["quantised_copies"], part["data"]["unused_limit"]
    if recipe.data.on_bad_record == "fail":
        # They decide whether the job ends, and not what is trained on: a run that they ended goes on later.
        del part["data"]["max_record"], part["data"]["strict_types"]
    if recipe.data.chat is None:  # a run without chats is what it was before there were any
        for name in ("chat", *OF_CHATS):
            del part["data"][name]
    as_without = EvaluateSection().model_dump(mode="json")
    for name in ("metric", "pattern", "metric_field", "slices"):
        if part["evaluate"][name] == as_without[name]:
            del part["evaluate"][name]  # a run that says nothing of them is what it was before there were any
    for side in ("train", "validation"):
        for source in part["data"][side]:
            if isinstance(source, dict):
                source.pop("name", None)  # what it is called changes no weight
    return part
