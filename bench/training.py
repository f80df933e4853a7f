"""The product's own steps without a run around them: made as the stages make them, for what a report cannot show."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench.options import GSM8K
from job.core.data.chunks import in_chunks
from job.core.data.lengths import choose_max_length
from job.core.plan.course import Course, plan_course
from job.core.plan.cut import Cut, plan_memory
from job.core.plan.memory import AdapterShape, MemoryParts, ModelShape, memory_parts
from job.core.plan.shares import shares_of
from job.core.recipe.schema import Recipe
from job.tune.data.documents import Documents, select_documents
from job.tune.data.encoded import STREAM_END, EncodedSet, stream_start
from job.tune.data.encoder import Encoder, rules_of
from job.tune.data.trial_documents import text_of
from job.tune.device.compute_dtype import compute_dtype
from job.tune.device.device import device_memory
from job.tune.engines.choice import Choice, choose_engine
from job.tune.engines.packed_model import PackedModel
from job.tune.loop.checkpoint import Progress, State
from job.tune.loop.flat import FlatAdapter
from job.tune.loop.optimizer import make_optimizer, make_scheduler
from job.tune.loop.step import Stepper, go_on
from job.tune.loop.track import make_accelerator
from job.tune.model.adapter import attach_lora, parameter_counts
from job.tune.model.base import load_base
from job.tune.model.config import load_tokenizer, read_config, shape_of

NO_END = 1_000_000
"""Steps: what measures ends it."""
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK = 32


def recipe_of(base, train, *, text=GSM8K, max_length="auto", head=True, dropout=0.0, **training):
    """What is measured: rank 32 on the seven projections, with the head or without; `training` is the train section."""
    own = {"steps": NO_END, "batch_size": 256, "learning_rate": 1e-4, "optimizer": "adamw_8bit"}
    return Recipe(
        model={"base": str(Path(base).resolve())},
        data={"train": str(train), "text": text, "max_length": max_length},
        lora={
            "r": RANK,
            "alpha": 2 * RANK,
            "dropout": dropout,
            "targets": [*PROJECTIONS, "lm_head"] if head else list(PROJECTIONS),
        },
        train=own | training,
        output="file:///nowhere",
    )


def documents_of(recipe, tokenizer, positions, folder):
    """The training examples, as the stages encode and select them."""
    lines = ((p, n, line) for p in recipe.data.train for n, line in enumerate(Path(p).read_bytes().split(b"\n"), 1))
    folder.mkdir(parents=True, exist_ok=True)
    own = recipe.data.model_copy(update={"validation": ("none",)})  # nothing is held out
    with Encoder(rules_of(tokenizer, own)) as encoder, (folder / "train.arrow").open("wb") as file:
        file.write(stream_start())
        for chunk in map(encoder, in_chunks(lines, side="train")):
            file.write(chunk.rows.get("train", b""))
        file.write(STREAM_END)
    encoded = EncodedSet(folder / "train.arrow")
    limit = choose_max_length(encoded.lengths, wanted=recipe.data.max_length, positions=positions)
    return select_documents(encoded, max_length=limit.tokens, too_long="truncate")


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """Base, adapter and data on the device: what several steppers can be made from."""

    recipe: Recipe
    device: torch.device
    shape: ModelShape
    adapter_shape: AdapterShape
    documents: Documents
    course: Course
    """The recipe's batches, as many steps as it says."""
    model: PackedModel
    adapter: FlatAdapter
    accelerator: Any
    choice: Choice
    planned: Cut
    """The cut that the memory plan gives this device."""

    @property
    def parts(self) -> MemoryParts:
        """Memory that the plan counts with, part by part."""
        return memory_parts(
            self.shape, self.adapter_shape, self.choice.name, compiled=self.choice.compiled, rows=self.planned.rows
        )

    def cut(self, *, tokens, recomputed=0, kept=0):
        """A cut of our choice."""
        return replace(
            self.planned,
            micro_batch_tokens=tokens,
            evaluation_tokens=tokens,
            kept_layers=kept,
            recomputed_layers=recomputed,
        )

    def state(self, cut, optimizer=None):
        """The state of a run before its first step; the adapter stays as it is. Without an optimizer: a run's own."""
        train = self.recipe.train
        optimizer = optimizer or make_optimizer(self.adapter.vectors, train)
        return State(
            model=self.model.model,
            optimizer=optimizer,
            scheduler=make_scheduler(optimizer, train, steps=train.steps),
            progress=Progress(cut=cut),
        )

    def stepper(self, state, course):
        """A stepper of this state, whose cut the engine adopts."""
        self.choice.engine.adopt(state.progress.cut)
        self.choice.engine.refresh()
        self.model.train()
        return Stepper(
            engine=self.choice.engine,
            adapter=self.adapter,
            state=state,
            documents=self.documents,
            course=course,
            accelerator=self.accelerator,
            train=self.recipe.train,
            layers=self.shape.layers,
        )

    def steps(self, state, course, *, look=go_on):
        """The records of all steps of a course; `look` is called after each micro-batch."""
        stepper = self.stepper(state, course)
        for number in range(1, course.steps + 1):
            record = stepper.step(number, cut_short=look)
            if record is not None:
                yield record
        yield stepper.finish()


def load(recipe, engine, device, folder):
    """Load the recipe's base and data, attach its adapter, choose the engine and plan the cut."""
    base = Path(recipe.model.base)
    shape, memory = shape_of(read_config(base)), device_memory(device)
    documents = documents_of(recipe, load_tokenizer(base), shape.positions, folder)
    train = recipe.train
    course = plan_course(
        examples=len(documents), batch_size=train.batch_size, steps=train.steps, epochs=train.epochs, seed=train.seed
    )
    loaded = load_base(base, device=device, dtype=compute_dtype(device))
    model = PackedModel(attach_lora(loaded, recipe.lora, source=str(base), revision=None, seed=train.seed))
    accelerator = make_accelerator(on_cpu=device.type == "cpu")
    choice = choose_engine(model, engine, backward=accelerator.backward, text=text_of(documents))
    adapter_shape = AdapterShape(
        parameters=parameter_counts(model.model)[0], rank=recipe.lora.r, optimizer=train.optimizer
    )
    plan = plan_memory(
        shape,
        adapter_shape,
        engine=choice.name,
        compiled=choice.compiled,
        rows=model.rows,
        device=memory,
        max_length=documents.max_length,
        shares=shares_of(course, documents.lengths, ranks=1),
    )
    return Loaded(
        recipe=recipe,
        device=device,
        shape=shape,
        adapter_shape=adapter_shape,
        documents=documents,
        course=course,
        model=model,
        adapter=FlatAdapter(model),
        accelerator=accelerator,
        choice=choice,
        planned=plan.cut,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SameBatch:
    """A course whose every step has the same examples."""

    members: tuple[int, ...]
    steps: int

    def batch(self, _step: int) -> list[int]:
        """Places in the documents."""
        return list(self.members)


def filling(documents, tokens):
    """Examples of `tokens` tokens together, or a few less: a micro-batch that is full."""
    left, members = tokens, []
    lengths = documents.lengths.tolist()
    for index, length in enumerate(lengths):
        if length <= left:
            members.append(index)
            left -= length
        if left < min(lengths):
            break
    return members
