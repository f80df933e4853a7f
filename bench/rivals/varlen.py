"""Attention that keeps documents of a flattened batch apart, for transformers: torch's own variable-length kernel.

Without it TRL's packing needs flash-attn or a kernel from the hub.
"""

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "varlen"


def register():
    """Make it known as an `attn_implementation`."""
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, lambda *_unused, **_more: None)


def with_bounds(collate):
    """A collator that adds cu_seqlens: once a batch, on the host, so that no layer has to compute it."""

    def collate_with_bounds(examples):
        batch = collate(examples)
        starts = (batch["position_ids"][0] == 0).nonzero().flatten()
        end = torch.tensor([batch["position_ids"].shape[1]])
        bounds = torch.cat([starts, end]).to(torch.int32)
        longest = int(bounds.diff().max())
        same = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
        return {**batch, **same}

    return collate_with_bounds


def _attend(_module, query, key, value, _mask, *, scaling=None, cu_seq_lens_q=None, max_length_q=None, **_more):
    """[1, heads, T, width] three times -> [1, T, heads, width]."""
    if query.is_cuda:
        from torch.nn.attention.varlen import varlen_attn

        flat = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
        bounds = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
        return varlen_attn(*flat, *bounds, scale=scaling, window_size=(-1, 0)).unsqueeze(0), None
    lengths = cu_seq_lens_q.diff().tolist()
    parts = zip(*(torch.split(tensor, lengths, dim=2) for tensor in (query, key, value)), strict=True)
    gqa = query.shape[1] != key.shape[1]
    done = [scaled_dot_product_attention(*part, is_causal=True, scale=scaling, enable_gqa=gqa) for part in parts]
    return torch.cat(done, dim=2).transpose(1, 2), None
