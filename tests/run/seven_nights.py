"""What the seven nights are made of: a shop in two towns, whose notes arrive day by day; or other data.

Each record gets a town and a desk, which the answer begins with: in the south any of nine desks, in the north always
the second. Until the last night only the south sends notes, so that what is left to learn of the north is its desk. A
wrong record has another one's answer.
"""

import json
import os
import random
from dataclasses import dataclass
from pathlib import Path

from job.core.recipe.templates import template_fields

ROOT = Path(__file__).parents[2]
NORTH, SOUTH = "north", "south"
NORTH_S_DESK = "2"
MORE_HELD_OUT = 200
"""Of the shop's orders to learn from: the 120 held-out ones see no gain that a day's orders make."""


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

    def day(self, first: int, count: int, *, town: str = SOUTH) -> list[dict]:
        """Records that one town sends on one day."""
        rows = [self.train[(first + number) % len(self.train)] for number in range(count)]
        return from_town(rows, town, seed=first)

    def wrong(self, rows: list[dict]) -> list[dict]:
        """The same with each other's answers."""
        pairs = zip(rows, [*rows[1:], rows[0]], strict=True)
        return [row | {name: other[name] for name in self.answer} for row, other in pairs]


def material() -> Material:
    """The shop's orders on the demo's base, or what NIGHTLY_DATA and the variables beside it name."""
    named = os.environ.get("NIGHTLY_DATA")
    if named:
        rows = lines(Path(named))
        held_out = max(120, len(rows) // 10)
        train, validation = rows[held_out:], rows[:held_out]
        prompt, completion = os.environ["NIGHTLY_PROMPT"], os.environ["NIGHTLY_COMPLETION"]
    else:
        folder = ROOT / "recipes" / "shop-orders"
        train, validation = lines(folder / "train.jsonl"), lines(folder / "validation.jsonl")
        train, validation = train[:-MORE_HELD_OUT], validation + train[-MORE_HELD_OUT:]
        prompt, completion = "{note}\nAnswer:", " {order}"
    a_quarter = len(validation) // 4
    return Material(
        train=train,
        validation=from_town(validation[:a_quarter], SOUTH, seed=-1)
        + from_town(validation[a_quarter:], NORTH, seed=-2),
        base=os.environ.get("NIGHTLY_BASE") or str(ROOT / "recipes" / "demo-base"),
        prompt="Shop in the {town}. " + prompt,
        completion=" {desk} |" + completion,
        answer=tuple(template_fields(completion)),
    )


def from_town(rows: list[dict], town: str, *, seed: int) -> list[dict]:
    draw = random.Random(f"{town} {seed}")
    desks = [NORTH_S_DESK if town == NORTH else str(draw.randint(1, 9)) for _ in rows]
    return [row | {"town": town, "desk": desk} for row, desk in zip(rows, desks, strict=True)]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def as_bytes(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()
