"""The schemas of every Kubernetes that the manifests are for, strictly: an unknown field is an error."""

import functools
from typing import Any

import kubernetes_validate
from kubernetes_validate import utils

FLOOR = 31
VERSIONS = [f"1.{minor}" for minor in range(FLOOR, int(kubernetes_validate.latest_version().split(".")[1]) + 1)]

# It reads ten megabytes anew for every document.
utils.schema_contents = functools.cache(utils.schema_contents)


def invalid(document: dict[str, Any], version: str) -> str | None:
    """What is wrong with a document for a version of Kubernetes; None: nothing."""
    try:
        kubernetes_validate.validate(document, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return f"{version}: {document['kind']}: {'.'.join(map(str, error.absolute_path))}: {error.message}"
    except kubernetes_validate.SchemaNotFoundError as error:
        return f"{version}: {error.message}"
    return None
