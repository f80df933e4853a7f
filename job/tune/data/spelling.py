"""Text -> token ids in which no control token occurs: as the beginning of a text, and as what goes on with one.

A tokenizer such as Llama 2's puts a space before each text. Behind other text there is nothing to put it before: the
same tokenizer without it is made from its description.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

from job.core.errors import DataError, UsageError
from job.tune.data.control import ControlToken

_PANIC = "PanicException"
"""What a panic in Rust is in Python, by its name, for no module exports it; it is no Exception. Errors of the library
are bare Exceptions."""
_PREFIXES: Mapping[str, Mapping[str, Any]] = {
    "Metaspace": {"prepend_scheme": "never"},
    "ByteLevel": {"add_prefix_space": False},
    "Strip": {"strip_left": False},
}
"""Steps that change how a text begins, and how they are kept from it; `Prepend` does nothing else, and is left out."""
_PROBES = (" a", "a", "x", "0", ".", "\n", "-")
_CUTS_ANYWHERE = frozenset({"BPE", "Unigram"})
"""Models whose tokens are pieces of the text, wherever it is cut; others mark words or the middle of them, ..."""
_MARKS = ("continuing_subword_prefix", "end_of_word_suffix")
"""... as a BPE model does with these."""
_KEEPS_ALL = frozenset({"ByteLevel", "Metaspace", "Split", "Digits", "Punctuation", "UnicodeScripts", "FixedLength"})
"""Pre-tokenizers that drop nothing, unless their behaviour is `Removed`."""
_LETTER_BY_LETTER = frozenset(
    {"Prepend", "Replace", "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Nmt", "Precompiled", "ByteLevel"}
)
"""Normalizers that do not look where a text begins or ends."""


class Spelling:
    """A tokenizer that knows no control token; it can be handed to other processes."""

    def __init__(self, tokenizer: Any, control: Sequence[ControlToken]) -> None:
        """Made from the base's tokenizer.

        Raises:
            UsageError: it is written in Python alone, so there is no description to make it from.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise UsageError(
                f"the base model's tokenizer ({type(tokenizer).__name__}) has no tokenizer.json; load it once as a "
                "fast tokenizer and save_pretrained it into the model folder, or choose another base"
            )
        description = _without_control(json.loads(backend.to_str()), control)
        self._beginning = Tokenizer.from_str(json.dumps(description))
        without_prefix = _without_prefix(description)
        alike = without_prefix == description
        self._continuing = self._beginning if alike else Tokenizer.from_str(json.dumps(without_prefix))
        self.cuts_anywhere = _cuts_anywhere(description)
        """Whether a text may be cut at any character: its pieces, encoded apart, read as the text."""
        self.begins_behind_control = alike or self._begins_behind(control, tokenizer)
        """Whether the tokenizer takes what stands behind a control token for the beginning of a text."""

    def _begins_behind(self, control: Sequence[ControlToken], tokenizer: Any) -> bool:
        """Found out by trying: tokenizers put their space before each stretch of text, or before the first alone."""
        for token in control:
            for probe in _PROBES:
                found = tokenizer(token.text + probe, add_special_tokens=False, split_special_tokens=False).input_ids
                if found[:1] == [token.id] and self.beginning([probe]) != self.continuing([probe]):
                    return bool(found[1:] == self.beginning([probe])[0])
        return True

    def beginning(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each as a text of its own.

        Raises:
            DataError: the tokenizer gives up: an expression in its files takes too long, say.
        """
        return _encode(self._beginning, texts)

    def continuing(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each where text stands before it.

        Raises:
            DataError: as above.
        """
        return _encode(self._continuing, texts)

    def read(self, ids: Sequence[int]) -> str:
        """The text that ids stand for."""
        return str(self._beginning.decode(list(ids), skip_special_tokens=False))


def _encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text, without frame."""
    if not texts:
        return []
    try:
        encoded = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    except BaseException as error:
        if type(error) is Exception or type(error).__name__ == _PANIC:
            raise DataError(
                f"the base model's tokenizer cannot encode the data ({error}); correct its files"
            ) from error
        raise
    return [each.ids for each in encoded]


def _without_control(description: dict[str, Any], control: Sequence[ControlToken]) -> dict[str, Any]:
    """The description of the same tokenizer with control tokens that nobody can write: NUL stands in no record.

    None is taken out, so that every other token keeps its id. What is one letter has no other spelling and stays.
    """
    model: dict[str, Any] = dict(description["model"])
    by_name = isinstance(model["vocab"], dict)
    pairs: Iterable[tuple[str, Any]] = model["vocab"].items() if by_name else model["vocab"]
    letters = {text for text, _ in pairs if len(text) == 1}
    unwritable = {token.text: f"\0{token.id}\0" for token in control if token.text not in letters}
    if by_name:
        model["vocab"] = {unwritable.get(text, text): number for text, number in pairs}
    else:
        model["vocab"] = [[unwritable.get(text, text), score] for text, score in pairs]
    if "merges" in model:
        model["merges"] = [merge for merge in model["merges"] if not _makes(merge, unwritable)]
    if model.get("unk_token") in unwritable:
        model["unk_token"] = unwritable[model["unk_token"]]
    as_letters = letters & {token.text for token in control}
    added = [
        token | {"content": unwritable[token["content"]], "normalized": False}
        if token["content"] in unwritable
        else token
        for token in description["added_tokens"]
        if token["content"] not in as_letters
    ]
    changed = {"model": model, "added_tokens": added, "post_processor": None, "truncation": None, "padding": None}
    return description | changed


def _makes(merge: Any, texts: Mapping[str, str]) -> bool:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left in texts or right in texts or left + right in texts


def _without_prefix(description: dict[str, Any]) -> dict[str, Any]:
    changed = dict(description)
    for name in ("normalizer", "pre_tokenizer"):
        changed[name] = _step_without_prefix(description.get(name))
    return changed


def _step_without_prefix(step: dict[str, Any] | None) -> dict[str, Any] | None:
    """A step of the tokenizer, or a sequence of them, that puts nothing before a text."""
    if step is None or step["type"] == "Prepend":
        return None
    if step["type"] == "Sequence":
        key = "normalizers" if "normalizers" in step else "pretokenizers"
        kept = [each for each in map(_step_without_prefix, step[key]) if each is not None]
        return step | {key: kept}
    without = _PREFIXES.get(step["type"], {})
    return step | {key: value for key, value in without.items() if key in step}


def _cuts_anywhere(description: Mapping[str, Any]) -> bool:
    model = description["model"]
    if model["type"] not in _CUTS_ANYWHERE or any(model.get(mark) for mark in _MARKS):
        return False
    return all(
        step["type"] in _LETTER_BY_LETTER and not _looks_at_the_ends(step)
        for step in _steps(description.get("normalizer"))
    ) and all(
        step["type"] in _KEEPS_ALL and step.get("behavior") != "Removed"
        for step in _steps(description.get("pre_tokenizer"))
    )


def _looks_at_the_ends(step: Mapping[str, Any]) -> bool:
    pattern = step.get("pattern", {}).get("Regex", "")
    return any(mark in pattern for mark in ("^", "$", r"\A", r"\z", r"\Z", r"\b", "(?"))


def _steps(step: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """The steps of a sequence, of sequences in it too."""
    if step is None:
        return
    inner = step.get("normalizers", step.get("pretokenizers"))
    if inner is None:
        yield step
        return
    for each in inner:
        yield from _steps(each)
