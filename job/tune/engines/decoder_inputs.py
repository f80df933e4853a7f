"""A micro-batch as the decoder and our attention take it, and rotations that depend on the length of each document."""

from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from job.kernels.blocks import blocks_of
from job.tune.data.micro_batch import MicroBatch
from job.tune.model.config import ROTATIONS_BY_LENGTH


def decoder_inputs(
    batch: MicroBatch, *, in_blocks: bool = False, by_borders: bool = False, for_compiled_code: bool = False
) -> dict[str, Tensor]:
    """Keyword arguments of the decoder and of our attention.

    Args:
        batch: a micro-batch, on the device.
        in_blocks: whether attention is by our own kernels.
        by_borders: whether there are recurrent layers, whose kernels get the borders in their own words.
        for_compiled_code: make the number of documents a variable of compiled code. A number of one would be a
            constant, so an empty document follows the last.
    """
    cu_seqlens, lengths = batch.cu_seqlens, torch.tensor(batch.document_lengths)
    if for_compiled_code:
        cu_seqlens, lengths = pad(cu_seqlens, (0, 1), value=batch.tokens), pad(lengths, (0, 1))
    by_documents = {"document_cu_seqlens": cu_seqlens, "document_lengths": lengths}
    if in_blocks:
        by_documents["document_blocks"] = blocks_of(cu_seqlens, batch.tokens)
    if by_borders:
        numbers = torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(lengths)
        by_documents |= {
            "seq_idx": numbers[None].to(cu_seqlens.device, non_blocking=True),
            "cu_seq_lens_q": cu_seqlens,
        }
    if for_compiled_code:
        for each in by_documents.values():
            torch._dynamo.mark_dynamic(each, 0)  # noqa: SLF001 - its public name
    return {**by_documents, "input_ids": batch.input_ids, "position_ids": batch.position_ids}


def row_inputs(rows: int, tokens: int, device: torch.device, *, in_blocks: bool) -> dict[str, Tensor]:
    """Keyword arguments of our attention for rows of one document each, their padding included.

    Args:
        rows: how many.
        tokens: of each.
        device: to be on.
        in_blocks: as above.
    """
    cu_seqlens = torch.arange(0, rows * tokens + 1, tokens, dtype=torch.int32, device=device)
    by_documents = {"document_cu_seqlens": cu_seqlens, "document_lengths": torch.full((rows,), tokens)}
    if in_blocks:
        by_documents["document_blocks"] = blocks_of(cu_seqlens, rows * tokens)
    return by_documents


def rotate_by_document(model: nn.Module) -> None:
    """Have rotations choose their frequencies for each document, not for the longest of a row or of those before it."""
    for module in rotating_by_length(model):
        module.forward = partial(_by_document, module)


def rotating_by_length(model: nn.Module) -> list[Any]:
    """A model's rotations whose frequencies depend on how long a document is."""
    found = []
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        kinds = kinds.values() if isinstance(kinds, dict) else (kinds,)
        if any(kind in ROTATIONS_BY_LENGTH for kind in kinds):
            found.append(module)
    return found


def _by_document(module: Any, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each document, one after the other: [1, T, width].

    A document begins where a position is 0. While a model generates, each call has one document, or a part of one.
    """
    if len(position_ids) > 1:
        return _afresh(module, x, position_ids, *args, **kwargs)
    starts = torch.nonzero(position_ids[0] == 0).flatten().tolist()
    borders = sorted({0, *starts, position_ids.shape[1]})
    parts = [position_ids[:, start:end] for start, end in pairwise(borders)]
    cos, sin = zip(*(_afresh(module, x, part, *args, **kwargs) for part in parts), strict=True)
    return torch.cat(cos, dim=1), torch.cat(sin, dim=1)


def _afresh(module: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Its own forward, with nothing left of longer documents: transformers keeps the frequencies of the longest."""
    kinds = [f"{name}_" for name in module.rope_type] if isinstance(module.rope_type, dict) else [""]
    for kind in kinds:
        original = getattr(module, f"{kind}original_inv_freq", None)
        if original is not None:
            setattr(module, f"{kind}inv_freq", original.to(args[1].device, copy=True))
            setattr(module, f"{kind}max_seq_len_cached", module.original_max_seq_len)
    rotated: tuple[Tensor, Tensor] = type(module).forward(module, *args, **kwargs)
    return rotated
