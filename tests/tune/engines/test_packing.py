"""Packed documents: the same losses and gradients as alone, and as the model itself computes them."""

import torch
from tiny import backward, one_by_one, own_losses

from job.tune.data.micro_batch import micro_batch


def test_the_losses_of_a_document_are_those_of_the_models_own_eager_forward(any_model, documents):
    with torch.no_grad():
        for document in (0, 5):
            batch = micro_batch(documents, [document])
            theirs = own_losses(any_model, batch.input_ids[0])[batch.target_places]
            ours = any_model(batch)
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_packed_documents_have_the_loss_and_gradients_they_have_alone(any_model, documents):
    any_model.eval()
    packed = backward(any_model, [micro_batch(documents, range(len(documents)))])
    alone = backward(any_model, one_by_one(documents))
    assert abs(packed[0] - alone[0]) <= 1e-5 * alone[0]
    assert packed[1].keys() == alone[1].keys()
    for name, gradient in alone[1].items():
        assert gradient.any(), name
        torch.testing.assert_close(packed[1][name], gradient, rtol=1e-5, atol=1e-5 * float(gradient.abs().max()))
