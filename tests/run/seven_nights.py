"""What the seven nights are made of: a shop in two towns, whose notes arrive day by day; or other data.

Each record gets a field `town`. Days are cut from the training records; a wrong record has another one's answer.
"""

import json
import os
import random
from dataclasses import dataclass
from pathlib import Path

from job.core.templates import template_fields

ROOT = Path(__file__).parents[2]
TOWNS = ("north", "south")
SOUTH_SHARE = 0.25


@dataclass(frozen=True, kw_only=True)
class Material:
    """Records to learn from and to judge by, the base, and the templates."""

    train: list[dict]
    validation: list[dict]
    base: str
    prompt: str
    completion: str

    def day(self, first: int, count: int, *, town: str | None = None) -> list[dict]:
        """Records of one day; of one town alone if it is named."""
        rows = self.train if town is None else [row for row in self.train if row["town"] == town]
        return [rows[(first + number) % len(rows)] for number in range(count)]

    def wrong(self, rows: list[dict]) -> list[dict]:
        """The same with each other's answers."""
        answers = template_fields(self.completion)
        shifted = [*rows[1:], rows[0]]
        return [
            row | {name: other[name] for name in answers if name != "town"}
            for row, other in zip(rows, shifted, strict=True)
        ]


def material() -> Material:
    """The shop's orders on the demo's base, or what NIGHTLY_DATA and the variables beside it name."""
    named = os.environ.get("NIGHTLY_DATA")
    if named:
        rows = with_towns(lines(Path(named)))
        held_out = max(80, len(rows) // 10)
        train, validation = rows[held_out:], rows[:held_out]
        prompt, completion = os.environ["NIGHTLY_PROMPT"], os.environ["NIGHTLY_COMPLETION"]
    else:
        folder = ROOT / "recipes" / "shop-orders"
        train, validation = with_towns(lines(folder / "train.jsonl")), with_towns(lines(folder / "validation.jsonl"))
        prompt, completion = "{note}\nAnswer:", " {order}"
    base = os.environ.get("NIGHTLY_BASE") or str(ROOT / "recipes" / "demo-base")
    return Material(
        train=train, validation=validation, base=base, prompt="Shop in the {town}. " + prompt, completion=completion
    )


def with_towns(rows: list[dict]) -> list[dict]:
    draw = random.Random(0)
    return [row | {"town": TOWNS[draw.random() < SOUTH_SHARE]} for row in rows]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def as_bytes(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()
