"""What run.json holds, checked before anything is done by it: it stands where others can write."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from job.core.section import Section, Text, Whole

RECORD_VERSION: Literal[1] = 1


class RecordedObject(Section):
    """One object of the data, as it was when the run began."""

    uri: Text
    etag: Text
    version: str | None
    size: Whole
    source: Whole = 0
    """Place of its source in the recipe's list."""


class RecordedData(Section):
    """The frozen list of objects."""

    train: tuple[RecordedObject, ...] = Field(min_length=1)
    validation: tuple[RecordedObject, ...]
    """Empty when validation is a fraction of the training files."""

    @model_validator(mode="after")
    def _are_distinct(self) -> Self:
        for side in (self.train, self.validation):
            if len({(o.source, o.uri) for o in side}) != len(side):
                raise ValueError("an object stands there twice")
        return self


class RecordedParent(Section):
    """The adapter that a run started from."""

    run_id: Text
    sequence: Whole
    """Of the channel's entry that put it in use."""
    weights: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    """sha256 of its adapter_model.safetensors."""


class RunRecord(Section):
    """What a run is."""

    version: Literal[1]
    run_id: str
    recipe: dict[str, Any]
    """What of the recipe can change the result."""
    base: dict[str, Any]
    data: RecordedData
    parent: RecordedParent | None = None
    """None: it started from the base."""


def read_run_record(content: dict[str, Any]) -> RunRecord:
    """The record that a JSON object is.

    Raises:
        ValueError: it is none, with the first value that is wrong.
    """
    try:
        return RunRecord.model_validate(content)
    except ValidationError as error:
        raise ValueError(first_mistake(error)) from error


def recorded_objects(content: dict[str, Any]) -> tuple[RecordedObject, ...]:
    """The objects of both sides, for people; none of a record that is not ours."""
    try:
        data = read_run_record(content).data
    except ValueError:
        return ()
    return (*data.train, *data.validation)


def first_mistake(error: ValidationError) -> str:
    """Where the first value that is wrong stands, and why; not the value, which may be anything."""
    (first, *_) = error.errors(include_url=False, include_input=False, include_context=False)
    where = ".".join(f"{part:.40}" if isinstance(part, str) else str(part) for part in first["loc"])
    return f"{where}: {first['msg'].removeprefix('Value error, ')}"
