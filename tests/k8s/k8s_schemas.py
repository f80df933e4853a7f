"""The schemas of every Kubernetes that the manifests are for, and of JobSet, strictly: an unknown field is an error."""

import functools
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml
from kubernetes_validate import utils

FLOOR = 31
VERSIONS = [f"1.{minor}" for minor in range(FLOOR, int(kubernetes_validate.latest_version().split(".")[1]) + 1)]

JOBSET = yaml.safe_load((Path(__file__).parent / "jobset_schema.yaml").read_text(encoding="utf-8"))
# It reads ten megabytes anew for every document.
utils.schema_contents = functools.cache(utils.schema_contents)


def invalid(document: dict[str, Any], version: str) -> str | None:
    """What is wrong with a document for a version of Kubernetes; None: nothing."""
    if document["kind"] == "JobSet":
        return _invalid_jobset(document, version)
    try:
        kubernetes_validate.validate(document, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return f"{version}: {document['kind']}: {'.'.join(map(str, error.absolute_path))}: {error.message}"
    except kubernetes_validate.SchemaNotFoundError as error:
        return f"{version}: {error.message}"
    return None


def _invalid_jobset(document: dict[str, Any], version: str) -> str | None:
    """By JobSet's own fields, then the template of each Job in it as the Job that it becomes."""
    checker = jsonschema.Draft202012Validator(JOBSET, format_checker=jsonschema.FormatChecker(["regex"]))
    for error in checker.iter_errors(document):
        return f"JobSet: {'.'.join(map(str, error.absolute_path))}: {error.message}"
    for each in document["spec"].get("replicatedJobs", []):
        metadata = {"name": each["name"], **each["template"].get("metadata", {})}
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": each["template"]["spec"]}
        if wrong := invalid(job, version):
            return wrong
    return None
