"""While a micro-batch runs, an engine says whose gradients are complete: what it says holds."""

import gc
import weakref
from functools import partial

import pytest
import torch
from tiny import EVERY_LINEAR, adapted, gradients, micro_batch
from tiny_families import write_family

from job.core.data.packing import alike
from job.core.recipe.schema import LoraSection
from job.kernels import reference
from job.kernels.decoder import Saving
from job.tune.engines.autograd import AutogradEngine
from job.tune.engines.handwritten import HandwrittenEngine
from job.tune.model.adapter import trainable


def fast(model):
    return HandwrittenEngine(model, reference, dtype=torch.float32, saving=Saving(kept_layers=1, recomputed_layers=1))


def generic(model):
    return AutogradEngine(model, torch.Tensor.backward)


@pytest.mark.parametrize("targets", [EVERY_LINEAR, ("v_proj",)], ids=["every", "one"])
@pytest.mark.parametrize("engine_of", [fast, generic])
def test_gradients_are_what_they_were_when_they_were_said_to_be_complete(bases, documents, engine_of, targets):
    model = adapted(bases["llama"], LoraSection(r=4, alpha=8, targets=targets), moved=True)
    engine, heard = engine_of(model), []
    engine.watch(lambda parameters, after: heard.extend((each, each.grad.clone(), after) for each in parameters))
    for members in (range(3), range(3, 8)):
        heard.clear()
        batch = micro_batch(documents, members)
        engine.accumulate(batch, targets=batch.targets, seed=1)

        assert all(torch.equal(parameter.grad, gradient) for parameter, gradient, _ in heard)
        assert all(after is None for _, _, after in heard)
        assert sorted(id(parameter) for parameter, _, _ in heard) == sorted(map(id, trainable(model)))
    places = {id(parameter): place for place, parameter in enumerate(trainable(model))}
    said = [places[id(parameter)] for parameter, _, _ in heard]
    a_layer = len(said) // 4
    assert min(said[:a_layer]) > max(said[-a_layer:])  # the last layers first


@pytest.mark.parametrize("engine_of", [fast, generic])
def test_who_watches_changes_nothing(bases, documents, engine_of):
    model = adapted(bases["llama"], LoraSection(r=4, alpha=8, targets=EVERY_LINEAR), moved=True)
    batch, results = micro_batch(documents, range(8)), []
    for watched in (False, True):
        engine = engine_of(model)
        if watched:
            engine.watch(lambda _parameters, _after: None)
        losses = engine.accumulate(batch, targets=batch.targets, seed=1)
        results.append([losses, *gradients(model).values()])

    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("recomputing", [False, True])
@pytest.mark.parametrize(("name", "rows"), [("lfm2", "padded"), ("lfm2", "alone"), ("mixtral", "padded")])
def test_of_a_micro_batch_in_several_groups_of_rows_a_gradient_is_said_to_be_complete_once(
    name, rows, recomputing, documents, tmp_path
):
    """A parameter gets a part of its gradient from each group; with the first part it would be summed too early."""
    model = adapted(write_family(tmp_path, name), LoraSection(r=4, alpha=8), moved=True)
    model.take_rows(rows)
    model.layers.recomputing = recomputing
    batch, heard = micro_batch(documents, range(8)), []
    assert len(alike(batch.document_lengths)) > 1
    engine = generic(model)
    engine.watch(lambda parameters, _after: heard.extend((each, each.grad.clone()) for each in parameters))
    engine.accumulate(batch, targets=batch.targets, seed=1)

    assert sorted(id(parameter) for parameter, _ in heard) == sorted(map(id, trainable(model)))
    assert all(torch.equal(parameter.grad, gradient) for parameter, gradient in heard)


@pytest.mark.parametrize("engine_of", [fast, generic])
def test_a_model_that_was_watched_is_let_go_with_its_engine(documents, engine_of, tmp_path):
    """Another one comes in its place, for the proof, and the device may not hold both."""
    model = adapted(write_family(tmp_path, "llama"), LoraSection(r=4, alpha=8), moved=True)
    engine, batch = engine_of(model), micro_batch(documents, range(3))
    engine.watch(partial(lambda _engine, _parameters, _after: None, engine))  # as what sums gradients knows the adapter
    engine.accumulate(batch, targets=batch.targets, seed=1)
    held = [weakref.ref(model), *(weakref.ref(parameter) for parameter in trainable(model))]
    del model, engine
    gc.collect()

    assert not [each for each in held if each() is not None]
