"""How many examples are left out of a source, and why: said below a limit, refused beyond it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from job.core.data.records import optional_form
from job.core.errors import DataError
from job.core.recipe.data_section import DataSection, Fraction


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """One side of the data, or one of its sources, and what of it is not learned."""

    side: str
    """What messages call it: `data.train`."""
    data: DataSection
    """How its records are read."""
    examples: int
    """All that there are, those with an empty field included."""
    too_long: int = 0
    """Dropped, as the recipe wants it."""
    without_target: int = 0
    """Nothing of the answer lies within max_length."""
    empty: int = 0
    """A field that must be there is empty."""
    empty_fields: tuple[str, ...] = ()
    """Those of them that are none of the answer."""
    truncated: int = 0
    """Cut at max_length, and learned without their end."""

    @property
    def unused(self) -> int:
        """Examples that are not learned at all."""
        return self.too_long + self.without_target + self.empty

    @property
    def share(self) -> float:
        """Of all that there are."""
        return self.unused / self.examples if self.examples else 0.0

    def __add__(self, other: "LeftOut") -> "LeftOut":
        """Both as one."""
        return LeftOut(
            side=self.side,
            data=self.data,
            examples=self.examples + other.examples,
            too_long=self.too_long + other.too_long,
            without_target=self.without_target + other.without_target,
            empty=self.empty + other.empty,
            empty_fields=tuple(dict.fromkeys((*self.empty_fields, *other.empty_fields))),
            truncated=self.truncated + other.truncated,
        )

    def counts(self, max_length: int) -> str:
        """By reason."""
        counted = {
            f"longer than max_length {max_length}": self.too_long,
            f"with nothing of their answer within max_length {max_length}": self.without_target,
            "with an empty field": self.empty,
        }
        return ", ".join(f"{count:,} {why}" for why, count in counted.items() if count)


def judge_unused(
    train: Sequence[LeftOut], validation: Sequence[LeftOut], *, max_length: int, longest: int, positions: int
) -> list[str]:
    """What a reader should know of the examples that are left out or cut; each source is held to the limit by itself.

    Args:
        train: what is trained on, by source.
        validation: what is judged on; a fraction of the training files is counted with them, for few are drawn.
        max_length: tokens.
        longest: tokens of the longest example.
        positions: how many the base model has.

    Raises:
        DataError: too many are left out.
    """
    if isinstance(train[0].data.validation, Fraction):
        sides = [one + other for one, other in zip(train, validation, strict=True)]
    else:
        sides = [*train, *validation]
    for side in sides:
        limit = side.data.unused_limit
        if side.share > limit:
            raise DataError(
                f"{side.side}: {side.unused:,} of {side.examples:,} examples are left out ({side.share:.1%}), more "
                f"than data.unused_limit ({limit:.1%}) accepts: {side.counts(max_length)}; "
                f"{_remedy(side, longest=longest, positions=positions)}{optional_form(side.data, side.empty_fields)}"
            )
    return [*_left_out(sides, max_length), *_cut(sides, max_length)]


def _left_out(sides: Iterable[LeftOut], max_length: int) -> list[str]:
    return [
        f"{side.side}: {side.unused:,} of {side.examples:,} examples are left out ({side.share:.1%}): "
        f"{side.counts(max_length)}"
        for side in sides
        if side.unused
    ]


def _cut(sides: Sequence[LeftOut], max_length: int) -> list[str]:
    """Few examples that are cut are as they should be; many are an end that is hardly ever learned."""
    return [
        f"{side.side}: {side.truncated:,} of {side.examples:,} examples are cut at max_length {max_length} "
        f"({side.truncated / side.examples:.1%}), and learned without their end: the model may not learn to stop; "
        "raise data.max_length, or set data.too_long: drop"
        for side in sides
        if side.truncated > side.data.unused_limit * side.examples
    ]


def _remedy(side: LeftOut, *, longest: int, positions: int) -> str:
    ways = []
    if side.too_long or side.without_target:
        if longest <= positions:
            ways.append(f"raise data.max_length (the longest example has {longest:,} tokens)")
        else:
            ways.append(f"shorten the examples (the base model has {positions:,} positions)")
    if side.too_long:
        ways.append("set data.too_long: truncate")
    if side.without_target:
        ways.append("shorten the prompts")
    if side.empty:
        ways.append("fill the fields in or take those records out")
    if side.unused < side.examples:
        ways.append(f"raise data.unused_limit (to {_above(side.share):g})")
    return ", or ".join(ways)


def _above(share: float) -> float:
    """The next hundredth."""
    return min(1.0, int(share * 100 + 1) / 100)
