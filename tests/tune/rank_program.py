"""One of several processes that train a tiny model together, as the stages do; what came of it, as a file."""

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import save_file
from tiny import CPU, LAYERS, PAIR, Ceiling, attempt, documents_of, poison, random_text, stages_attempt
from tiny import watch_micro_batches as watch

from job.core.attempt.seat import Seat
from job.core.errors import JobError
from job.core.recipe.schema import LoraSection
from job.kernels.decoder import Saving
from job.kernels.llama_step import Step
from job.kernels.which_ops import ops_of
from job.stages.ranks.following import _Follower
from job.tune.engines.autograd import AutogradEngine
from job.tune.engines.handwritten import HandwrittenEngine
from job.tune.loop import evaluate as evaluation
from job.tune.loop import gradient_sum
from job.tune.loop.evaluate import Question
from job.tune.loop.sharing import share_state
from job.tune.model.config import load_tokenizer
from job.tune.ranks import Meeting
from job.tune.world import ALONE, Order

SIZES = [(9, 2), (3, 30), (20, 3), (2, 12), (14, 14), (4, 33), (30, 1), (6, 20), (25, 9), (8, 8), (2, 40)]


def seat(rank, size, port, nodes=1):
    node, local_rank = divmod(rank, size // nodes)
    place = {"local_rank": local_rank, "node": node, "nodes": nodes, "host": "127.0.0.1", "port": port}
    return Seat(rank=rank, size=size, folder="", supervisor=0, **place)


def prepare(order, rank, world):
    """A tiny attempt, and what is special about this rank."""
    tokenizer = load_tokenizer(order["tokenizer"])
    pairs = [(random_text(p, seed=i), random_text(c, seed=100 + i)) for i, (p, c) in enumerate(SIZES)]
    folder = Path(order["folder"], f"rank-{rank}")
    documents = documents_of(folder / "documents", tokenizer, pairs, data=PAIR)
    targets = tuple(order.get("targets", ("v_proj", "lm_head")))
    lora = LoraSection(r=8, alpha=16, targets=targets, dropout=order.get("dropout", 0.0))
    folder.mkdir(exist_ok=True)
    shards = world if order.get("sharded") else None
    made = attempt(Path(order["base"]), documents, folder=folder, lora=lora, shards=shards, **order["options"])
    made.world = world
    gradient_sum.SUM_PIECE = order.get("piece", gradient_sum.SUM_PIECE)
    made.progress.cut = replace(made.progress.cut, **order.get("cut", {}))
    if order.get("engine") == "fast":
        if "fast_ceiling" in order["special"].get(str(rank), {}):
            fast_ceiling(order["special"][str(rank)]["fast_ceiling"])
        saving = Saving(kept_layers=0, recomputed_layers=0)
        made.engine = HandwrittenEngine(made.model, ops_of(CPU), dtype=torch.float32, saving=saving)
    disturb(made, order["special"].get(str(rank), {}))
    made.model.seed_dropout = _noted(made.model.seed_dropout, seeds := [])
    return made, seeds


def disturb(made, special):
    """What is special about this rank."""
    if "ceiling" in special:
        Ceiling(made, special["ceiling"])
    if "evaluation_ceiling" in special:
        evaluation_ceiling(made, special["evaluation_ceiling"])
    if "backward_ceiling" in special:
        backward_ceiling(made, special["backward_ceiling"])
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


def sick(gather_row, call):
    """A link that changes one bit of what it carries, once."""
    calls = []

    def spoilt(part, row):
        arrived = gather_row(part, row)
        calls.append(row)

        def wait():
            arrived()
            if len(calls) == call:
                row[len(row) // 2 + 5] ^= 4

        return wait

    return spoilt


def evaluation_ceiling(made, most):
    """An evaluation runs out of memory in the midst of a pass with more tokens."""

    def half_way(layer, inputs):
        if not layer.training and inputs[0].shape[1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more than there is")

    made.model.model.get_base_model().model.layers[2].register_forward_pre_hook(half_way)


def backward_ceiling(made, most):
    """A backward runs out of memory below the layers whose gradients are complete."""

    def half_way(_layer, _inputs, gradients):
        if gradients[0].shape[1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more than there is")

    made.model.model.get_base_model().model.layers[1].register_full_backward_hook(half_way)


def fast_ceiling(most):
    """The fast engine runs out of memory in the midst of a pass with more tokens."""
    layer_forward = Step._layer_forward

    def limited(self, index, stream, context):
        if index == 2 and len(stream) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more than there is")
        return layer_forward(self, index, stream, context)

    Step._layer_forward = limited


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


def ask(made, order):
    """Answers of unlike numbers of tokens, some groups to each rank."""
    evaluation._PROMPTS_AT_ONCE = 1
    tokenizer = load_tokenizer(order["tokenizer"])
    prompts = [random_text(3 + i, seed=i) for i in range(order["ask"])]
    questions = [
        Question(ids=tuple(tokenizer(prompt)["input_ids"]), prompt=prompt, expected=None, ends=(7 + i,))
        for i, prompt in enumerate(prompts)
    ]
    options = {"max_new_tokens": 12, "seed": 0, "should_stop": lambda: False}
    return evaluation.answer(made.model, questions, tokenizer, world=made.world, **options)


def main(rank, size, port, order):
    world = ALONE
    if size > 1:
        ours = seat(rank, size, port, order.get("nodes", 1))
        world = Meeting(ours).join(CPU, patience=lambda: order.get("patience", 300.0))
        if "sick_link" in order["special"].get(str(rank), {}):
            world.gather_row = sick(world.gather_row, order["special"][str(rank)]["sick_link"])
    try:
        made, seeds = prepare(order, rank, world)
    except JobError as error:
        place = Path(order["folder"], f"rank-{rank}")
        save_file({}, place / "adapter.safetensors")
        (place / "result.json").write_text(json.dumps({"error": type(error).__name__, "said": str(error)}))
        os._exit(0)
    if size > 1:
        share_state(made.world, made.state, made.flat)
        made.engine = made.engine or AutogradEngine(made.model, made.accelerator.backward)
        made.engine.adopt(made.progress.cut)
        made.engine.refresh()
    error = answers = None
    try:
        train(made, order) if rank == 0 else follow(made)
        answers = ask(made, order) if order.get("ask") else None
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
        "answers": answers,
        "device_bytes": made.model.sharded and made.model.sharded.device_bytes,
        "setbacks": sum(len(record.setbacks.cuts) for record in made.records),
        "waited": facts.waited_seconds if facts else None,
        "bytes": facts.bytes_sent if facts else None,
        "loaded_distributed": "torch.distributed.distributed_c10d" in sys.modules
        and torch.distributed.is_initialized(),
    }
    (made.folder / "result.json").write_text(json.dumps(result))
    os._exit(0)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), json.loads(Path(sys.argv[4]).read_text()))
