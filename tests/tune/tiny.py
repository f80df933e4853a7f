"""Tiny random models, a readable tokenizer, and one attempt at training on them: what the stages do, in small."""

import random
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from accelerate import Accelerator
from tokenizers import Tokenizer, decoders, models, processors
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    get_scheduler,
)

from job.core.attempt.limits import Limits
from job.core.data.records import Example, Part
from job.core.judging.verdict import Evaluation
from job.core.plan.course import Course, plan_course
from job.core.plan.cut import Cut
from job.core.recipe.data_section import DataSection
from job.core.recipe.schema import CheckpointSection, EvaluateSection, LoraSection, Recipe, TrainSection
from job.edge.host.outcome import Outcome
from job.stages.attempt import Attempt as StagesAttempt
from job.stages.attempt import Phases, Worker
from job.stages.loop import Loop, TrainingFacts
from job.stages.resuming import Resumed
from job.tune.data.documents import Documents, select_documents
from job.tune.data.encoded import STREAM_END, EncodedSet, stream_start
from job.tune.data.encoder import encoded_rows
from job.tune.data.frame import TokenRules, token_rules
from job.tune.data.micro_batch import MicroBatch, micro_batch
from job.tune.engines.autograd import AutogradEngine
from job.tune.engines.engine import Engine
from job.tune.engines.packed_model import PackedModel
from job.tune.loop import checkpoint as checkpoints
from job.tune.loop.checkpoint import Progress, State, adapter_to_publish
from job.tune.loop.flat import FlatAdapter
from job.tune.loop.optimizer import make_optimizer
from job.tune.loop.step import Stepper
from job.tune.loop.step_record import StepRecord
from job.tune.loop.track import make_accelerator
from job.tune.model.adapter import attach_lora, trainable
from job.tune.model.base import load_base, quantised_files
from job.tune.model.sharded.layers import ShardedLayers
from job.tune.world import ALONE, World

CPU = torch.device("cpu")
ARCHITECTURES = ("llama", "mistral", "qwen3", "gemma2", "gpt_neox")
FAMILY = ("llama", "mistral", "qwen2", "qwen3")
"""What the fast engine knows."""
EVERY_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")
WINDOW = 7
"""Tokens that a sliding window sees: fewer than any document here has."""
VOCABULARY = 300
LAYERS = 2
LETTERS = "abcdefghijklmnopqrstuvwxyz"
PAIR = DataSection(train=("train.jsonl",), prompt="{q}", completion="{a}")

# ids:    0 <unk>, 1 <s>, 2 </s>, 3 a ... 28 z, 29 space, 30 <, 31 >, 32 /, 33 :, 34 #, 35 "ab", then never written
_TOKENS = ["<unk>", "<s>", "</s>", *LETTERS, " ", "<", ">", "/", ":", "#", "ab"]


def write_tokenizer(folder: Path, *, puts_bos: bool) -> Path:
    """A character a token, and one merge: `a` `b` -> `ab`."""
    vocabulary = {token: number for number, token in enumerate(_TOKENS)}
    vocabulary |= {f"[{number}]": number for number in range(len(_TOKENS), VOCABULARY)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    if puts_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return folder


_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # wide, so that attention, caps and windows move the loss
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_GROUPED = {"num_key_value_heads": 2, "head_dim": 16}


def config_of(architecture: str, *, tied: bool = False) -> Any:
    """Two layers of an architecture, each with what is special about it."""
    match architecture:
        case "llama":
            return LlamaConfig(**_SIZES, **_GROUPED, tie_word_embeddings=tied)
        case "mistral":
            return MistralConfig(**_SIZES, **_GROUPED, tie_word_embeddings=tied, sliding_window=WINDOW)
        case "qwen2":
            return Qwen2Config(**_SIZES, num_key_value_heads=2, tie_word_embeddings=tied)
        case "qwen3":
            return Qwen3Config(**_SIZES, **_GROUPED, tie_word_embeddings=tied)
        case "gemma2":
            caps = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 16}
            return Gemma2Config(**_SIZES, **_GROUPED, **caps, tie_word_embeddings=tied, sliding_window=WINDOW)
    return GPTNeoXConfig(**_SIZES, tie_word_embeddings=tied)


def write_base(folder: Path, config: Any, *, most_bytes: str = "1GB") -> Path:
    """Random weights, fp32; `most_bytes` of a file, as transformers writes it."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.2)  # norms that do something
    model.save_pretrained(folder, max_shard_size=most_bytes)
    return folder


def write_copy(folder: Path, base: Path, *, dtype: torch.dtype = torch.bfloat16) -> Path:
    """The folder that holds what a base becomes in 4 bits."""
    folder.mkdir()
    for name, content in quantised_files(load_base(base, device=CPU, dtype=dtype), base):
        (folder / name).write_bytes(content())
    return folder


def head_of(architecture: str) -> str:
    """What the output embedding is called: GPT-NeoX's is embed_out or lm_head, by the version of transformers."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(architecture))
    return next(name for name, module in model.named_modules() if module is model.get_output_embeddings())


def targets_of(architecture: str) -> tuple[str, ...]:
    """A module of the attention, and the head. GPT-NeoX has q, k and v in one."""
    return ("query_key_value" if architecture == "gpt_neox" else "v_proj", head_of(architecture))


def random_text(length: int, *, seed: int) -> str:
    """Letters without a and b, so that each is one token."""
    return "".join(random.Random(seed).choices(LETTERS[2:], k=length))


def example_of(*parts: tuple[str, bool], line: int = 1, control: bool = False) -> Example:
    """(text, learned) parts as an example; `control`: as a template's own text."""
    made = (Part(text=text, learned=learned, control=control) for text, learned in parts)
    return Example(parts=tuple(made), where=f"train.jsonl:{line}")


def documents_of(
    folder: Path, tokenizer: Any, pairs: Sequence[tuple[str, str]], *, max_length: int = 128, data: DataSection = PAIR
) -> Documents:
    """(prompt, completion) pairs as the stages encode them."""
    examples = [example_of((p, False), (c, True), line=n) for n, (p, c) in enumerate(pairs, start=1)]
    return documents_of_examples(folder, tokenizer, examples, max_length=max_length, data=data)


def documents_of_examples(
    folder: Path, tokenizer: Any, examples: Sequence[Example], *, max_length: int = 128, data: DataSection = PAIR
) -> Documents:
    """Examples of any parts as the stages encode them."""
    rows = encoded_rows(examples, token_rules(tokenizer, data), source=0)
    return _selected(folder, rows, max_length=max_length, too_long="truncate")


def documents_of_sources(
    folder: Path,
    tokenizer: Any,
    sources: Sequence[Sequence[tuple[str, str]]],
    rules: Sequence[TokenRules] = (),
    *,
    max_length: int = 128,
    too_long: Literal["truncate", "drop"] = "truncate",
) -> Documents:
    """(prompt, completion) pairs of each source, framed by the rules of each; none given: by those of PAIR."""
    rows = b"".join(
        encoded_rows(
            [example_of((p, False), (c, True), line=n) for n, (p, c) in enumerate(pairs, start=1)], own, source=place
        )
        for place, (pairs, own) in enumerate(
            zip(sources, rules or [token_rules(tokenizer, PAIR)] * len(sources), strict=True)
        )
    )
    return _selected(folder, rows, max_length=max_length, too_long=too_long)


def _selected(folder: Path, rows: bytes, *, max_length: int, too_long: Literal["truncate", "drop"]) -> Documents:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "train.arrow"
    path.write_bytes(stream_start() + rows + STREAM_END)
    return select_documents(EncodedSet(path), max_length=max_length, too_long=too_long)


def adapted(
    base: Path,
    lora: LoraSection,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    moved: bool = False,
    shards: Any = None,
) -> PackedModel:
    """Base and fresh adapter. `moved`: lora_B is not zero, as it is after some steps. `shards`: the base's ranks."""
    loaded = load_base(base, device=CPU, dtype=dtype, on_host=shards is not None)
    sharded = None if shards is None else ShardedLayers(loaded, shards, CPU)
    model = PackedModel(attach_lora(loaded, lora, source="tiny/base", revision=None, seed=seed), sharded)
    if moved:
        torch.manual_seed(seed + 1)
        for parameter in trainable(model):
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return model


def own_losses(model: PackedModel, ids: torch.Tensor) -> torch.Tensor:
    """Loss of each token after the first by transformers' own eager forward."""
    causal_lm = model.model.get_base_model()
    used = causal_lm.config._attn_implementation
    causal_lm.set_attn_implementation("eager")
    try:
        logits = model.model(input_ids=ids[None], use_cache=False).logits[0, :-1]
    finally:
        causal_lm.set_attn_implementation(used)
    return cross_entropy(logits.float(), ids[1:], reduction="none")


def gradients(model: PackedModel) -> dict[str, torch.Tensor]:
    """The adapter's gradients, by name; they are taken away."""
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def backward(model: PackedModel, batches: Sequence[MicroBatch]) -> tuple[float, dict[str, torch.Tensor]]:
    """Summed loss and its gradients."""
    total = 0.0
    for batch in batches:
        loss = model(batch).sum()
        loss.backward()
        total += loss.item()
    return total, gradients(model)


def one_by_one(documents: Documents) -> list[MicroBatch]:
    """Each document in a micro-batch of its own."""
    return [micro_batch(documents, [i]) for i in range(len(documents))]


class Commits:
    """In place of a committer: notes what is committed, keeps it where a test asks for it, and cuts a step short."""

    def __init__(self, made: "Attempt") -> None:
        self._made = made
        self._committed = self._now()

    def _now(self) -> tuple[int, int]:
        return self._made.progress.step, len(self._made.progress.evaluations)

    @property
    def has_nothing(self) -> bool:
        return self._committed == (0, 0)

    def commit(self) -> None:
        made = self._made
        if self._now() != self._committed:
            made.committed.append(made.progress.step)
            if made.save_to is not None:
                checkpoints.save(made.state, made.save_to / f"step-{made.progress.step}")
        self._committed = self._now()

    def is_clock_due(self) -> bool:
        return False

    def must_cut_step(self) -> bool:
        self._made.micro_batches.append(self._made.progress.step)
        return self._made.cut_after == self._made.progress.step


class Teller:
    """In place of the log: keeps what it is given."""

    def __init__(self, made: "Attempt") -> None:
        self.step = made.records.append
        self.evaluation = lambda result, _sources, _slices: made.judged.append(result)


@dataclass(kw_only=True)
class Attempt:
    """One attempt at training: fresh objects from the seed, the loop of the stages, and what it did."""

    model: PackedModel
    flat: FlatAdapter
    state: State
    documents: Documents
    course: Course
    accelerator: Accelerator
    recipe: Recipe
    folder: Path
    engine: Engine | None = None
    """None: autograd's."""
    stop_after: int | None = None
    records: list[StepRecord] = field(default_factory=list)
    judged: list[Evaluation] = field(default_factory=list)
    facts: TrainingFacts | None = None
    committed: list[int] = field(default_factory=list)
    save_to: Path | None = None
    micro_batches: list[int] = field(default_factory=list)
    """For each that was done, the last whole step."""
    world: World = ALONE
    cut_after: int | None = None
    """In the first micro-batch after this step a stop is asked for that leaves no time for the rest of the next."""

    @property
    def progress(self) -> Progress:
        return self.state.progress

    @property
    def cuts(self) -> list[Cut]:
        """What steps were tried with after running out of memory."""
        return [cut for record in self.records for cut in record.setbacks.cuts]

    def stepper(self) -> Stepper:
        self.model.train()
        self.engine = self.engine or AutogradEngine(self.model, self.accelerator.backward)
        return Stepper(
            engine=self.engine,
            adapter=self.flat,
            state=self.state,
            documents=self.documents,
            course=self.course,
            accelerator=self.accelerator,
            train=self.recipe.train,
            layers=LAYERS,
            world=self.world,
        )

    def loop(self, **sections: Any) -> Loop:
        """The loop of the stages; sections of the recipe by name."""
        stepper, recipe = self.stepper(), self.recipe.model_copy(update=sections)
        dataset = SimpleNamespace(
            train=self.documents,
            validation=self.documents,
            losses_by_source=lambda _evaluation: (),
            losses_by_slice=lambda _evaluation: (),
        )
        memory = SimpleNamespace(cut=self.progress.cut)
        facts = self.facts = TrainingFacts(
            progress=self.progress,
            course=self.course,
            memory=memory,
            engine_reason="",
            left_to_peft=False,
            rows="packed",
            questions=[],
            architecture="",
            left_out=None,
            form="",
            trainable_parameters=0,
            total_parameters=0,
            resumed=Resumed(checkpoint=None, passed_over=()),
            adapter=adapter_to_publish(self.model.model, None),
        )
        planned = SimpleNamespace(choice=SimpleNamespace(engine=self.engine), course=self.course, layers=LAYERS)
        return Loop(
            stages_attempt(recipe, self.folder, should_stop=self._should_stop),
            SimpleNamespace(dataset=dataset, device=CPU, base=SimpleNamespace(quantised=False)),
            planned,
            model=self.model,
            stepper=stepper,
            committer=Commits(self),
            teller=Teller(self),
            facts=facts,
            world=self.world,
        )

    def run(self, *, evaluate_every: int = 4, checkpoint_every: int = 3, patience: int | None = None) -> "Attempt":
        loop = self.loop(
            evaluate=EvaluateSection(every_steps=evaluate_every, patience=patience),
            checkpoint=CheckpointSection(every_steps=checkpoint_every),
        )
        with loop._attempt.phases.phase("train"):
            loop.run()
        return self

    def _should_stop(self) -> bool:
        return self.stop_after is not None and self.progress.step >= self.stop_after

    def adapter(self) -> list[torch.Tensor]:
        return [parameter.detach().clone() for parameter in trainable(self.model)]


def stages_attempt(recipe: Recipe, folder: Path, *, should_stop: Callable[[], bool] = lambda: False) -> StagesAttempt:
    """The process's own, without a store, a log or an outcome file."""
    outcome = Outcome(None)
    return StagesAttempt(
        worker=Worker(recipe=recipe, workdir=folder, device="cpu", engine="generic", should_stop=should_stop),
        run_id=None,
        overrides=(),
        ask_to_stop=lambda _reason: None,
        is_kill_near=lambda: False,
        report_end=lambda _error: 70,
        leave_word=lambda _error: None,
        grace_seconds=None,
        limits=Limits(grace_seconds=30.0),
        stall_seconds=None,
        lease_seconds=60.0,
        force=False,
        started="",
        hide=str,
        outcome=outcome,
        phases=Phases(outcome, began=time.monotonic()),
        step_events_seconds=0.0,
    )


def cut_of(micro_batch_tokens: int, **other: Any) -> Cut:
    """As the plan gives it."""
    return replace(
        Cut(
            engine="generic",
            micro_batch_tokens=micro_batch_tokens,
            evaluation_tokens=64,
            kept_layers=0,
            recomputed_layers=0,
            compiled=False,
            device="CPU",
            compute_dtype="bf16",
        ),
        **other,
    )


def attempt(
    base: Path,
    documents: Documents,
    *,
    folder: Path,
    lora: LoraSection,
    steps: int = 4,
    batch_size: int = 4,
    optimizer: str = "adamw_torch",
    micro_batch_tokens: int = 64,
    dtype: torch.dtype = torch.float32,
    learning_rate: float = 1e-2,
    schedule: str = "linear",
    recomputed_layers: int = 0,
    shards: Any = None,
) -> Attempt:
    """As the stages prepare it."""
    train = TrainSection(
        steps=steps, batch_size=batch_size, learning_rate=learning_rate, optimizer=optimizer, schedule=schedule
    )
    recipe = Recipe(model={"base": "tiny/base", "revision": "0" * 40}, data=PAIR, lora=lora, train=train, output="o")
    model = adapted(base, lora, dtype=dtype, shards=shards)
    course = plan_course(examples=len(documents), batch_size=batch_size, steps=steps, epochs=None, seed=train.seed)
    flat = FlatAdapter(model)
    made = make_optimizer(flat.vectors, train)
    scheduler = get_scheduler(schedule, made, num_warmup_steps=1, num_training_steps=steps)
    progress = Progress(cut=cut_of(micro_batch_tokens, recomputed_layers=recomputed_layers))
    torch.manual_seed(train.seed)
    return Attempt(
        model=model,
        flat=flat,
        state=State(model=model.model, optimizer=made, scheduler=scheduler, progress=progress),
        documents=documents,
        course=course,
        accelerator=make_accelerator(on_cpu=True),
        recipe=recipe,
        folder=folder,
    )


def poison(made, step, how):
    """Spoils one step and no other: the loss itself, or only its gradient."""
    losses = made.model.summed_loss

    def spoilt(batch, **options):
        total, each = losses(batch, **options)
        if made.progress.step + 1 == step:
            if how == "gradient":
                total.register_hook(lambda gradient: gradient * float("nan"))
            else:
                total, each = total * float(how), each * float(how)
        return total, each

    made.model.summed_loss = spoilt


def watch_micro_batches(made, seen):
    """Calls `seen` with each micro-batch that is trained on."""
    losses = made.model.summed_loss

    def watched(batch, **options):
        seen(batch)
        return losses(batch, **options)

    made.model.summed_loss = watched


class Ceiling:
    """A device that holds this many tokens, and more of them once activations are recomputed."""

    def __init__(self, made, most, *, lean=0):
        self.failed = []
        """A weak reference to the activations of each micro-batch that did not fit."""
        watch_micro_batches(made, self._begin)
        made.model.model.get_base_model().model.layers[1].register_forward_pre_hook(self._half_way)
        self._most, self._lean, self._layers = most, lean, made.model.layers

    def _begin(self, batch):
        self._tokens = batch.tokens

    def _half_way(self, layer, inputs):
        if not layer.training:
            return
        most = max(self._most, self._lean) if self._layers.recomputing else self._most
        if self._tokens > most:
            self.failed.append(weakref.ref(inputs[0]))
            torch.rand(3)  # random numbers were drawn before memory ran out
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more than there is")
