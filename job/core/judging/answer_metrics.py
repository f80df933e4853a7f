"""How right an answer is, by the recipe's metric: a score from 0 to 1 for an answer and what it is compared with.

Patterns are of RE2 (Cox 2010, "Regular Expression Matching in the Wild"): the time grows with the text and never with
what is tried, so no answer of a model can hold a run up. ROUGE-L is Lin 2004, "ROUGE: A Package for Automatic
Evaluation of Summaries", section 3, as rouge-score computes it: the F measure of the longest common subsequence.
"""

import json
import unicodedata
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from functools import lru_cache
from itertools import islice
from typing import Any, Literal

MetricName = Literal["exact_match", "pattern", "rouge_l", "json_equal", "contains"]
MOST_WORDS = 1000
"""Of each of the two texts that ROUGE-L compares: it takes time by the product of both."""
_WITHOUT_SPACES = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
"""Scripts that put no spaces between words: each character counts as one."""
_OF_OTHERS = "|".join(rf"[^\P{{{kind}}}{_WITHOUT_SPACES}]" for kind in "LMN")
"""A letter, a mark or a numeral of any other script."""
_WORD = rf"[{_WITHOUT_SPACES}]|(?:{_OF_OTHERS})+"
_NO_JSON = object()


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerMetric:
    """What makes an answer right."""

    name: MetricName = "exact_match"
    pattern: str | None = None
    """Of `pattern`."""
    field: str | None = None
    """The record's field that an answer is compared with; None: the learned answer."""

    def reference(self, text: str) -> str | None:
        """What answers are compared with; None: this text is none that the metric can compare with.

        Args:
            text: the learned answer of the example, or its field.
        """
        text = text.strip()
        match self.name:
            case "pattern":
                found = _found(self.pattern or "", text)
                # A field may hold what the pattern looks for and nothing else.
                return found if found is not None or self.field is None else text or None
            case "json_equal":
                return None if _value(text) is _NO_JSON else text
            case "rouge_l":
                return text if _words(text) else None
            case _:
                return text or None

    def score(self, reference: str, answer: str) -> float:
        """From 0 to 1.

        Args:
            reference: from `reference`.
            answer: the model's.
        """
        answer = answer.strip()
        match self.name:
            case "pattern":
                return float(_found(self.pattern or "", answer) == reference)
            case "json_equal":
                found = _value(answer)
                return float(found is not _NO_JSON and _same(found, _value(reference)))
            case "rouge_l":
                return _rouge_l(reference, answer)
            case "contains":
                return float(reference in answer)
            case _:
                return float(answer == reference)


def why_no_pattern(pattern: str) -> str | None:
    """What is wrong with a pattern; None: nothing."""
    import re2

    try:
        compiled = _compiled(pattern)
    except re2.error as error:
        reason = error.args[0] if error.args else error
        said = reason.decode("utf-8", "replace") if isinstance(reason, bytes) else str(reason)
        return f"RE2 does not take it ({said}): it knows no look-ahead, no look-behind and no back-references"
    except UnicodeEncodeError:
        return "it holds half a surrogate pair, which is no character"
    if compiled.groups > 1:
        return f"it has {compiled.groups} groups; leave one, or none: write (?:...) for the others"
    if compiled.search("") is not None:
        return "it is found in an empty text: every answer would have it"
    return None


@lru_cache(maxsize=64)
def _compiled(pattern: str) -> Any:
    import re2

    options = re2.Options()
    options.log_errors = False
    return re2.compile(pattern, options)


def _found(pattern: str, text: str) -> str | None:
    """What a pattern says of a text: its group, or all of it without one, where it is found first."""
    found = _compiled(pattern).search(text)
    if found is None:
        return None
    said = found.group(found.re.groups)
    return None if said is None or not said.strip() else str(said).strip()


# --- JSON ------------------------------------------------------------------------------------------------------------


def _value(text: str) -> Any:
    """The JSON value that a text is as a whole, its numbers to the last digit; _NO_JSON: it is none."""
    try:
        return json.loads(text, parse_int=Decimal, parse_float=Decimal, parse_constant=_refuse_constant)
    except (ValueError, RecursionError, InvalidOperation):
        return _NO_JSON


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _same(one: Any, other: Any) -> bool:
    """Whether two values are the same: 1 is 1.0 and never true; the order of an object's keys says nothing."""
    pairs = [(one, other)]
    while pairs:
        a, b = pairs.pop()
        if type(a) is not type(b):
            return False
        if isinstance(a, dict):
            if a.keys() != b.keys():
                return False
            pairs += [(a[key], b[key]) for key in a]
        elif isinstance(a, list):
            if len(a) != len(b):
                return False
            pairs += zip(a, b, strict=True)
        elif a != b:
            return False
    return True


# --- ROUGE-L ---------------------------------------------------------------------------------------------------------


def _rouge_l(reference: str, answer: str) -> float:
    return float(_scorer().score(reference, answer)["rougeL"].fmeasure)


class _Words:
    """What rouge-score asks for the words of a text: its own know no letters beyond a to z."""

    def tokenize(self, text: str) -> list[str]:
        return _words(text)


@lru_cache(maxsize=1)
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_Words())


def _words(text: str) -> list[str]:
    """The first words of a text in small letters; of ASCII those of rouge-score itself."""
    # One after the other: a text may have a million.
    found = (str(each.group()) for each in _compiled(_WORD).finditer(text.lower()))
    # Scripts have signs besides, as Thai's ๏.
    return [*islice((word for word in found if unicodedata.category(word[0])[0] in "LMN"), MOST_WORDS)]
