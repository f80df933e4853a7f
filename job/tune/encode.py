"""Examples -> token ids on disk (Arrow) -> packed micro-batches with their targets."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from string import Formatter
from typing import Any, Literal

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
from datasets.arrow_writer import ArrowWriter
from numpy.typing import NDArray
from torch import Tensor

from job.core.errors import DataError, StopRequestedError, UsageError
from job.core.plan import Lengths
from job.core.recipe import DataSection
from job.core.records import Example

Side = Literal["train", "validation"]
_SIDES: tuple[Side, ...] = ("train", "validation")
_BATCH = 1000
"""Examples handed to the tokenizer at once."""
_FEATURES = {
    "input_ids": "int32",
    "target_from": "int32",
    "answer_from": "int32",
    "digest": "binary",
    "where": "string",
}
FORMAT = 2
"""Of the files that `encode` writes: those of another one are not read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRules:
    """How this tokenizer and this recipe frame an example."""

    bos: int | None
    """Token before each example; None for tokenizers that put none."""
    eos: int
    literal_special: bool
    """Whether special tokens written in a template are meant as such. Otherwise text such as `</s>` in a record is
    encoded letter by letter: data must not end an example early."""
    loss_on_prompt: bool


def token_rules(tokenizer: Any, data: DataSection) -> TokenRules:
    """Find out how the tokenizer frames a text.

    Raises:
        UsageError: it has no end-of-sequence token, so the model could never learn to stop.
    """
    if tokenizer.eos_token_id is None:
        msg = (
            "the base model's tokenizer names no end-of-sequence token (eos_token in tokenizer_config.json), "
            "so the model could not learn to stop; add it to the model folder"
        )
        raise UsageError(msg)
    framed = tokenizer("a").input_ids
    puts_bos = tokenizer.bos_token_id is not None and framed[:1] == [tokenizer.bos_token_id]
    templates = [t for t in (data.text, data.prompt, data.completion) if t is not None]
    literals = "".join(literal for t in templates for literal, *_ in Formatter().parse(t))
    return TokenRules(
        bos=tokenizer.bos_token_id if puts_bos else None,
        eos=tokenizer.eos_token_id,
        literal_special=any(token in literals for token in tokenizer.all_special_tokens),
        loss_on_prompt=data.loss_on == "all",
    )


def encode_texts(texts: Sequence[str], tokenizer: Any, rules: TokenRules) -> list[list[int]]:
    """Token ids without frame."""
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        split_special_tokens=not rules.literal_special,
        return_attention_mask=False,
        verbose=False,  # length is judged later, on purpose
    )
    return [list(ids) for ids in encoded.input_ids]


def encode_prompt(text: str, tokenizer: Any, rules: TokenRules) -> list[int]:
    """Token ids of a prompt as the model saw it in training: BOS where the tokenizer puts one, and no EOS."""
    return _framed_start(encode_texts([text], tokenizer, rules)[0], rules)


@dataclass(frozen=True, slots=True, kw_only=True)
class Framed:
    """One example as token ids, with BOS and EOS."""

    ids: list[int]
    target_from: int
    """Position of the first target."""
    answer_from: int
    """Position where the prompt ends: the first target, unless the loss is over the prompt too."""


def encode_examples(batch: Sequence[Example], tokenizer: Any, rules: TokenRules) -> list[Framed]:
    """Each example's token ids, framed.

    A prompt keeps the ids it has when it stands alone, as it will at inference. Where prompt and completion share no
    token they are encoded as one text; where the tokenizer would merge across the border, each is encoded by itself.
    """
    prompts = encode_texts([e.prompt for e in batch], tokenizer, rules)
    whole = encode_texts([e.prompt + e.completion for e in batch], tokenizer, rules)
    split = [i for i, ids in enumerate(prompts) if whole[i][: len(ids)] != ids]
    alone = encode_texts([batch[i].completion for i in split], tokenizer, rules) if split else []
    for i, completion in zip(split, alone, strict=True):
        whole[i] = prompts[i] + completion
    return [_frame(ids, len(prompt), rules) for ids, prompt in zip(whole, prompts, strict=True)]


def _framed_start(ids: list[int], rules: TokenRules) -> list[int]:
    return ids if rules.bos is None or ids[:1] == [rules.bos] else [rules.bos, *ids]


def _frame(ids: list[int], prompt_tokens: int, rules: TokenRules) -> Framed:
    framed = _framed_start(ids, rules)
    prompt_end = prompt_tokens + len(framed) - len(ids)
    if framed[-1:] != [rules.eos] or len(framed) == prompt_end:
        framed = [*framed, rules.eos]
    # The first token follows nothing, so it is never a target.
    answer_from = max(prompt_end, 1) if prompt_tokens else 1
    return Framed(ids=framed, target_from=1 if rules.loss_on_prompt else answer_from, answer_from=answer_from)


class EncodedSet:
    """One side of the dataset on disk, memory-mapped."""

    def __init__(self, path: Path) -> None:
        self._table = datasets.Dataset.from_file(str(path)).data
        self.lengths: Lengths = _numpy(pc.list_value_length(self._table.column("input_ids"))).astype(np.int32)
        self.target_from: NDArray[np.int32] = _numpy(self._table.column("target_from"))
        self.answer_from: NDArray[np.int32] = _numpy(self._table.column("answer_from"))

    def __len__(self) -> int:
        return len(self.lengths)

    def input_ids(self, index: int) -> NDArray[np.int32]:
        """Token ids of one example, framed, not truncated."""
        values: NDArray[np.int32] = self._table.column("input_ids")[index].values.to_numpy()
        return values

    def where(self, index: int) -> str:
        """`file:line` of one example."""
        return str(self._table.column("where")[index].as_py())

    def digests(self) -> list[bytes]:
        """The content names of all examples."""
        values: list[bytes] = self._table.column("digest").to_pylist()
        return values


def _numpy(column: Any) -> Any:
    return column.to_numpy() if len(column) else np.zeros(0, dtype=np.int32)


def encode(
    examples: Iterable[tuple[Side, Example]],
    tokenizer: Any,
    rules: TokenRules,
    *,
    folder: Path,
    should_stop: Callable[[], bool],
    on_progress: Callable[[int], None],
) -> dict[Side, EncodedSet]:
    """Write both sides to Arrow files that appear whole.

    Args:
        examples: each with its side; read once.
        tokenizer: the base model's.
        rules: from `token_rules`.
        folder: where the files stand; it belongs to one run, so its files can only hold this run's data.
        should_stop: polled between batches.
        on_progress: told the number of encoded examples.

    Raises:
        StopRequestedError: asked to stop; the next attempt writes over what is there so far.
    """
    partial = {side: folder / f"{side}.partial" for side in _SIDES}
    folder.mkdir(parents=True, exist_ok=True)
    features = datasets.Features(
        {
            name: [datasets.Value(kind)] if name == "input_ids" else datasets.Value(kind)
            for name, kind in _FEATURES.items()
        }
    )
    writers = {side: ArrowWriter(features=features, path=str(partial[side])) for side in _SIDES}
    done = 0
    for batch in _batches(examples):
        if should_stop():
            msg = "asked to stop while encoding"
            raise StopRequestedError(msg)
        rows = encode_examples([example for _, example in batch], tokenizer, rules)
        for (side, example), framed in zip(batch, rows, strict=True):
            row = {
                "input_ids": framed.ids,
                "target_from": framed.target_from,
                "answer_from": framed.answer_from,
                "digest": example.digest,
                "where": example.where,
            }
            writers[side].write(row)
        done += len(batch)
        on_progress(done)
    for side, writer in writers.items():
        writer.finalize()
        partial[side].replace(_path(folder, side))
    return open_encoded(folder)


def open_encoded(folder: Path) -> dict[Side, EncodedSet]:
    """Both sides as `encode` left them."""
    return {side: EncodedSet(_path(folder, side)) for side in _SIDES}


def _path(folder: Path, side: Side) -> Path:
    return folder / f"{side}.arrow"


def _batches(examples: Iterable[tuple[Side, Example]]) -> Iterator[list[tuple[Side, Example]]]:
    iterator = iter(examples)
    while batch := list(islice(iterator, _BATCH)):
        yield batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Documents:
    """The examples of one side as they are trained or judged on: selected, and cut at max_length."""

    encoded: EncodedSet
    rows: NDArray[np.int64]
    max_length: int
    truncated: int
    dropped: int
    """Longer than max_length, and left out."""
    without_target: int
    """Nothing to learn from after the cut, and left out."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> Lengths:
        """Tokens of each document after the cut."""
        return np.minimum(self.encoded.lengths[self.rows], self.max_length)

    @property
    def targets(self) -> NDArray[np.int64]:
        """Target tokens of each document."""
        return self.lengths.astype(np.int64) - self.encoded.target_from[self.rows]

    def token_ids(self, document: int) -> NDArray[np.int32]:
        """Token ids of one document after the cut."""
        return self.encoded.input_ids(int(self.rows[document]))[: self.max_length]

    def target_from(self, document: int) -> int:
        """Position of the first target of one document."""
        return int(self.encoded.target_from[self.rows[document]])

    def answer_from(self, document: int) -> int:
        """Position where the prompt of one document ends."""
        return int(self.encoded.answer_from[self.rows[document]])

    def is_whole(self, document: int) -> bool:
        """Whether one document was not cut."""
        return bool(self.encoded.lengths[self.rows[document]] <= self.max_length)

    def where(self, document: int) -> str:
        """`file:line` of one document."""
        return self.encoded.where(int(self.rows[document]))


def select_documents(
    encoded: EncodedSet, *, max_length: int, too_long: Literal["truncate", "drop", "fail"], most: int | None = None
) -> Documents:
    """Apply max_length, leave out what has no target, and keep at most `most` by a hash of the content.

    Raises:
        DataError: an example is too long, and the recipe says `too_long: fail`; or none is left.
    """
    over = encoded.lengths > max_length
    if too_long == "fail" and over.any():
        first = int(np.argmax(over))
        msg = (
            f"{encoded.where(first)}: {int(encoded.lengths[first])} tokens, more than max_length {max_length} "
            f"({int(over.sum())} such examples); raise data.max_length, or set data.too_long: truncate or drop"
        )
        raise DataError(msg)
    kept = ~over if too_long == "drop" else np.ones(len(encoded), dtype=bool)
    has_target = np.minimum(encoded.lengths, max_length) > encoded.target_from
    rows = np.flatnonzero(kept & has_target)
    if most is not None:
        digests = encoded.digests()
        rows = np.array(sorted(sorted(rows, key=lambda row: digests[row])[:most]), dtype=np.int64)
    return Documents(
        encoded=encoded,
        rows=rows,
        max_length=max_length,
        truncated=int(over[rows].sum()),
        dropped=int((~kept).sum()),
        without_target=int((kept & ~has_target).sum()),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Documents in a row, without padding. T tokens, N targets."""

    input_ids: Tensor
    """[1, T] int64."""
    position_ids: Tensor
    """[1, T] int64; each document starts at 0."""
    document_lengths: tuple[int, ...]
    """Tokens of each document; their sum is T."""
    bounds: Tensor
    """[documents + 1] int32: 0, then where each document ends."""
    target_places: Tensor
    """[N] int64: places in T whose next token is a target."""
    target_ids: Tensor
    """[N] int64: those next tokens."""
    target_counts: tuple[int, ...]
    """Targets of each document; their sum is N."""
    documents: tuple[int, ...]
    """Which documents these are."""

    @property
    def tokens(self) -> int:
        """Real tokens: there are no others."""
        return sum(self.document_lengths)

    @property
    def targets(self) -> int:
        """Target tokens."""
        return sum(self.target_counts)

    def to(self, device: torch.device) -> "MicroBatch":
        """The same on a device, copied without waiting."""

        def moved(tensor: Tensor) -> Tensor:
            pinned = tensor.pin_memory() if device.type == "cuda" else tensor
            return pinned.to(device, non_blocking=True)

        return MicroBatch(
            input_ids=moved(self.input_ids),
            position_ids=moved(self.position_ids),
            document_lengths=self.document_lengths,
            bounds=moved(self.bounds),
            target_places=moved(self.target_places),
            target_ids=moved(self.target_ids),
            target_counts=self.target_counts,
            documents=self.documents,
        )


def micro_batch(documents: Documents, members: Sequence[int]) -> MicroBatch:
    """Lay documents in a row; the loss reads the token before each target."""
    ids = [documents.token_ids(member).astype(np.int64) for member in members]
    starts = np.cumsum([0, *(len(i) for i in ids)])
    targets = [np.arange(documents.target_from(m), len(i)) for m, i in zip(members, ids, strict=True)]
    places = [t + start - 1 for t, start in zip(targets, starts[:-1], strict=True)]
    return MicroBatch(
        input_ids=torch.from_numpy(np.concatenate(ids))[None],
        position_ids=torch.from_numpy(np.concatenate([np.arange(len(i)) for i in ids]))[None],
        document_lengths=tuple(len(i) for i in ids),
        bounds=torch.from_numpy(starts.astype(np.int32)),
        target_places=torch.from_numpy(np.concatenate(places)),
        target_ids=torch.from_numpy(np.concatenate([i[t] for i, t in zip(ids, targets, strict=True)])),
        target_counts=tuple(len(t) for t in targets),
        documents=tuple(members),
    )
