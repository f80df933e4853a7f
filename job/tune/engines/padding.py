"""A micro-batch as the decoder takes it: as it is, or padded to one of the few sizes that code is compiled for."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from job.kernels.blocks import blocks_of
from job.tune.data.micro_batch import MicroBatch

_SIZES, _MULTIPLE = 32, 64
"""Sizes up to a full micro-batch, at most, and what each is a multiple of: the padding is less than 64 tokens and a
thirty-second of a full micro-batch together."""


def grain_of(micro_batch_tokens: int) -> int:
    """Tokens that padded sizes and full micro-batches are a multiple of: by the cut, which a resumed run keeps."""
    return -(-micro_batch_tokens // (_SIZES * _MULTIPLE)) * _MULTIPLE


def padded_size(tokens: int, grain: int) -> int:
    """The smallest size that holds this many tokens."""
    return -(-tokens // grain) * grain


def decoder_inputs(batch: MicroBatch, *, tokens: int | None = None, in_blocks: bool = False) -> dict[str, Tensor]:
    """Keyword arguments of the decoder and of our attention.

    Args:
        batch: a micro-batch, on the device.
        tokens: size to pad to, with a last document of token 0 that has no targets and may be empty; None: as it is.
        in_blocks: whether attention is by our own kernels.
    """
    if tokens is None:
        return {
            **({"document_blocks": blocks_of(batch.cu_seqlens, batch.tokens)} if in_blocks else {}),
            "input_ids": batch.input_ids,
            "position_ids": batch.position_ids,
            "document_cu_seqlens": batch.cu_seqlens,
            "document_lengths": torch.tensor(batch.document_lengths),
        }
    rest = tokens - batch.tokens
    after = torch.arange(rest, device=batch.position_ids.device)[None]
    cu_seqlens = pad(batch.cu_seqlens, (0, 1), value=tokens)
    lengths = torch.tensor([*batch.document_lengths, rest])
    blocks = {"document_blocks": blocks_of(cu_seqlens, tokens)} if in_blocks else {}
    for each in (cu_seqlens, lengths, *blocks.values()):
        torch._dynamo.mark_dynamic(each, 0)  # noqa: SLF001 - its public name; the number of documents differs
    return {
        **blocks,
        "input_ids": pad(batch.input_ids, (0, rest)),
        "position_ids": torch.cat([batch.position_ids, after], dim=1),
        "document_cu_seqlens": cu_seqlens,
        "document_lengths": lengths,
    }
