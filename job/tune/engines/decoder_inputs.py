"""A micro-batch as the decoder and our attention take it."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from job.kernels.blocks import blocks_of
from job.tune.data.micro_batch import MicroBatch


def decoder_inputs(batch: MicroBatch, *, in_blocks: bool = False, for_compiled_code: bool = False) -> dict[str, Tensor]:
    """Keyword arguments of the decoder and of our attention.

    Args:
        batch: a micro-batch, on the device.
        in_blocks: whether attention is by our own kernels.
        for_compiled_code: make the number of documents a variable of compiled code. A number of one would be a
            constant, so an empty document follows the last.
    """
    cu_seqlens, lengths = batch.cu_seqlens, torch.tensor(batch.document_lengths)
    if for_compiled_code:
        cu_seqlens, lengths = pad(cu_seqlens, (0, 1), value=batch.tokens), pad(lengths, (0, 1))
    by_documents = {"document_cu_seqlens": cu_seqlens, "document_lengths": lengths}
    if in_blocks:
        by_documents["document_blocks"] = blocks_of(cu_seqlens, batch.tokens)
    if for_compiled_code:
        for each in by_documents.values():
            torch._dynamo.mark_dynamic(each, 0)  # noqa: SLF001 - its public name
    return {**by_documents, "input_ids": batch.input_ids, "position_ids": batch.position_ids}
