"""Causal attention inside each document of a row, by torch's own variable-length kernels.

The boundaries are computed once for a micro-batch. On the CPU: SDPA, document by document.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

# torch.nn.attention.varlen has these only behind autograd, and before 2.12 without grouped heads.
# ruff: noqa: SLF001, FBT003 - torch's own names and signatures
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Documents:
    """Where the documents of a row begin and end."""

    bounds: Tensor
    """[D + 1] int32 on the device: 0, then where each document ends."""
    lengths: tuple[int, ...]
    """The same on the host."""

    @property
    def longest(self) -> int:
        """Tokens of the longest."""
        return max(self.lengths)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """How scores are made."""

    scale: float
    window: int | None
    """How many tokens back a token sees, itself included; None: all."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, documents: Documents) -> tuple[Tensor, Any]:
        """[T, heads, width], [T, key heads, width] twice -> [T, heads, width], and what the way back needs."""
        if not query.is_cuda:
            return self._plain(query, key, value, documents), None
        longest = documents.longest
        out, log_sums, state, unused, _ = torch.ops.aten._flash_attention_forward(
            query,
            key,
            value,
            documents.bounds,
            documents.bounds,
            longest,
            longest,
            0.0,
            True,
            False,
            scale=self.scale,
            **self._limits(longest),
        )
        return out, (log_sums, state, unused)

    def backward(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, kept: Any, documents: Documents
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value, from that of the result."""
        if not query.is_cuda:
            with torch.enable_grad():
                leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
                again = self._plain(leaves[0], leaves[1], leaves[2], documents)
            first, second, third = torch.autograd.grad(again, leaves, grad)
            return first, second, third
        longest = documents.longest
        log_sums, state, unused = kept
        with _same_order():
            result: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._flash_attention_backward(
                grad,
                query,
                key,
                value,
                out,
                log_sums,
                documents.bounds,
                documents.bounds,
                longest,
                longest,
                0.0,
                True,
                state,
                unused,
                scale=self.scale,
                **self._limits(longest),
            )
        return result

    def _limits(self, longest: int) -> dict[str, int]:
        # The kernel counts the tokens before a token; a window that no document reaches is none.
        if self.window is None or self.window >= longest:
            return {}
        return {"window_size_left": self.window - 1, "window_size_right": 0}

    def _plain(self, query: Tensor, key: Tensor, value: Tensor, documents: Documents) -> Tensor:
        lengths = list(documents.lengths)
        parts = zip(*(torch.split(tensor, lengths) for tensor in (query, key, value)), strict=True)
        return torch.cat([self._one(*(part.transpose(0, 1)[None] for part in each)) for each in parts])

    def _one(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        tokens = query.shape[2]
        mask = None
        if self.window is not None and self.window < tokens:
            at = torch.arange(tokens, device=query.device)
            distance = at[:, None] - at[None, :]
            mask = (distance >= 0) & (distance < self.window)
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


@contextmanager
def _same_order() -> Iterator[None]:
    """Sums of the kernel's gradient in one order always: a run that is resumed is the run that was not stopped."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined] # torch has no types here
    torch.use_deterministic_algorithms(True, warn_only=False)  # with True it would only warn, and take any order
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined] # as above
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined] # as above
