"""Values that remember where they were given: on the command line, or by which variable of the environment."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """One value of a repeatable option."""

    text: str
    source: str
    """The option (`--set`) or the variable (`JOB_SET`), for messages and records."""

    @property
    def key(self) -> str:
        """Of an override `section.key=value`: the key."""
        return self.text.partition("=")[0].strip()


def as_records(overrides: Sequence[Given]) -> list[dict[str, str]]:
    """Each override with its source, and what overruled it if a later one did, for the log and the records."""
    rows = []
    for number, given in enumerate(overrides):
        key, _, value = given.text.partition("=")
        row = {"key": key.strip(), "value": value.strip(), "source": given.source}
        later = [other.source for other in overrides[number + 1 :] if f"{given.key}.".startswith(f"{other.key}.")]
        rows.append(row | ({"overruled_by": later[-1]} if later else {}))
    return rows


def set_lines(overrides: Sequence[Given]) -> list[str]:
    """The same, a line each, for people."""
    return [
        f"{row['key']} = {row['value']}, by {row['source']}"
        + (f", overruled by {row['overruled_by']}" if "overruled_by" in row else "")
        for row in as_records(overrides)
    ]
