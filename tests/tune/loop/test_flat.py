"""The adapter as vectors: views, gradients that arrive there, and the same update as one by one."""

import pytest
import torch
from tiny import adapted, micro_batch

from job.core.recipe.schema import LoraSection
from job.tune.loop.flat import FlatAdapter
from job.tune.model.adapter import trainable

LORA = LoraSection(r=4, alpha=8, targets=("q_proj", "v_proj", "lm_head"))


@pytest.fixture
def model(bases):
    return adapted(bases["llama"], LORA, moved=True)


def test_the_parameters_keep_their_values_and_move_with_the_vector(model):
    before = [parameter.detach().clone() for parameter in trainable(model)]
    (vector,) = FlatAdapter(model).vectors

    assert vector.numel() == sum(parameter.numel() for parameter in before)
    assert all(torch.equal(now, old) for now, old in zip(trainable(model), before, strict=True))
    with torch.no_grad():
        vector.add_(1)
    assert all(torch.equal(now, old + 1) for now, old in zip(trainable(model), before, strict=True))


def test_gradients_arrive_in_the_vector_and_add_up(model, documents):
    batches = [micro_batch(documents, [number]) for number in range(2)]
    model.zero_grad(set_to_none=True)
    for batch in batches:
        model(batch).sum().backward()
    expected = torch.cat([parameter.grad.reshape(-1) for parameter in trainable(model)])
    flat = FlatAdapter(model)
    for batch in batches:
        model(batch).sum().backward()

    assert torch.equal(flat.vectors[0].grad, expected)


def test_clearing_binds_gradients_that_were_taken_away(model, documents):
    flat = FlatAdapter(model)
    model.zero_grad(set_to_none=True)
    flat.clear()
    model(micro_batch(documents, [0])).sum().backward()

    assert bool(flat.vectors[0].grad.any())
    flat.clear()
    assert not any(bool(parameter.grad.any()) for parameter in trainable(model))


def test_a_large_adapter_has_several_vectors(model):
    sizes = [parameter.numel() for parameter in trainable(model)]
    flat = FlatAdapter(model, most=max(sizes) + 1)

    assert len(flat.vectors) > 1
    assert sum(vector.numel() for vector in flat.vectors) == sum(sizes)
    assert max(vector.numel() for vector in flat.vectors) <= max(sizes) + 1


@pytest.mark.parametrize("most", [1, 37, 500, 10**6])
def test_pieces_are_the_gradients_the_last_layer_s_first(model, most):
    flat = FlatAdapter(model, most=600)
    pieces = flat.pieces(most)
    names = {id(parameter): number for number, parameter in enumerate(trainable(model))}

    assert max(gradient.numel() for gradient, _ in pieces) <= most
    for gradient, _ in reversed(pieces):
        gradient.add_(torch.arange(gradient.numel()) + 1)
    assert sum(gradient.numel() for gradient, _ in pieces) == sum(vector.numel() for vector in flat.vectors)
    assert all(bool(vector.grad.all()) for vector in flat.vectors)
    firsts = [names[id(parameters[0])] for _, parameters in pieces]
    assert firsts == sorted(firsts, reverse=True)
    for gradient, parameters in pieces:  # those whose own gradient lies in the piece, and no other
        flat.clear()
        gradient.fill_(1)
        inside = {id(parameter) for parameter in trainable(model) if bool(parameter.grad.any())}
        assert inside == {id(parameter) for parameter in parameters}


def test_an_update_is_the_one_of_single_parameters(model, bases, documents):
    other, batch, steps = adapted(bases["llama"], LORA, moved=True), micro_batch(documents, range(4)), 3
    flat = FlatAdapter(model)
    together = torch.optim.AdamW(flat.vectors, lr=1e-2)
    apart = torch.optim.AdamW(trainable(other), lr=1e-2)
    for _ in range(steps):
        model(batch).sum().backward()
        together.step()
        flat.clear()
        other(batch).sum().backward()
        apart.step()
        apart.zero_grad()

    for mine, theirs in zip(trainable(model), trainable(other), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)
