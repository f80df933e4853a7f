"""The recipe's `data` section: which files, of one or several sources, and how their records become text."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, count
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    WrapSerializer,
    model_validator,
)

from job.core.recipe.templates import answer_field, slots, template_fields
from job.core.section import Flag, Positive, Section, Share, Text, Uris


def _template(value: str) -> str:
    if not template_fields(value):
        raise ValueError("names no field of the record; write at least one {field}")
    return value


Template = Annotated[Text, AfterValidator(_template)]


NAMED_TEMPLATES = ("chatml", "llama3", "gemma", "alpaca")
"""Chat templates that ship."""
OF_CHATS = ("chat_template", "learn", "reasoning", "tools")
"""What goes with `chat` alone."""
_ONE_WAY = "give either `text`, or `prompt` and `completion`, or for chats `chat` (data.chat: messages)"
_OR_EACH_SOURCE = "; or give every source its own, those of `validation` as well"


class Fraction(Section):
    """A share of the training file, held out by a hash of each example."""

    fraction: Annotated[float, Field(strict=True, gt=0, lt=1)]
    """Share of the examples held out; an example stays on its side when the file grows or is reordered."""


class Templates(Section):
    """How a record becomes text."""

    text: Template | None = None
    """Template over the record's fields; the loss is over all of it. Or `prompt` and `completion`."""
    prompt: Template | None = None
    """Template of what the model is given; `{input?}` may be left out, and `[Input: {input?}]` vanishes with it."""
    completion: Template | None = None
    """Template of what the model learns to answer. It must not be empty: such an example is left out."""
    loss_on: Literal["completion", "all"] = "completion"
    """With `prompt` and `completion`: which of them the loss is over. A model graded on its prompt learns prompts."""
    chat: Text | None = None
    """Instead of templates: the field that holds a chat's messages, as a rule `messages` or `conversations`."""
    chat_template: Text | None = None
    """With `chat`: a file beside the recipe, or `chatml`, `llama3`, `gemma`, `alpaca`; else the tokenizer's own."""
    learn: Literal["all-assistant", "last-assistant"] = "all-assistant"
    """With `chat`: which of the assistant's turns the loss is over."""
    reasoning: Literal["keep", "mask", "drop"] = "keep"
    """With `chat`: whether the assistant's reasoning is learned, only given, or left out."""
    tools: Text = "tools"
    """With `chat`: the field that holds the schemas of the tools, in records that have it."""

    @model_validator(mode="after")
    def _at_most_one_way_to_make_text(self) -> Self:
        pair = (self.prompt is not None, self.completion is not None)
        if any(pair) and (self.text is not None or not all(pair)):
            raise ValueError(_ONE_WAY)
        if self.chat is not None and (self.text is not None or any(pair)):
            raise ValueError(_ONE_WAY)
        return self

    @model_validator(mode="after")
    def _options_of_chats_need_one(self) -> Self:
        given = sorted(name for name in OF_CHATS if getattr(self, name) != Templates.model_fields[name].default)
        if given and self.chat is None:
            raise ValueError(f"`{given[0]}` goes with `chat`, the field that holds the messages; give it as well")
        if self.chat is not None and self.loss_on == "all":
            raise ValueError(
                "`loss_on: all` goes with `prompt` and `completion`; of a chat `learn` says what is learned"
            )
        return self

    @property
    def makes_text(self) -> bool:
        """Whether templates are given at all: a source may leave them to `data`."""
        return self.text is not None or self.prompt is not None or self.chat is not None

    @property
    def has_prompt(self) -> bool:
        """Whether an example has a question before what is learned."""
        return self.prompt is not None or self.chat is not None

    @property
    def fields(self) -> tuple[str, ...]:
        """The record fields that the templates name, without repetition."""
        return _named(self.text, self.prompt, self.completion).fields

    @property
    def required(self) -> frozenset[str]:
        """The fields that every record must have."""
        return _named(self.text, self.prompt, self.completion).required

    @property
    def answers(self) -> frozenset[str]:
        """Fields of which the answer is made: those of `completion`; of `text` the last one that must be there."""
        return _named(self.text, self.prompt, self.completion).answers


@dataclass(frozen=True, slots=True, kw_only=True)
class _Named:
    """What templates name, as the properties of `Templates` say."""

    fields: tuple[str, ...]
    required: frozenset[str]
    answers: frozenset[str]


@lru_cache(maxsize=64)  # asked for with each record
def _named(text: str | None, prompt: str | None, completion: str | None) -> _Named:
    every = [slot for template in (text, prompt, completion) if template is not None for slot in slots(template)]
    if completion is not None:
        answers = frozenset(template_fields(completion))
    else:
        answers = frozenset([answer_field(text)] if text is not None else ())
    return _Named(
        fields=tuple(dict.fromkeys(slot.name for slot in every)),
        required=frozenset(slot.name for slot in every if not slot.optional),
        answers=answers,
    )


def _printable(name: str) -> str:
    if not name.isprintable():
        raise ValueError("a name is one line of printable characters")
    return name


class Place(Section):
    """Where one of several sources is, and what it is called."""

    uri: Uris
    """Its files: one URI, a list, a glob or a prefix."""
    name: Annotated[Text, AfterValidator(_printable)] | None = None
    """What report and log call it; without one it is called by the last part of its first URI that has no wildcard."""


class HeldOutSource(Templates, Place):
    """One of several sources: its files, and templates of its own if it has any."""

    @model_validator(mode="after")
    def _options_go_with_templates(self) -> Self:
        left = sorted(
            (self.model_fields_set & Templates.model_fields.keys()) - {"text", "prompt", "completion", "chat"}
        )
        if left and not self.makes_text:
            raise ValueError(f"`{left[0]}` goes with templates of the source's own; give them, or leave it out")
        return self


class Source(HeldOutSource):
    """One of several sources to train on."""

    weight: Positive | None = None
    """Its share of each step's examples, beside the other sources' weights; all sources have one, or none has."""
    epochs: Positive | None = None
    """Passes over it in each of the run's `train.epochs`; 1 where nothing is said. Instead of weights."""

    @model_validator(mode="after")
    def _one_share(self) -> Self:
        if self.weight is not None and self.epochs is not None:
            raise ValueError("give either `weight` or `epochs`")
        return self


def _as_written(source: HeldOutSource, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
    """Without the keys that it does not have, and without what goes with templates if it has none."""
    content = {name: value for name, value in dump(source).items() if value is not None}
    if source.chat is None:
        content = {name: value for name, value in content.items() if name not in OF_CHATS}
    return content if source.makes_text else {k: v for k, v in content.items() if k not in Templates.model_fields}


_AsWritten = WrapSerializer(_as_written)


def _kind_of_sources(value: object) -> str:
    if isinstance(value, (list, tuple)) and any(isinstance(each, (dict, HeldOutSource)) for each in value):
        return "<sources>"
    return "<files>"


class Sources(Section):
    """What is trained and judged on."""

    train: Annotated[
        Annotated[Uris, Tag("<files>")]
        | Annotated[tuple[Annotated[Source, _AsWritten], ...], Field(min_length=1), Tag("<sources>")],
        Discriminator(_kind_of_sources),
    ]
    """`.jsonl`, `.jsonl.gz` or `.jsonl.zst`: one URI, a list, a glob (`*`, `?`, `**`) or a prefix ending in `/`. Or
    several sources, each with its share: a list of sections with the keys below."""
    validation: Annotated[
        Annotated[Uris, Tag("<files>")]
        | Annotated[tuple[Annotated[HeldOutSource, _AsWritten], ...], Field(min_length=1), Tag("<sources>")]
        | Annotated[Fraction, Tag("<fraction>")],
        Discriminator(lambda value: _kind_of_sources(value) if isinstance(value, (str, list, tuple)) else "<fraction>"),
    ] = Fraction(fraction=0.05)
    """Held-out examples: own files, a list of sources, or `{fraction: 0.05}` of every source in `train`."""


class DataSection(Templates, Sources):
    """The dataset: JSON lines, and how a record becomes text."""

    max_length: Annotated[
        Annotated[Literal["auto"], Tag("<auto>")] | Annotated[int, Field(strict=True, ge=8), Tag("<tokens>")],
        Discriminator(lambda value: "<auto>" if isinstance(value, str) else "<tokens>"),
    ] = "auto"
    """Longest example in tokens, BOS and EOS included; `auto` chooses from the lengths and says why."""
    too_long: Literal["truncate", "drop", "fail"] = "truncate"
    """What happens to an example beyond `max_length`; a truncated one gets no EOS, since it did not end there."""
    strict_types: Flag = False
    """Whether a number, `true` or `false` in a field is a wrong line; otherwise it is text, as the record writes it."""
    max_record: Annotated[int, Field(strict=True, gt=0, le=2**26)] = 2**20
    """Longest record in bytes, as its line stands in the file; a longer one is a wrong line."""
    on_bad_record: Literal["fail", "skip"] = "fail"
    """Whether a wrong line ends the job (exit 65) or is left out and reported."""
    bad_record_limit: Share = 0.01
    """With `skip`: the largest share of wrong lines that is still taken for noise; beyond it the job ends (exit 65)."""
    unused_limit: Annotated[float, Field(strict=True, ge=0, le=1)] = 0.2
    """Largest share of examples that may be left out (too long, nothing to learn from, empty); beyond it exit 65."""

    @model_validator(mode="after")
    def _every_record_becomes_text(self) -> Self:
        listed = (*self.train, *self._held_out)
        if not self.makes_text and not all(isinstance(each, HeldOutSource) and each.makes_text for each in listed):
            raise ValueError(_ONE_WAY + (_OR_EACH_SOURCE if isinstance(self.train[0], Source) else ""))
        return self

    @model_validator(mode="after")
    def _sources_are_alike(self) -> Self:
        weights = [each.weight for each in self.train if isinstance(each, Source)]
        if any(weights) and not all(weights):
            raise ValueError("train: give every source a `weight`, or none of them")
        for side in (self.train, self._held_out):
            given = [each.name for each in side if isinstance(each, HeldOutSource) and each.name is not None]
            if len(set(given)) != len(given):
                raise ValueError(f"two sources are called {next(name for name in given if given.count(name) > 1)!r}")
        return self

    @property
    def _held_out(self) -> tuple[str | HeldOutSource, ...]:
        return () if isinstance(self.validation, Fraction) else self.validation

    @property
    def sources(self) -> tuple["DataSource", ...]:
        """What is trained on: one source as a rule, several if `train` lists them."""
        return self._resolved(self.train)

    @property
    def held_out_sources(self) -> tuple["DataSource", ...]:
        """What is judged on; empty when that is a fraction of each source."""
        return self._resolved(self._held_out)

    def _resolved(self, side: tuple[str | HeldOutSource, ...]) -> tuple["DataSource", ...]:
        listed = [each for each in side if isinstance(each, HeldOutSource)]
        if not listed:
            uris = tuple(each for each in side if isinstance(each, str))
            return (DataSource(name=_last_part(uris[0]), uris=uris, data=self),) if uris else ()
        names = _names(listed)
        return tuple(
            DataSource(
                name=name,
                uris=each.uri,
                data=self._with_templates_of(each),
                weight=each.weight if isinstance(each, Source) else None,
                epochs=(each.epochs or 1.0) if isinstance(each, Source) else 1.0,
            )
            for name, each in zip(names, listed, strict=True)
        )

    def _with_templates_of(self, source: HeldOutSource) -> Self:
        if not source.makes_text:
            return self
        return self.model_copy(update={name: getattr(source, name) for name in Templates.model_fields})


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSource:
    """One source as it is read."""

    name: str
    uris: tuple[str, ...]
    data: DataSection
    """How its records are read: the section, with the source's own templates if it has any."""
    weight: float | None = None
    """Share of the examples, beside the other sources' weights; None: it is counted in passes."""
    epochs: float = 1.0
    """Passes over it in one of `train.epochs`."""


def _last_part(uri: str) -> str:
    """`notes` of `s3://data/notes/*.jsonl`: the last part of a URI that is a name."""
    parts = [part for part in uri.rpartition("://")[2].split("/") if part]
    names = [part for part in parts if not set(part) & set("*?[")]
    last = (names or parts or [uri])[-1]
    return "".join(each if each.isprintable() else "?" for each in last)


def _names(sources: Sequence[HeldOutSource]) -> list[str]:
    """Those that are given, and for the others their last part, numbered where it would stand twice."""
    names: list[str] = []
    taken = {each.name for each in sources}
    for each in sources:
        name = each.name
        if name is None:
            last = _last_part(each.uri[0])
            numbered = chain([last], (f"{last}-{number}" for number in count(2)))
            name = next(free for free in numbered if free not in taken)
        taken.add(name)
        names.append(name)
    return names
