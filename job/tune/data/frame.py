"""Parts -> token ids with target spans, framed by BOS and EOS as the tokenizer and the recipe want it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from string import Formatter
from typing import Any

from job.core.data_section import DataSection
from job.core.errors import DataError, UsageError
from job.core.records import Example

_PANIC = "PanicException"
"""What a panic in Rust is in Python, by its name, for no module exports it; it is no Exception. Errors of the library
are bare Exceptions."""


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
        raise UsageError(
            "the base model's tokenizer names no end-of-sequence token (eos_token in tokenizer_config.json), "
            "so the model could not learn to stop; add it to the model folder"
        )
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
    """Token ids without frame.

    Raises:
        DataError: the tokenizer gives up: an expression in its files takes too long, say.
    """
    if not texts:
        return []
    try:
        encoded = tokenizer(
            list(texts),
            add_special_tokens=False,
            split_special_tokens=not rules.literal_special,
            return_attention_mask=False,
            verbose=False,  # length is judged later, on purpose
        )
    except BaseException as error:
        if type(error) is Exception or type(error).__name__ == _PANIC:
            raise DataError(
                f"the base model's tokenizer cannot encode the data ({error}); correct its files"
            ) from error
        raise
    return [list(ids) for ids in encoded.input_ids]


def encode_prompt(text: str, tokenizer: Any, rules: TokenRules) -> list[int]:
    """Token ids of a prompt as the model saw it in training: BOS where the tokenizer puts one, and no EOS."""
    return _framed_start(encode_texts([text], tokenizer, rules)[0], rules)


Span = tuple[int, int]
"""Positions of tokens, half-open: the first, and the one after the last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Framed:
    """One example as token ids, with BOS and EOS."""

    ids: list[int]
    spans: tuple[Span, ...]
    """Tokens that are targets, each predicted from the one before it: ascending, apart from each other, none empty."""
    answer_from: int
    """Position where the last learned part begins, whatever the loss is over: a question ends there."""


def encode_examples(batch: Sequence[Example], tokenizer: Any, rules: TokenRules) -> list[Framed]:
    """Each example's token ids, framed.

    What stands before a border between given and learned text has the ids that it has without what follows, as it will
    at inference. Text is encoded as one as long as that holds by itself; where the tokenizer would merge across a
    border, what follows is encoded as a text of its own.
    """
    drafts = [_Draft.of(example) for example in batch]
    for stretch in range(max((len(draft.ends) for draft in drafts), default=0)):
        _encode_stretch([draft for draft in drafts if stretch < len(draft.ends)], stretch, tokenizer, rules)
    return [_frame([*draft.before, *draft.piece], draft.token_ends, rules) for draft in drafts]


@dataclass(slots=True, kw_only=True)
class _Draft:
    """One example, encoded stretch by stretch: given and learned ones by turns, the first is given."""

    text: str
    ends: tuple[int, ...]
    """Characters before the end of each stretch."""
    token_ends: list[int] = field(default_factory=list)
    """Tokens before the end of each stretch that is done."""
    before: list[int] = field(default_factory=list)
    """Ids before the piece."""
    piece_from: int = 0
    """Characters before the piece, the text that is encoded as one."""
    piece: list[int] = field(default_factory=list)
    """Ids of the piece so far."""

    @classmethod
    def of(cls, example: Example) -> "_Draft":
        text = example.text
        return cls(text=text, ends=(*example.borders, len(text)))

    def start(self, stretch: int) -> int:
        """Characters before a stretch."""
        return self.ends[stretch - 1] if stretch else 0


def _encode_stretch(drafts: Sequence[_Draft], stretch: int, tokenizer: Any, rules: TokenRules) -> None:
    """Bring drafts, which all have this stretch, to its end."""
    growing = [draft for draft in drafts if draft.start(stretch) < draft.ends[stretch]]
    whole = encode_texts([draft.text[draft.piece_from : draft.ends[stretch]] for draft in growing], tokenizer, rules)
    merged = []
    for draft, ids in zip(growing, whole, strict=True):
        if ids[: len(draft.piece)] == draft.piece:
            draft.piece = ids
        else:
            merged.append(draft)
    alone = encode_texts([draft.text[draft.start(stretch) : draft.ends[stretch]] for draft in merged], tokenizer, rules)
    for draft, ids in zip(merged, alone, strict=True):
        draft.before += draft.piece
        draft.piece_from, draft.piece = draft.start(stretch), ids
    for draft in drafts:
        draft.token_ends.append(len(draft.before) + len(draft.piece))


def _framed_start(ids: list[int], rules: TokenRules) -> list[int]:
    return ids if rules.bos is None or ids[:1] == [rules.bos] else [rules.bos, *ids]


def _frame(ids: list[int], token_ends: Sequence[int], rules: TokenRules) -> Framed:
    framed = _framed_start(ids, rules)
    ends = [end + len(framed) - len(ids) for end in token_ends]
    learned = list(zip(ends[::2], ends[1::2], strict=False))  # a last one that is only given has no partner
    answer_from = learned[-1][0] if learned else len(framed)
    if len(ends) % 2 == 0:  # the last stretch is learned
        if framed[-1:] != [rules.eos] or len(framed) == answer_from:
            framed = [*framed, rules.eos]
        learned[-1] = (answer_from, len(framed))
    targets = [(0, len(framed))] if rules.loss_on_prompt else learned
    return Framed(ids=framed, spans=_spans(targets), answer_from=max(answer_from, 1))


def _spans(stretches: Sequence[Span]) -> tuple[Span, ...]:
    """Stretches of tokens as target spans."""
    spans: list[Span] = []
    for start, end in stretches:
        first = max(start, 1)  # the first token follows nothing, so it is never a target
        if first >= end:
            continue
        if spans and spans[-1][1] == first:
            first, _ = spans.pop()
        spans.append((first, end))
    return tuple(spans)
