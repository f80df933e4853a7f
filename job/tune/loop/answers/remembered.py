"""Attention that remembers keys and values of the tokens before: what an answer is generated with, token by token.

Registered with transformers' AttentionInterface like `engines/attention.py`, so that it takes the same families:
questions are read packed in one row, each attending to itself, and then each token of all answers is one forward. Every
question has a row of its own in a memory that is taken once; which of its places a token sees is masked.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from job.tune.engines.attention import per_document_attention
from job.tune.engines.packed_model import PackedModel

REMEMBERED = "remembered"
"""The name under which transformers finds this attention."""


def can_remember(model: PackedModel) -> bool:
    """Whether a model may attend so: attention alone hands something on, and rotations go by positions alone."""
    return model.is_packed and not model.kernels_by_borders and model.rotates_by_position


@contextmanager
def remembering(model: PackedModel) -> Iterator[None]:
    """The model with this attention, for `read` and `write`."""
    AttentionInterface.register(REMEMBERED, remembered_attention)  # twice does no harm
    with model.attending(REMEMBERED):
        yield


def read(model: PackedModel, memory: "Memory", questions: Mapping[str, Tensor]) -> Tensor:
    """Read questions, from `packed_questions`, into a memory: logits of the token after each, [N, vocabulary]."""
    memory.reading(questions["rows"], questions["positions"][0])
    states = model.states(
        input_ids=questions["ids"],
        position_ids=questions["positions"],
        remembered=memory,
        document_cu_seqlens=questions["cu_seqlens"],
        document_lengths=questions["lengths"],
    )
    return model.head.logits(states[0].index_select(0, questions["ends"]))


def write(model: PackedModel, memory: "Memory", tokens: Tensor, at: Tensor, *, seen: int) -> Tensor:
    """One token more of each of the first rows, at its place: logits of the next one, [B, vocabulary].

    Args:
        model: in `remembering`.
        memory: what was read and written before.
        tokens: [B] int64.
        at: [B] int64.
        seen: above every place of them.
    """
    memory.writing(at, seen=seen)
    states = model.states(input_ids=tokens[:, None], position_ids=at[:, None], remembered=memory)
    return model.head.logits(states[:, 0])


class Memory:
    """Keys and values of all tokens so far, for each call of attention in a forward, in their order."""

    def __init__(self, rows: int, width: int) -> None:
        """The memory is taken while the first question is read: only then its shapes are known.

        Args:
            rows: questions.
            width: tokens of each with its answer, at most.
        """
        self.rows = rows
        self.width = width
        self._calls: list[tuple[Tensor, Tensor]] = []
        self._call = 0
        self._places: tuple[Tensor, Tensor] | None = None
        self._at: Tensor | None = None
        self._seen = 0
        self._masks: dict[int | None, Tensor] = {}

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values, once something was read."""
        return sum(part[0, 0].numel() * part.element_size() for pair in self._calls for part in pair)

    def reading(self, row_of: Tensor, position_of: Tensor) -> None:
        """The next forward reads questions.

        Args:
            row_of: [T] int64: where each token of the packed row belongs.
            position_of: [T] int64: its place in its question.
        """
        self._call, self._places, self._at = 0, (row_of, position_of), None

    def writing(self, at: Tensor, *, seen: int) -> None:
        """The next forward has one token of each of the first rows.

        Args:
            at: [B] int64: the place of each in its row.
            seen: how many places any of them may see, at most: those beyond are not looked at.
        """
        self._call, self._places, self._at, self._seen = 0, None, at, seen
        self._masks = {}

    def move(self, source: int, target: int) -> None:
        """Put what one row remembers in the place of another."""
        for pair in self._calls:
            for part in pair:
                part[target].copy_(part[source])

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **rest: Any) -> Tensor:
        """One call of attention: see `remembered_attention`."""
        call, self._call = self._call, self._call + 1
        if self._places is not None:
            if call == len(self._calls):
                self._calls.append((self._room(key), self._room(value)))
            for room, part in zip(self._calls[call], (key, value), strict=True):
                room[self._places] = part[0].transpose(0, 1)
            return per_document_attention(module, query, key, value, None, **rest)[0]
        assert self._at is not None, "nothing says where this token stands"
        keys, values = self._calls[call]
        rows = torch.arange(len(self._at), device=self._at.device)
        keys[rows, self._at] = key[:, :, 0]
        values[rows, self._at] = value[:, :, 0]
        window = rest.get("sliding_window")
        return _one_token(
            query,
            keys[: len(self._at), : self._seen].transpose(1, 2),
            values[: len(self._at), : self._seen].transpose(1, 2),
            self._mask(window),
            scale=rest["scaling"] if rest.get("scaling") is not None else query.shape[-1] ** -0.5,
            softcap=rest.get("softcap"),
            sinks=rest.get("s_aux"),
        )

    def _room(self, part: Tensor) -> Tensor:
        # Zeros: what is masked counts with a weight of 0, and 0 times what memory happens to hold may be NaN.
        return part.new_zeros(self.rows, self.width, part.shape[1], part.shape[3])

    def _mask(self, window: int | None) -> Tensor:
        """[B, 1, 1, seen] bool: which places each token sees."""
        if window not in self._masks:
            assert self._at is not None
            distance = self._at[:, None] - torch.arange(self._seen, device=self._at.device)
            sees = distance >= 0 if window is None else (distance >= 0) & (distance < window)
            self._masks[window] = sees[:, None, None]
        return self._masks[window]


def remembered_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    remembered: Memory,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Attention over what is remembered, and this token.

    Args:
        module: the attention layer.
        query: [1, heads, T, width] while questions are read, then [B, heads, 1, width].
        key: the same with key heads.
        value: as key.
        attention_mask: None; the memory's takes its place.
        remembered: the memory.
        rest: scaling, sliding_window, softcap and s_aux, as of `per_document_attention`, and its documents.

    Returns:
        [1, T, heads, width] or [B, 1, heads, width], and no weights.
    """
    assert attention_mask is None, "transformers made a mask for an attention that has its own"
    return remembered.attend(module, query, key, value, **rest), None


def _one_token(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention of one token a row: [B, heads, 1, width] and [B, key heads, seen, width] -> [B, 1, heads, width]."""
    rows, heads, _, width = query.shape
    # Heads that share keys are queries side by side: no key is copied for them.
    grouped = query.reshape(rows, keys.shape[1], heads // keys.shape[1], width)
    if softcap is None and sinks is None:
        out = scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scale)
    else:
        scores = grouped @ keys.transpose(2, 3) * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        if sinks is not None:  # a score that is in each row's sum, and has no value
            beside = sinks.to(scores.dtype).reshape(1, keys.shape[1], -1, 1)
            scores = torch.cat([scores, beside.expand(rows, -1, -1, 1)], dim=-1)
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
        out = weights[..., : keys.shape[2]] @ values
    return out.reshape(rows, 1, heads, values.shape[3])


def packed_questions(prompts: Sequence[Sequence[int]], first_row: int, device: torch.device) -> dict[str, Tensor]:
    """Questions side by side in one row of T tokens, as they are read.

    Returns:
        ids [1, T], positions [1, T], rows [T], ends [N] (places of the last tokens), cu_seqlens [N + 1] int32 on the
        device, and lengths [N] on the host.
    """
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    ends = lengths.cumsum(0)
    ids = torch.tensor([token for prompt in prompts for token in prompt])
    rows = torch.repeat_interleave(torch.arange(first_row, first_row + len(prompts)), lengths)
    starts = torch.repeat_interleave(ends - lengths, lengths)
    return {
        "ids": ids[None].to(device),
        "positions": (torch.arange(len(ids)) - starts)[None].to(device),
        "rows": rows.to(device),
        "ends": (ends - 1).to(device),
        "cu_seqlens": torch.cat([torch.zeros(1, dtype=torch.int64), ends]).to(torch.int32).to(device),
        "lengths": lengths,
    }
