"""Documents -> pictures of single examples: which are shown, and what each of their tokens reads as."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from job.core.data.preview import ExamplePreview, PreviewPiece, Shown, SourceTokens
from job.tune.data.control import control_tokens
from job.tune.data.documents import Documents

_HEAD, _TAIL = 100, 60
"""Tokens that are shown at the ends of a stretch."""
_MOST = 400
"""Tokens that are shown at each end of an example."""
_CONTEXT = 16
"""Tokens before a piece that are read with it: what a token reads as depends on those before it."""
Rows = NDArray[np.int64]


def by_source(documents: Documents, names: Sequence[str]) -> list[tuple[str, Rows]]:
    """Which of the encoded examples belong to which source."""
    sources = documents.encoded.sources
    return [(name, np.flatnonzero(sources == place)) for place, name in enumerate(names)]


def all_rows(documents: Documents) -> Rows:
    """The encoded examples of all sources."""
    return np.arange(len(documents.encoded))


def pictures(
    documents: Documents,
    tokenizer: Any,
    *,
    source: str,
    rows: Rows,
    random: int = 0,
    seed: int = 0,
    with_tokens: bool = False,
) -> tuple[ExamplePreview, ...]:
    """The first, the longest and the shortest example of a source, and some at random; none twice.

    Args:
        documents: of the training side.
        tokenizer: the base's.
        source: its name.
        rows: which of the encoded examples belong to it; those that are left out too.
        random: how many more.
        seed: of their choice.
        with_tokens: whether to say what each token reads as by itself.
    """
    reader, used = _Reader(tokenizer), set(documents.rows.tolist())
    return tuple(
        _picture(documents, row, reader, source=source, shown=shown, used=row in used, with_tokens=with_tokens)
        for row, shown in _chosen(documents.encoded.lengths, rows, random=random, seed=seed)
    )


def source_tokens(documents: Documents, *, source: str, rows: Rows) -> SourceTokens:
    """How long the examples of a source are."""
    lengths = documents.encoded.lengths[rows] if len(rows) else np.zeros(1, dtype=np.int32)
    mine = np.isin(documents.rows, rows)
    at = dict(zip((0, 50, 95, 100), np.percentile(lengths, (0, 50, 95, 100), method="lower").tolist(), strict=True))
    return SourceTokens(
        name=source,
        examples=len(rows),
        used=int(mine.sum()),
        tokens=int(documents.lengths[mine].sum()),
        learned=int(documents.targets[mine].sum()),
        shortest=at[0],
        median=at[50],
        p95=at[95],
        longest=at[100],
        truncated=int((documents.encoded.lengths[documents.rows[mine]] > documents.max_length).sum()),
    )


def _chosen(lengths: NDArray[np.int32], rows: Rows, *, random: int, seed: int) -> Iterator[tuple[int, Shown]]:
    """Each row once, with why it is shown."""
    if not len(rows):
        return
    own = lengths[rows]
    wanted: list[tuple[Rows, Shown]] = [
        (rows[:1], "first"),
        (rows[own == own.max()], "longest"),
        (rows[own == own.min()], "shortest"),
    ]
    seen: list[int] = []
    for alike, shown in wanted:
        fresh = alike[~np.isin(alike, seen)]
        if len(fresh):
            seen.append(int(fresh[0]))
            yield seen[-1], shown
    others = rows[~np.isin(rows, seen)]
    for row in np.random.default_rng(seed).choice(others, size=min(len(others), random), replace=False):
        yield int(row), "random"


def _picture(
    documents: Documents, row: int, reader: "_Reader", *, source: str, shown: Shown, used: bool, with_tokens: bool
) -> ExamplePreview:
    ids, limit = documents.encoded.input_ids(row).tolist(), documents.max_length
    learned = np.zeros(len(ids), dtype=bool)
    for start, end in documents.encoded.spans(row):
        learned[start:end] = True
    too_long = len(ids) > limit and documents.dropped > 0
    return ExamplePreview(
        where=documents.encoded.where(row),
        source=source,
        shown=shown,
        tokens=len(ids),
        learned=int(learned[:limit].sum()),
        cut=max(0, len(ids) - limit),
        left_out=None if used else "longer than max_length" if too_long else "nothing to learn from",
        pieces=tuple(reader.pieces(ids[:limit], learned[:limit].tolist(), with_tokens=with_tokens)),
    )


class _Reader:
    """Says what tokens read as where they stand."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        control = control_tokens(tokenizer)
        self._control = {token.id: token.text for token in control}
        probe = next((token for token in control if not token.takes_behind), None)
        bare = tokenizer("a", add_special_tokens=False).input_ids
        blank = "" if probe is None else f"{probe.text} a"
        self._blank_at_first = probe is not None and self._read([probe.id, *bare]) == blank
        """Whether the first text behind a control token reads with a blank before it that is not the record's, ..."""
        own = [] if probe is None else tokenizer(probe.text + "a", add_special_tokens=False).input_ids
        self._blank_behind_control = probe is not None and self._read(own) == blank
        """... and whether all others do."""

    def pieces(self, ids: Sequence[int], learned: Sequence[bool], *, with_tokens: bool) -> Iterator[PreviewPiece]:
        """Stretches of one kind; a control token is one by itself."""
        seen_text, visible = False, _visible(ids, learned, self._control.keys())
        kinds = [
            (place if visible[place] and token in self._control else -1, learned[place], visible[place])
            for place, token in enumerate(ids)
        ]
        for (control, is_learned, is_shown), group in groupby(range(len(ids)), key=kinds.__getitem__):
            places = list(group)
            start, end = places[0], places[-1] + 1
            if not is_shown:
                yield PreviewPiece(text="", learned=is_learned, control=False, omitted=end - start)
                continue
            begins = start == 0 or ids[start - 1] in self._control
            drop = begins and (self._blank_behind_control if seen_text else self._blank_at_first)
            seen_text = seen_text or control < 0
            texts = [self._token(ids, place) for place in places] if with_tokens else []
            yield PreviewPiece(
                text=self._control[ids[start]] if control >= 0 else self._text(ids, start, end, drop_blank=drop),
                learned=is_learned,
                control=control >= 0,
                ids=tuple(ids[start:end]),
                tokens=tuple(texts),
            )

    def _text(self, ids: Sequence[int], start: int, end: int, *, drop_blank: bool) -> str:
        text = self._behind(ids, start, end)
        return text.removeprefix(" ") if drop_blank else text

    def _token(self, ids: Sequence[int], place: int) -> str:
        """One token by itself; a part of a character by the tokenizer's own name for it."""
        if ids[place] in self._control:
            return self._control[ids[place]]
        text = self._behind(ids, place, place + 1)
        return text if text and "\N{REPLACEMENT CHARACTER}" not in text else str(self._name(ids[place]))

    def _behind(self, ids: Sequence[int], start: int, end: int) -> str:
        """What tokens add to the text before them."""
        first = max(0, start - _CONTEXT)
        before, whole = self._read(ids[first:start]), self._read(ids[first:end])
        common = next((n for n, pair in enumerate(zip(before, whole, strict=False)) if pair[0] != pair[1]), len(before))
        return whole[common:]

    def _read(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _name(self, token: int) -> Any:
        return self._tokenizer.convert_ids_to_tokens(token)


def _visible(ids: Sequence[int], learned: Sequence[bool], control: Any) -> list[bool]:
    """Which tokens are shown: the ends of each stretch, and of them the ends of the example."""
    shown = [False] * len(ids)
    for _, group in groupby(range(len(ids)), key=lambda n: (learned[n], ids[n] in control)):
        places = list(group)
        for place in places if len(places) <= _HEAD + _TAIL else places[:_HEAD] + places[-_TAIL:]:
            shown[place] = True
    kept = [place for place, is_shown in enumerate(shown) if is_shown]
    for place in kept[_MOST:-_MOST]:
        shown[place] = False
    return shown
