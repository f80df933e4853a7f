"""One of several processes that train a tiny model together, as the stages do; what came of it, as a file."""

import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import save_file
from tiny import CPU, LAYERS, PAIR, Ceiling, attempt, documents_of, poison, random_text, stages_attempt
from tiny import watch_micro_batches as watch

from job.core.errors import JobError
from job.core.recipe import LoraSection
from job.core.seat import Seat
from job.stages.following import _Follower
from job.tune.loop.sharing import share_state
from job.tune.model.config import load_tokenizer
from job.tune.world import ALONE, Meeting, Order

SIZES = [(9, 2), (3, 30), (20, 3), (2, 12), (14, 14), (4, 33), (30, 1), (6, 20), (25, 9), (8, 8), (2, 40)]


def seat(rank, size, port):
    place = {"local_rank": rank, "node": 0, "nodes": 1, "host": "127.0.0.1", "port": port}
    return Seat(rank=rank, size=size, folder="", supervisor=0, **place)


def prepare(order, rank):
    """A tiny attempt, and what is special about this rank."""
    tokenizer = load_tokenizer(order["tokenizer"])
    pairs = [(random_text(p, seed=i), random_text(c, seed=100 + i)) for i, (p, c) in enumerate(SIZES)]
    folder = Path(order["folder"], f"rank-{rank}")
    documents = documents_of(folder / "documents", tokenizer, pairs, data=PAIR)
    lora = LoraSection(r=8, alpha=16, targets=("v_proj", "lm_head"), dropout=order.get("dropout", 0.0))
    made = attempt(Path(order["base"]), documents, folder=folder, lora=lora, **order["options"])
    special = order["special"].get(str(rank), {})
    if "ceiling" in special:
        Ceiling(made, special["ceiling"])
    if "poison" in special:
        poison(made, special["poison"], "nan")
    if "moved" in special:  # what rank 0 shares is not what this one would begin with
        for vector in made.flat.vectors:
            vector.data += 1.0

    def spoil():
        made.flat.vectors[0].data[0] += 1e-3

    end = {"exit": lambda: os._exit(9), "freeze": lambda: os.kill(os.getpid(), signal.SIGSTOP), "spoil": spoil}.get(
        special.get("end")
    )
    if end is not None:
        watch(made, lambda _batch: made.progress.step + 1 == special["at"] and end())
    made.cut_after = special.get("cut_after")
    made.model.seed_dropout = _noted(made.model.seed_dropout, seeds := [])
    return made, seeds


def _noted(call, seen):
    def noted(seed):
        seen.append(seed)
        return call(seed)

    return noted


def train(made, order):
    """What rank 0 does, or one that is alone."""
    loop = made.loop(
        evaluate=made.recipe.evaluate.model_copy(update={"every_steps": order.get("evaluate_every", 100)}),
        checkpoint=made.recipe.checkpoint.model_copy(update={"every_steps": order.get("checkpoint_every", 100)}),
    )
    made.world.order(Order.PREPARE)
    with loop._attempt.phases.phase("train"):
        loop.run()
    made.world.order(Order.DONE)


def follow(made):
    made.stepper()
    dataset = SimpleNamespace(train=made.documents, validation=made.documents)
    choice = SimpleNamespace(engine=made.engine, name="generic")
    planned = SimpleNamespace(choice=choice, course=made.course, layers=LAYERS)
    ready = SimpleNamespace(
        model=made.model, accelerator=made.accelerator, planned=planned, adapter=made.flat, state=made.state
    )
    ours = stages_attempt(made.recipe, made.folder)
    _Follower(ours, SimpleNamespace(dataset=dataset), ready, made.world).obey()


def main(rank, size, port, order):
    made, seeds = prepare(order, rank)
    if size > 1:
        made.world = Meeting(seat(rank, size, port)).join(CPU, patience=lambda: order.get("patience", 300.0))
        share_state(made.world, made.state, made.flat)
    else:
        assert made.world is ALONE
    error = None
    try:
        train(made, order) if rank == 0 else follow(made)
    except JobError as raised:
        error = raised
    progress = made.progress
    save_file({str(i): vector.data for i, vector in enumerate(made.flat.vectors)}, made.folder / "adapter.safetensors")
    facts = made.facts
    result = {
        "error": error and type(error).__name__,
        "said": str(error),
        "step": progress.step,
        "losses": progress.losses,
        "grad_norms": progress.grad_norms,
        "evaluations": {step: [e.nll.tolist(), e.correct] for step, e in progress.evaluations.items()},
        "tokens": progress.cut.micro_batch_tokens,
        "committed": made.committed,
        "seeds": seeds,
        "waited": facts.waited_seconds if facts else None,
        "bytes": facts.bytes_sent if facts else None,
        "loaded_distributed": "torch.distributed.distributed_c10d" in sys.modules
        and torch.distributed.is_initialized(),
    }
    (made.folder / "result.json").write_text(json.dumps(result))
    os._exit(0)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), json.loads(Path(sys.argv[4]).read_text()))
