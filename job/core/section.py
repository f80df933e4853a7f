"""What a value of a recipe, a record or a report may be: strict kinds with their bounds, and the frozen section."""

import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

Count = Annotated[int, Field(strict=True, gt=0)]
Whole = Annotated[int, Field(strict=True, ge=0)]
Flag = Annotated[bool, Field(strict=True)]
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(strict=True, ge=0, lt=1)]
Seed = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
Text = Annotated[str, Field(min_length=1)]


def _no_credentials(uri: str) -> str:
    # A recipe is copied into run.json and into logs: what stands in it is not secret.
    # The secret half may hold a slash: those of AWS often do.
    if re.match(r"[a-z0-9+.-]+://(?:[^/@]*:[^@]*|[^/@]*)@", uri, re.IGNORECASE):
        raise ValueError("a URI holds no credentials; they come from the default chain (environment, profile, role)")
    return uri


def _decoded(uri: str) -> str:
    # Programs write a blank in a file URI as %20; a path has no such signs, and is never decoded again.
    scheme, separator, path = uri.partition("://")
    try:
        decoded = re.sub(r"(?:%[0-9A-Fa-f]{2})+", lambda signs: bytes.fromhex(signs[0].replace("%", "")).decode(), path)
    except UnicodeDecodeError as error:
        raise ValueError("what % stands for in a file URI is not UTF-8; write the path as it is") from error
    if scheme.lower() != "file" or not separator or not path.startswith("/") or decoded == path:
        return uri
    if "\0" in decoded:
        raise ValueError("a path holds no NUL character")
    return decoded


def _one_or_many(value: object) -> object:
    return (value,) if isinstance(value, str) else value


Uri = Annotated[Text, AfterValidator(_no_credentials), AfterValidator(_decoded)]
Uris = Annotated[
    tuple[Uri, ...],
    Field(min_length=1),
    BeforeValidator(_one_or_many),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1},
                {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1},
            ]
        }
    ),
]


class Section(BaseModel):
    """What every part of a recipe keeps: frozen, and an unknown key is a mistake."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
