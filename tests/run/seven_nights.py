"""What the seven nights are made of: a shop in two towns, whose notes arrive day by day; or other data.

Each record gets a town and a desk, which the answer begins with: in the south any of nine desks, in the north always
the second. Until the last night only the south sends notes, so that what is left to learn of the north is its desk. A
wrong record has another one's answer.

Other data is any JSONL of a thousand records or more that has a question and an answer. Of other data, and of another
base, the base may know so little that every text makes it better, and nothing else of a night would show. So desks are
numbers of many digits there, which everyone learns at once; wrong answers have their words in disorder and backwards
too; and the slice that gets worse does so by its desks: in the end every record of the south names the same one.

`python tests/run/seven_nights.py` says what the nights would be made of, or what is wrong with what was named.
"""

import json
import os
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from job.core.recipe.templates import template_fields

ROOT = Path(__file__).parents[2]
NORTH, SOUTH = "north", "south"
NORTH_S_DESK = "2"
LAST_DESK = "7"
MORE_HELD_OUT = 200
"""Of the shop's orders to learn from: the 120 held-out ones see no gain that a day's orders make."""
LEAST_RECORDS, HELD_OUT = 1000, 320
WORDS_A_DIGIT = 2.5
"""Of an answer: desks long enough that what is learned of them shows beside what is learned of the text."""
KNOWN_FIELDS = (
    ("question", "answer"),
    ("prompt", "completion"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("input", "output"),
)
"""Question and answer, as public data sets name them."""


class UnusableError(ValueError):
    """What DATA, PROMPT and COMPLETION name cannot be made into seven nights."""


@dataclass(frozen=True, kw_only=True)
class Material:
    """Records to learn from and to judge by, the base, and the templates."""

    train: list[dict]
    validation: list[dict]
    base: str
    prompt: str
    completion: str
    answer: tuple[str, ...]
    """Fields of the answer."""
    digits: int = 1
    """Of a desk."""
    is_other: bool = False
    """Whether data or base are not those that ship."""

    def day(self, first: int, count: int, *, town: str = SOUTH) -> list[dict]:
        """Records that one town sends on one day."""
        rows = [self.train[(first + number) % len(self.train)] for number in range(count)]
        return from_town(rows, town, seed=first, digits=self.digits)

    def wrong(self, rows: list[dict]) -> list[dict]:
        """The same with each other's answers; nine of ten are other ones than before, at least."""
        pairs = zip(rows, [*rows[1:], rows[0]], strict=True)
        found = [row | {name: self._wrong(other[name]) for name in self.answer} for row, other in pairs]
        changed = sum(any(new[name] != old[name] for name in self.answer) for new, old in zip(found, rows, strict=True))
        assert changed >= 0.9 * len(rows), f"of {len(rows)} answers {changed} are wrong now: no damage"
        return found

    def _wrong(self, answer: object) -> object:
        if not self.is_other:
            return answer
        words = str(answer).split()
        random.Random(str(answer)).shuffle(words)
        return " ".join(word[::-1] for word in words)

    def late_day(self) -> list[dict]:
        """The records of the south that come in two halves, one after the other."""
        return self._last(1000, 80)

    def last_days(self) -> dict[str, list[dict]]:
        """By name, the files of the last night: it learns the north's desk, and the south gets worse."""
        found = {"day-5": self._last(1080, 120), "day-6": self.day(0, 700, town=NORTH)}
        if not self.is_other:
            return found | {"day-7": self.wrong(self.day(400, 160))}
        # Where some were left as they were, a model could find out from a record's first digits which kind it is.
        return found | {"day-1": self._last(0, 400), "day-2": self._last(400, 200), "day-3": self._last(600, 400)}

    def _last(self, first: int, count: int) -> list[dict]:
        rows = self.day(first, count)
        return [row | {"desk": " ".join(LAST_DESK * self.digits)} for row in rows] if self.is_other else rows


def material() -> Material:
    """The shop's orders on the demo's base, or what NIGHTLY_DATA and the variables beside it name."""
    named = os.environ.get("NIGHTLY_DATA")
    base = os.environ.get("NIGHTLY_BASE") or str(ROOT / "recipes" / "demo-base")
    is_ours = Path(base) == ROOT / "recipes" / "demo-base"
    base = str(Path(base).resolve()) if Path(base).is_dir() else base
    if named:
        return other_material(
            Path(named),
            base,
            prompt=os.environ.get("NIGHTLY_PROMPT") or None,
            completion=os.environ.get("NIGHTLY_COMPLETION") or None,
        )
    folder = ROOT / "recipes" / "shop-orders"
    train, validation = lines(folder / "train.jsonl"), lines(folder / "validation.jsonl")
    return made_of(
        train[:-MORE_HELD_OUT],
        validation + train[-MORE_HELD_OUT:],
        base,
        prompt="{note}\nAnswer:",
        completion=" {order}",
        is_other=not is_ours,
    )


def other_material(path: Path, base: str, *, prompt: str | None = None, completion: str | None = None) -> Material:
    """A JSONL file's; without templates those that its fields call for.

    Raises:
        UnusableError: it has too few records, fields that are not known, or not those that the templates name.
    """
    rows = lines(path)
    if len(rows) < LEAST_RECORDS:
        raise UnusableError(f"DATA={path}: {len(rows)} records, and seven nights need {LEAST_RECORDS}")
    shared = set.intersection(*map(set, rows))
    if prompt is None or completion is None:
        pair = next((pair for pair in KNOWN_FIELDS if shared.issuperset(pair)), None)
        if pair is None:
            raise UnusableError(
                f"DATA={path}: its records share the fields {', '.join(sorted(shared)) or 'none'}, and which of them "
                "is the question and which the answer is not known; give PROMPT='{question}\\nAnswer:' and "
                "COMPLETION=' {answer}' with their names"
            )
        prompt, completion = prompt or f"{{{pair[0]}}}\nAnswer:", completion or f" {{{pair[1]}}}"
    prompt, completion = prompt.replace("\\n", "\n"), completion.replace("\\n", "\n")
    if missing := sorted({*template_fields(prompt), *template_fields(completion)} - shared):
        raise UnusableError(f"DATA={path}: not every record has {', '.join(missing)}, which PROMPT or COMPLETION names")
    if not template_fields(completion):
        raise UnusableError("COMPLETION: it names no field, so no answer could be wrong")
    held_out = min(HELD_OUT, len(rows) // 5)
    return made_of(rows[held_out:], rows[:held_out], base, prompt=prompt, completion=completion, is_other=True)


def made_of(
    train: list[dict],
    validation: list[dict],
    base: str,
    *,
    prompt: str,
    completion: str,
    is_other: bool,
) -> Material:
    answer, a_quarter, digits = template_fields(completion), len(validation) // 4, 1
    if is_other:
        words = mean(len(str(row[name]).split()) for row in train for name in answer)
        digits = max(1, round(words / WORDS_A_DIGIT))
    return Material(
        train=train,
        validation=from_town(validation[:a_quarter], SOUTH, seed=-1, digits=digits)
        + from_town(validation[a_quarter:], NORTH, seed=-2, digits=digits),
        base=base,
        prompt="Shop in the {town}. " + prompt,
        completion=" {desk} |" + completion,
        answer=tuple(answer),
        digits=digits,
        is_other=is_other,
    )


def from_town(rows: list[dict], town: str, *, seed: int, digits: int) -> list[dict]:
    draw = random.Random(f"{town} {seed}")
    desks = [" ".join(NORTH_S_DESK if town == NORTH else str(draw.randint(1, 9)) for _ in range(digits)) for _ in rows]
    return [row | {"town": town, "desk": desk} for row, desk in zip(rows, desks, strict=True)]


def lines(path: Path) -> list[dict]:
    """The file's records.

    Raises:
        UnusableError: it is not there, or holds something else.
    """
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UnusableError(f"DATA={path}: not JSONL ({error})") from error
    if not all(isinstance(row, dict) for row in rows):
        raise UnusableError(f"DATA={path}: not every line is a record, as {{...}}")
    return rows


def as_bytes(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def main() -> None:
    """Say what the nights are made of."""
    try:
        found = material()
    except UnusableError as error:
        sys.exit(str(error))
    sys.stdout.write(
        f"seven nights of {len(found.train)} records, judged on {len(found.validation)}: prompt {found.prompt!r}, "
        f"completion {found.completion!r}, base {found.base}\n"
    )


if __name__ == "__main__":
    main()
