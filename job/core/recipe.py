"""The recipe: frozen sections, each field with its unit and reason, and a JSON Schema for editors."""

import re
from string import Formatter
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    WithJsonSchema,
    model_validator,
)

Count = Annotated[int, Field(strict=True, gt=0)]
Whole = Annotated[int, Field(strict=True, ge=0)]
Flag = Annotated[bool, Field(strict=True)]
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(strict=True, ge=0, lt=1)]
Seed = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
Text = Annotated[str, Field(min_length=1)]


def _no_credentials(uri: str) -> str:
    # A recipe is copied into run.json and into logs: what stands in it is not secret.
    # The secret half may hold a slash: those of AWS often do.
    if re.match(r"[a-z0-9+.-]+://(?:[^/@]*:[^@]*|[^/@]*)@", uri, re.IGNORECASE):
        raise ValueError("a URI holds no credentials; they come from the default chain (environment, profile, role)")
    return uri


def _one_or_many(value: object) -> object:
    return (value,) if isinstance(value, str) else value


Uri = Annotated[Text, AfterValidator(_no_credentials)]
Uris = Annotated[
    tuple[Uri, ...],
    Field(min_length=1),
    BeforeValidator(_one_or_many),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1},
                {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1},
            ]
        }
    ),
]


def template_fields(template: str) -> list[str]:
    """The record fields that a format template names, in order.

    Raises:
        ValueError: unbalanced braces, or more than a plain field name between them.
    """
    fields = []
    for _literal, name, spec, conversion in Formatter().parse(template):
        if name is None:
            continue
        if spec or conversion or not re.fullmatch(r"[^\W\d][\w -]*", name):
            shown = "{" + name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "") + "}"
            raise ValueError(f"{shown} is not a plain field name; write {{name}}, and {{{{ }}}} for literal braces")
        fields.append(name)
    return fields


def _template(value: str) -> str:
    if not template_fields(value):
        raise ValueError("names no field of the record; write at least one {field}")
    return value


Template = Annotated[Text, AfterValidator(_template)]


class Section(BaseModel):
    """What every part of a recipe keeps: frozen, and an unknown key is a mistake."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ModelSection(Section):
    """The base model. It is read in 4 bits (NF4, double quantisation) and computes in bf16.

    On processors without instructions for bf16 (AVX512-BF16, AMX-BF16, Arm's BF16) it computes in fp32, which is many
    times faster there; log and report say which.

    One that is published in 4 bits of bitsandbytes is trained as it is, and the report says in which form; one that is
    quantised in another way is refused, and so is one whose weights are not those that its config describes.

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


class Fraction(Section):
    """A share of the training file, held out by a hash of each example."""

    fraction: Annotated[float, Field(strict=True, gt=0, lt=1)]
    """Share of the examples held out; an example stays on its side when the file grows or is reordered."""


class DataSection(Section):
    """The dataset: JSON lines, and how a record becomes text."""

    train: Uris
    """`.jsonl`, `.jsonl.gz` or `.jsonl.zst`: one URI, a list, a glob (`*`, `?`, `**`) or a prefix ending in `/`."""
    validation: Annotated[
        Annotated[Uris, Tag("<files>")] | Annotated[Fraction, Tag("<fraction>")],
        Discriminator(lambda value: "<files>" if isinstance(value, (str, list, tuple)) else "<fraction>"),
    ] = Fraction(fraction=0.05)
    """Held-out examples: own files, or `{fraction: 0.05}` of the training files."""
    text: Template | None = None
    """Format template over the record's fields; the loss is over all of it. Or `prompt` and `completion`."""
    prompt: Template | None = None
    """Format template of what the model is given."""
    completion: Template | None = None
    """Format template of what the model learns to answer."""
    loss_on: Literal["completion", "all"] = "completion"
    """With `prompt` and `completion`: which of them the loss is over. A model graded on its prompt learns prompts."""
    max_length: Annotated[
        Annotated[Literal["auto"], Tag("<auto>")] | Annotated[int, Field(strict=True, ge=8), Tag("<tokens>")],
        Discriminator(lambda value: "<auto>" if isinstance(value, str) else "<tokens>"),
    ] = "auto"
    """Longest example in tokens, BOS and EOS included; `auto` chooses from the lengths and says why."""
    too_long: Literal["truncate", "drop", "fail"] = "truncate"
    """What happens to an example beyond `max_length`; a truncated one gets no EOS, since it did not end there."""
    max_record: Annotated[int, Field(strict=True, gt=0, le=2**26)] = 2**20
    """Longest record in bytes, as its line stands in the file; a longer one is a wrong line."""
    on_bad_record: Literal["fail", "skip"] = "fail"
    """Whether a wrong line ends the job (exit 65) or is left out and reported."""
    bad_record_limit: Share = 0.01
    """With `skip`: the largest share of wrong lines that is still taken for noise; beyond it the job ends (exit 65)."""

    @model_validator(mode="after")
    def _one_way_to_make_text(self) -> Self:
        pair = (self.prompt is not None, self.completion is not None)
        if (self.text is not None and any(pair)) or (self.text is None and not all(pair)):
            raise ValueError("give either `text`, or `prompt` and `completion`")
        return self

    @property
    def fields(self) -> tuple[str, ...]:
        """The record fields that the templates name, without repetition."""
        templates = [t for t in (self.text, self.prompt, self.completion) if t is not None]
        return tuple(dict.fromkeys(name for t in templates for name in template_fields(t)))


class LoraSection(Section):
    """The adapter."""

    r: Count = 32
    """Rank."""
    alpha: Positive = 64
    """Scale: the adapter's output is multiplied by alpha / r."""
    dropout: Share = 0.0
    """Dropout before the adapter. Above 0 the masks depend on the micro-batches, so another GPU gives other numbers."""
    targets: Annotated[
        Annotated[Literal["all-linear"], Tag("<name>")]
        | Annotated[tuple[Text, ...], Field(min_length=1), Tag("<list>")],
        Discriminator(lambda value: "<name>" if isinstance(value, str) else "<list>"),
    ] = "all-linear"
    """Names of the linear modules that get an adapter, or `all-linear` (all but the head). `lm_head` may be listed."""


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
    """Held-out examples that base and tuned model answer from their prompt, compared word for word (exact match)."""
    max_new_tokens: Count = 256
    """Longest answer in tokens."""


class StoreSection(Section):
    """How the object store is spoken to; where it is and who we are comes from the AWS variables."""

    sse_kms_key: Text | None = None
    """Key id for SSE-KMS of what is written; without it the bucket's own encryption holds."""
    checksums: Flag = True
    """Checksums on every request; `false` for stores that refuse them."""


class TrackSection(Section):
    """Trackers that follow the run, through accelerate; none by default."""

    trackers: tuple[Literal["wandb", "mlflow", "tensorboard"], ...] = ()
    """Where losses and evaluations are sent as well. Each needs its package in the image."""
    project: Text = "qlora-job"
    """Project (W&B), experiment (MLflow) or folder (TensorBoard)."""


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
    output: Uri
    """`s3://bucket/prefix` or `file:///folder` that gets runs/{run_id}/: checkpoints, adapter, report."""

    @model_validator(mode="after")
    def _answers_need_a_prompt(self) -> Self:
        if self.evaluate.answers and self.data.prompt is None:
            raise ValueError(
                "evaluate.answers needs data.prompt and data.completion: with `text` there is no prompt to answer"
            )
        return self


def is_hub_id(base: str) -> bool:
    """Whether a base is named by its hub id; anything with a scheme, or that starts like a path, is not."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", base) is not None


def identity_of(recipe: Recipe) -> dict[str, Any]:
    """The part of the recipe that can change the weights or their evaluation, as JSON values."""
    part = recipe.model_dump(mode="json", exclude={"checkpoint", "store", "track", "output"})
    del part["model"]["quantised_copies"]
    if recipe.data.on_bad_record == "fail":
        # It decides whether the job ends, and not what is trained on: a run that it ended goes on once it is raised.
        del part["data"]["max_record"]
    return part
