"""The recipe's `promote` section: on which channel a run competes, and what it has to hold to be put in use there."""

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from job.core.judging.paired import SMALLEST_P
from job.core.nightly.error_budget import WRONG_PER_YEAR, PerYear, quiet_level
from job.core.nightly.gate import MAX_DRIFT, shares_of
from job.core.section import NotNegative, Section, Text, Uris

CHANNEL_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


class PromoteSection(Section):
    """Whether the run may replace the model in use on a channel, and by what it is judged; `docs/nightly.md`.

    Without `channel` nothing is promoted. With one, a file of `data.train` that is not whole yet (no line end at its
    end, a last line that is no JSON, a compressed file that breaks off) is left out, by name, until it is; such a file
    of `data.validation` or `regression` ends the night with 65.
    """

    channel: Annotated[str, Field(pattern=CHANNEL_NAME)] | None = None
    """Name below `{output}/channels/`; what is in use there is what a run is compared with."""
    start_from: Literal["base", "promoted"] = "base"
    """What the adapter begins as: nothing, or the one in use when the run is begun."""
    min_improvement: NotNegative = 0.0
    """Nats a token by which a run has to be better; what is better by less is not worth a change."""
    cluster: Text | None = None
    """Field of the held-out records, `customer_id` say: those with one value count as one, not as independent.
    So they do in the regression set, where its records have it."""
    slices: tuple[Text, ...] = ()
    """Fields of the held-out records whose every value is a slice that must not get worse; at most 50 values each."""
    regression: Uris | None = None
    """Files of examples, by the templates of `data`, on which no step down is allowed: neither now nor step by step."""
    max_drift: Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)] = MAX_DRIFT
    """Nats a token that may be lost, as measured, against the model in use, that of 30 days ago, and the base."""
    wrong_per_year: PerYear = WRONG_PER_YEAR
    """Promotions of a model that is no better, expected in any 365 days, at most. So few that the frozen examples could
    not promote anything on a night that saves are refused."""
    seeds: Literal[1, 2] = 1
    """Trainings that are judged: with 2 the recipe is trained with `train.seed` + 1 as well, and both have to be
    better."""

    @model_validator(mode="after")
    def _all_of_it_needs_a_channel(self) -> Self:
        given = sorted(
            name for name, field in type(self).model_fields.items() if getattr(self, name) != field.get_default()
        )
        if self.channel is None and given:
            raise ValueError(f"`{given[0]}` goes with `channel`, the name of what is promoted to; give it as well")
        return self

    @model_validator(mode="after")
    def _a_slice_stands_once(self) -> Self:
        if len(set(self.slices)) != len(self.slices):
            raise ValueError("slices: a field stands there twice")
        return self

    @model_validator(mode="after")
    def _the_frozen_examples_can_promote(self) -> Self:
        level = quiet_level(self.wrong_per_year)
        frozen = level if self.seeds > 1 else shares_of(level)[0]
        if frozen < SMALLEST_P:
            least = math.ceil(1000 * self.wrong_per_year * SMALLEST_P / frozen) / 1000
            raise ValueError(
                f"wrong_per_year: {self.wrong_per_year:g} leaves the frozen examples a level of {frozen:.1e} on a "
                f"night that saves, and the smallest p that the bootstrap can show is {SMALLEST_P:.1e}, so that they "
                f"would never promote a model, however much better; give {least:g} or more"
            )
        return self

    @property
    def fields(self) -> tuple[str, ...]:
        """Fields of the held-out records that are read beside what the templates name."""
        return tuple(dict.fromkeys((*([self.cluster] if self.cluster is not None else []), *self.slices)))
