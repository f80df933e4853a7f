"""Causal attention inside each document of a row, by torch's variable-length kernels, or by our own.

`cu_seqlens` is computed once for a micro-batch. Where no kernel takes the heads: SDPA, document by document.

A sink is a learned score of a head that stands in each row's sum and has no value. With a row's log-sum-exp L, a
result without sinks is multiplied by sigmoid(L - sink), and L becomes log(exp(L) + exp(sink)). With both, the backward
of attention without sinks gives the right gradients: each weight is exp(score - L), and the row's sum of weights times
their gradients is that of the result times its own. Sinks: gpt-oss, arXiv 2508.10925.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

# torch.nn.attention.varlen has these only behind autograd, and before 2.12 without grouped heads.
# ruff: noqa: SLF001, FBT003 - torch's own names and signatures
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

WIDEST_HEAD, _WIDTH_STEP = 256, 8
"""Widest head that torch's kernels take, and what a width is a multiple of."""
OWN_WIDTHS = (16, 32, 64, 128)
"""Widths of a head that our kernels take."""


def has_kernel(query: Tensor) -> bool:
    """Whether torch's kernels take these heads: [..., width]."""
    width = query.shape[-1]
    exact = query.dtype not in {torch.bfloat16, torch.float16}
    return query.is_cuda and not exact and width <= WIDEST_HEAD and width % _WIDTH_STEP == 0


def has_own_kernel(query: Tensor, blocks: Tensor | None) -> bool:
    """Whether our kernels are wanted and take these heads: [..., width]."""
    return blocks is not None and query.shape[-1] in OWN_WIDTHS


def visible(tokens: int, window: int | None, device: torch.device) -> Tensor:
    """Which key each query of a document sees: [tokens, tokens] bool."""
    at = torch.arange(tokens, device=device)
    distance = at[:, None] - at[None, :]
    causal = distance >= 0
    return causal if window is None else causal & (distance < window)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Segments:
    """Where the documents of a row begin and end."""

    cu_seqlens: Tensor
    """[D + 1] int32 on the device: 0, then where each document ends."""
    lengths: tuple[int, ...]
    """Tokens of each document, on the host; of a row that a CUDA graph reads, one entry: the most that any may have."""
    blocks: Tensor | None = None
    """From `blocks_of`, for our own kernels; None: torch's."""

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max(self.lengths)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Attention of one layer, forward and backward: the scale and the window of its scores, and its sinks."""

    scale: float
    window: int | None
    """How many tokens back a token sees, itself included; None: all."""
    sinks: Tensor | None = None
    """[heads], scores that stand in each row's sum alone, not scaled; they get no gradient. None: there are none."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
        """[T, heads, width], [T, key heads, width] twice -> [T, heads, width], and what `backward` keeps."""
        if segments.blocks is not None and has_own_kernel(query, segments.blocks):
            from job.kernels import triton_attention

            return triton_attention.forward(query, key, value, segments.blocks, self.scale, self.window, self.sinks)
        if not has_kernel(query):
            if self.sinks is not None:
                return self._plain_with_sinks(query, key, value, segments), query.new_empty(0)
            return self._plain(query, key, value, segments), query.new_empty(0)
        longest = segments.longest
        out, log_sums, *_ = torch.ops.aten._flash_attention_forward(
            query,
            key,
            value,
            segments.cu_seqlens,
            segments.cu_seqlens,
            longest,
            longest,
            0.0,
            True,
            False,
            scale=self.scale,
            **self._limits(longest),
        )
        if self.sinks is not None:
            out, log_sums = _with_sinks(out, log_sums, self.sinks)
        return out, log_sums

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        kept: Tensor,
        segments: Segments,
        *,
        room: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value, from that of the result.

        Our own kernels write them into `room`, three tensors whose tokens may lie apart; others return new tensors.
        """
        if segments.blocks is not None and has_own_kernel(query, segments.blocks):
            from job.kernels import triton_attention

            room = room or (torch.empty_like(query), torch.empty_like(key), torch.empty_like(value))
            triton_attention.backward(
                grad, query, key, value, out, kept, segments.blocks, self.scale, self.window, room
            )
            return room
        if not has_kernel(query):
            return self._plain_backward(grad, query, key, value, segments)
        longest = segments.longest
        unread = grad.new_empty(2, dtype=torch.uint64), grad.new_empty((), dtype=torch.uint64)  # dropout's state
        with _same_order():
            result: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._flash_attention_backward(
                grad,
                query,
                key,
                value,
                out,
                kept,
                segments.cu_seqlens,
                segments.cu_seqlens,
                longest,
                longest,
                0.0,
                True,
                *unread,
                scale=self.scale,
                **self._limits(longest),
            )
        return result

    def _limits(self, longest: int) -> dict[str, int]:
        # The kernel's window does not count the token itself; a window that no document reaches is none.
        if self.window is None or self.window >= longest:
            return {}
        return {"window_size_left": self.window - 1, "window_size_right": 0}

    def _plain(self, query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
        lengths = list(segments.lengths)
        parts = zip(*(torch.split(tensor, lengths) for tensor in (query, key, value)), strict=True)
        return torch.cat([self._one(*(part.transpose(0, 1)[None] for part in each)) for each in parts])

    def _plain_with_sinks(self, query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
        """By the formula, as its backward: what sums the rows of SDPA is not to be had of every kernel of it."""
        out = torch.empty_like(query)
        for rows, heads, head in _places(segments, query.shape[1] // key.shape[1], key.shape[1]):
            parts = (query[rows, heads], key[rows, head], value[rows, head])
            one_query, one_key, one_value = (part.float() for part in parts)
            weights = self._weights(one_query, one_key, heads)
            out[rows, heads] = torch.einsum("hqk,kw->qhw", weights, one_value).to(out.dtype)
        return out

    def _plain_backward(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, segments: Segments
    ) -> tuple[Tensor, Tensor, Tensor]:
        """By the formula, a document and a key head at a time: no more attention weights exist at once."""
        grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        for rows, heads, head in _places(segments, query.shape[1] // key.shape[1], key.shape[1]):
            parts = (grad[rows, heads], query[rows, heads], key[rows, head], value[rows, head])
            d_query, d_key, d_value = self._one_backward(*(part.float() for part in parts), heads=heads)
            grads[0][rows, heads], grads[1][rows, head], grads[2][rows, head] = d_query, d_key, d_value
        return grads

    def _weights(self, query: Tensor, key: Tensor, heads: slice) -> Tensor:
        """Attention weights of one document and key head, fp32: [t, heads, width], [t, width] -> [heads, t, t]."""
        scores = self.scale * torch.einsum("qhw,kw->hqk", query, key)
        scores = scores.masked_fill(~visible(len(query), self.window, query.device), float("-inf"))
        if self.sinks is None:
            return scores.softmax(dim=-1)
        column = self.sinks[heads].float()[:, None, None].expand(-1, len(query), 1)
        return torch.cat([scores, column], dim=-1).softmax(dim=-1)[..., :-1]

    def _one_backward(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *, heads: slice
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One document and key head, fp32: grad and query [t, heads, width], key and value [t, width].

        With weights P = softmax(scale Q K^T) and result P V: dV = P^T dO, dS = P * (dO V^T - rowsum(P * dO V^T)),
        dQ = scale dS K, dK = scale dS^T Q. A sink's weight is not in P: it has no value, and no part in these sums.
        """
        weights = self._weights(query, key, heads)
        d_weights = torch.einsum("qhw,kw->hqk", grad, value)
        d_scores = self.scale * weights * (d_weights - (weights * d_weights).sum(dim=-1, keepdim=True))
        return (
            torch.einsum("hqk,kw->qhw", d_scores, key),
            torch.einsum("hqk,qhw->kw", d_scores, query),
            torch.einsum("hqk,qhw->kw", weights, grad),
        )

    def _one(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        tokens = query.shape[2]
        mask = None
        if self.window is not None and self.window < tokens:
            mask = visible(tokens, self.window, query.device)
        result = scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.scale,
            enable_gqa=key.shape[1] != query.shape[1],
        )
        return result[0].transpose(0, 1)


def _with_sinks(out: Tensor, log_sums: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """A result [T, heads, width] and its rows' log-sum-exp [heads, T], as they are with sinks [heads] in the sums."""
    column = sinks.float()[:, None]
    shares = torch.sigmoid(log_sums - column).t()[..., None]
    return (out * shares).to(out.dtype), torch.logaddexp(log_sums, column)


def _places(segments: Segments, groups: int, key_heads: int) -> Iterator[tuple[slice, slice, int]]:
    """Each document's rows with each key head: its queries' heads, and itself."""
    start = 0
    for length in segments.lengths:
        rows = slice(start, start := start + length)
        yield from ((rows, slice(head * groups, (head + 1) * groups), head) for head in range(key_heads))


@contextmanager
def _same_order() -> Iterator[None]:
    """Fix the order of sums in the kernel's gradients: a resumed run equals an uninterrupted one to the bit."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined] # torch has no types here
    torch.use_deterministic_algorithms(True, warn_only=False)  # with True it would only warn, and sum in any order
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined] # as above
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined] # as above
