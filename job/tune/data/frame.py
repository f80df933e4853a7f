"""Parts -> token ids with target spans, framed by BOS and EOS as the tokenizer and the recipe want it.

Control tokens are what a template writes as such. The text between them is spelled: what a record holds never becomes a
control token. Each stretch of it, given or learned, is encoded once and by itself, so that what is given has the ids
that it has without what follows, as it will at inference; and what goes on with a text is encoded as such, so that the
ids before a border and those behind it read as the text.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain, groupby, pairwise
from typing import Any

from job.core.data.records import Example, Part
from job.core.errors import UsageError
from job.core.recipe.data_section import DataSection
from job.tune.data.control import ControlFinder, ControlToken, control_tokens
from job.tune.data.spelling import Spelling

_SHOWN = 12
"""Characters on each side of a border in a message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRules:
    """How this tokenizer and this recipe frame an example."""

    bos: int | None
    """Token before each example; None for tokenizers that put none."""
    eos: int
    control: ControlFinder
    """Finds control tokens in a template's own text."""
    spelling: Spelling
    """Encodes all other text."""
    loss_on_prompt: bool


def token_rules(tokenizer: Any, data: DataSection) -> TokenRules:
    """Find out how the tokenizer frames a text.

    Raises:
        UsageError: it has no end-of-sequence token, so the model could never learn to stop; or no tokenizer.json.
    """
    if tokenizer.eos_token_id is None:
        raise UsageError(
            "the base model's tokenizer names no end-of-sequence token (eos_token in tokenizer_config.json), "
            "so the model could not learn to stop; add it to the model folder"
        )
    framed = tokenizer("a").input_ids
    puts_bos = tokenizer.bos_token_id is not None and framed[:1] == [tokenizer.bos_token_id]
    control = control_tokens(tokenizer)
    return TokenRules(
        bos=tokenizer.bos_token_id if puts_bos else None,
        eos=tokenizer.eos_token_id,
        control=ControlFinder(control),
        spelling=Spelling(tokenizer, control),
        loss_on_prompt=data.loss_on == "all",
    )


def encode_prompt(text: str, rules: TokenRules) -> list[int]:
    """Token ids of a prompt that a person wrote, as the model saw such in training: after BOS, and without EOS."""
    return encode_given([Part(text=text, learned=False, control=True)], rules)


def encode_given(parts: Sequence[Part], rules: TokenRules, *, is_chat: bool = False) -> list[int]:
    """Token ids of what is given, as the model saw it in training: BOS where the tokenizer puts one, and no EOS.

    A chat template puts BOS itself, or wants none.
    """
    draft = _Draft.of(parts, where="", rules=rules)
    _encode([draft], rules)
    return draft.ids if is_chat else _framed_start(draft.ids, rules)


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


def encode_examples(batch: Sequence[Example], rules: TokenRules) -> list[Framed]:
    """Each example's token ids, framed.

    Raises:
        UsageError: the tokenizer marks where words begin or end, and the templates have a border within a word.
    """
    drafts = [_Draft.of(example.parts, where=example.where, rules=rules) for example in batch]
    _encode(drafts, rules)
    of_chats = replace(rules, bos=None)
    return [
        _frame(draft.ids, draft.token_ends, of_chats if example.is_chat else rules)
        for example, draft in zip(batch, drafts, strict=True)
    ]


@dataclass(slots=True)
class _Piece:
    """Text between control tokens, within one stretch."""

    text: str
    begins: bool
    """Whether it is the beginning of a text; otherwise it goes on with the text before it."""
    ids: list[int] = field(default_factory=list)


@dataclass(slots=True)
class _Draft:
    """One example: stretches that are given and learned by turns, of which the first is given."""

    where: str
    stretches: list[list[_Piece | ControlToken]]

    @classmethod
    def of(cls, parts: Iterable[Part], *, where: str, rules: TokenRules) -> "_Draft":
        """Split at control tokens; the blanks that these take are left out."""
        stretches: list[list[_Piece | ControlToken]] = []
        before: _Piece | ControlToken | None = None
        for learned, group in groupby(parts, key=lambda part: part.learned):
            if learned and not stretches:
                stretches.append([])
            stretch: list[_Piece | ControlToken] = []
            for item in _items(group, rules.control):
                if isinstance(item, ControlToken):
                    if item.takes_before and stretch and isinstance(stretch[-1], _Piece):
                        stretch[-1].text = stretch[-1].text.rstrip()
                    before = item
                else:
                    behind_control = isinstance(before, ControlToken)
                    text = item.lstrip() if isinstance(before, ControlToken) and before.takes_behind else item
                    if not text:
                        continue
                    begins = before is None or (behind_control and rules.spelling.begins_behind_control)
                    before = _Piece(text, begins)
                stretch.append(before)
            stretches.append(stretch)
        return cls(where, stretches)

    @property
    def ids(self) -> list[int]:
        """All ids, without frame."""
        return [token for stretch in self.stretches for token in _ids(stretch)]

    @property
    def token_ends(self) -> list[int]:
        """Tokens before the end of each stretch."""
        return list(accumulate(len(_ids(stretch)) for stretch in self.stretches))

    def runs(self) -> Iterator[list[_Piece]]:
        """Pieces with nothing but borders between them."""
        items = (item for stretch in self.stretches for item in stretch)
        for is_control, run in groupby(items, key=lambda item: isinstance(item, ControlToken)):
            if not is_control:
                yield [piece for piece in run if isinstance(piece, _Piece)]


def _items(parts: Iterable[Part], control: ControlFinder) -> Iterator[str | ControlToken]:
    """Control tokens, and all that stands between two of them as one text."""
    text = ""
    for may_hold_control, group in groupby(parts, key=lambda part: part.control):
        joined = "".join(part.text for part in group)
        for item in control.split(joined) if may_hold_control else (joined,):
            if isinstance(item, str):
                text += item
                continue
            if text:
                yield text
            yield item
            text = ""
    if text:
        yield text


def _ids(stretch: Iterable[_Piece | ControlToken]) -> list[int]:
    ids: list[int] = []
    for item in stretch:
        ids += (item.id,) if isinstance(item, ControlToken) else item.ids
    return ids


def _encode(drafts: Sequence[_Draft], rules: TokenRules) -> None:
    """Fill in the ids of all pieces."""
    spelling = rules.spelling
    pieces = [item for draft in drafts for stretch in draft.stretches for item in stretch if isinstance(item, _Piece)]
    for begins, encode in ((True, spelling.beginning), (False, spelling.continuing)):
        chosen = [piece for piece in pieces if piece.begins is begins]
        for piece, ids in zip(chosen, encode([piece.text for piece in chosen]), strict=True):
            piece.ids = ids
    _refuse_lost_text(drafts)
    if not spelling.cuts_anywhere:
        _refuse_cut_words(drafts, spelling)


def _refuse_lost_text(drafts: Sequence[_Draft]) -> None:
    """Hold each piece with letters or digits against nothing: a tokenizer may drop, without a word, what it lacks.

    Raises:
        UsageError: no token stands for one.
    """
    for draft in drafts:
        for piece in chain.from_iterable(draft.stretches):
            if isinstance(piece, _Piece) and not piece.ids and any(map(str.isalnum, piece.text)):
                raise UsageError(
                    f"{draft.where}: the base model's tokenizer makes no token of {piece.text[:_SHOWN]!r}: it knows "
                    "none of these characters and leaves them out, or its files are those of another model; choose a "
                    "base whose tokenizer knows them"
                )


def _refuse_cut_words(drafts: Sequence[_Draft], spelling: Spelling) -> None:
    """Hold each border against the text as one: pieces apart must have its ids, or read as it does.

    Raises:
        UsageError: a border changes the text.
    """
    cut = [(draft.where, run) for draft in drafts for run in draft.runs() if len(run) > 1]
    for begins, encode in ((True, spelling.beginning), (False, spelling.continuing)):
        chosen = [(where, run) for where, run in cut if run[0].begins is begins]
        texts = ["".join(piece.text for piece in run) for _, run in chosen]
        for (where, run), whole in zip(chosen, encode(texts), strict=True):
            apart = _ids(run)
            if apart != whole and spelling.read(apart) != spelling.read(whole):
                raise UsageError(_cut_text(where, run))


def _cut_text(where: str, run: Sequence[_Piece]) -> str:
    borders = [f"...{one.text[-_SHOWN:]!r} and {other.text[:_SHOWN]!r}..." for one, other in pairwise(run)]
    return (
        f"{where}: cut between {', or between '.join(borders)}, the text reads otherwise than as one: the base model's "
        "tokenizer marks words, or drops blanks; let data.prompt end with a whole word, and data.completion begin "
        "with a space"
    )


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
