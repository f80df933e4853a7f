"""The product's own trainer without a run around it: made as the stages make it, for what a report cannot show."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import get_scheduler

from bench.options import GSM8K
from job.core.course import Course, plan_course
from job.core.cut import plan_memory
from job.core.lengths import choose_max_length
from job.core.memory import AdapterShape, MemoryParts, ModelShape, memory_parts
from job.core.recipe import CheckpointSection, EvaluateSection, Recipe, TrackSection
from job.core.records import Tally, checked_lines
from job.core.verdict import Evaluation
from job.tune.data.documents import Documents, select_documents
from job.tune.data.encoded import encode
from job.tune.data.frame import token_rules
from job.tune.device.device import device_memory, device_name
from job.tune.engines.choice import Choice, choose_engine
from job.tune.engines.packed_model import PackedModel
from job.tune.loop import checkpoint as checkpoints
from job.tune.loop.flat import FlatAdapter
from job.tune.loop.optimizer import make_optimizer
from job.tune.loop.step import Hooks, Stepper
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
    encoded = encode(
        (("train", example) for example in checked_lines(lines, recipe.data, tally=Tally())),
        tokenizer,
        token_rules(tokenizer, recipe.data),
        folder=folder,
        should_stop=lambda: False,
        on_progress=lambda _done: None,
    )["train"]
    limit = choose_max_length(encoded.lengths, wanted=recipe.data.max_length, positions=positions)
    return select_documents(encoded, max_length=limit.tokens, too_long="truncate")


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """Base, adapter and data on the device: what several trainers can be made from."""

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
    planned: dict[str, Any]
    """The cut that the memory plan gives this device, as a checkpoint keeps it."""

    @property
    def parts(self) -> MemoryParts:
        """What the plan says of memory, part by part."""
        return memory_parts(self.shape, self.adapter_shape, self.choice.name, compiled=self.choice.compiled)

    def cut(self, *, tokens, recomputed=0, kept=0):
        """A cut of our choice, in the plan's words."""
        again = {"recomputed_layers": recomputed, "checkpointing": recomputed > 0, "compiled": self.choice.compiled}
        return {"micro_batch_tokens": tokens, "evaluation_tokens": tokens, "kept_layers": kept} | again

    def trained(self, cut, optimizer=None):
        """The state of a run that has made no step; the adapter stays as it is. Without an optimizer: a run's own."""
        train = self.recipe.train
        optimizer = optimizer or make_optimizer(self.adapter.vectors, train)
        facts = cut | {"engine": self.choice.name, "device": device_name(self.device)}
        return checkpoints.Trained(
            model=self.model.model,
            optimizer=optimizer,
            scheduler=get_scheduler(train.schedule, optimizer, train.warmup_steps, train.steps),
            progress=checkpoints.Progress(plan=facts),
        )

    def trainer(self, trained, hooks, course):
        """A trainer that moves this state."""
        self.choice.path.adopt(trained.progress.plan)
        self.choice.path.refresh()
        self.model.train()
        return Stepper(
            path=self.choice.path,
            adapter=self.adapter,
            trained=trained,
            documents=self.documents,
            course=course,
            accelerator=self.accelerator,
            train=self.recipe.train,
            hooks=hooks,
        )


def load(recipe, engine, device, folder):
    """Load the recipe's base and data, attach its adapter, choose the path and plan the cut."""
    base = Path(recipe.model.base)
    shape, memory = shape_of(read_config(base)), device_memory(device)
    documents = documents_of(recipe, load_tokenizer(base), shape.positions, folder)
    train = recipe.train
    course = plan_course(
        examples=len(documents), batch_size=train.batch_size, steps=train.steps, epochs=train.epochs, seed=train.seed
    )
    loaded = load_base(base, device=device)
    model = PackedModel(attach_lora(loaded, recipe.lora, source=str(base), revision=None, seed=train.seed))
    accelerator = make_accelerator(TrackSection(), on_cpu=device.type == "cpu", folder=folder)
    choice = choose_engine(model, engine, backward=accelerator.backward, on_stopped=print)
    adapter_shape = AdapterShape(parameters=parameter_counts(model)[0], rank=recipe.lora.r, optimizer=train.optimizer)
    plan = plan_memory(
        shape,
        adapter_shape,
        path=choice.name,
        compiled=choice.compiled,
        device=memory,
        max_length=documents.max_length,
        step_tokens=course.largest_step(documents.lengths),
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


def hooks_of(*, before_step: Callable[[], bool] = lambda: False, **others):
    """Hooks of a trainer that nobody follows: no evaluation, no checkpoint; it stops when `before_step` says so."""
    quiet = {
        "evaluate": lambda step, _: Evaluation(step=step, nll=np.ones(1), tokens=np.ones(1), correct=0),
        "on_first_step": lambda: None,
        "on_step": lambda _record: None,
        "on_evaluation": lambda _result: None,
        "on_checkpoint": lambda: None,
        "is_commit_due": lambda _steps: False,
        "on_micro_batch": lambda: None,
        "must_cut_step": lambda: False,
        "on_out_of_memory": lambda _plan: None,
    }
    return Hooks(should_stop=before_step, **(quiet | others))


def run(trainer):
    """Carry a trainer to the end of its course, or to where its hooks stop it; nothing else interrupts it."""
    trainer.run(CheckpointSection(every_steps=NO_END), EvaluateSection(every_steps=NO_END))
