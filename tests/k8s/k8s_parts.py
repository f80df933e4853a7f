"""Finds one's way in manifests: the Jobs, their pods, the container that trains, its variables, quantities."""

import re
from decimal import Decimal
from typing import Any

from k8s_manifests import Document

CONTAINER = "trainer"
_FACTORS = {"": Decimal(1), "m": Decimal("0.001")}
_FACTORS |= {suffix: Decimal(1000) ** n for n, suffix in enumerate(("k", "M", "G", "T", "P", "E"), start=1)}
_FACTORS |= {suffix: Decimal(1024) ** n for n, suffix in enumerate(("Ki", "Mi", "Gi", "Ti", "Pi", "Ei"), start=1)}


def of_kind(documents: list[Document], kind: str) -> list[Document]:
    return [document for document in documents if document["kind"] == kind]


def jobs(documents: list[Document]) -> list[Document]:
    """Each Job, and the Job that each CronJob and each JobSet makes."""
    nightly = [each["spec"]["jobTemplate"] for each in of_kind(documents, "CronJob")]
    return of_kind(documents, "Job") + nightly + [_only_job(each) for each in of_kind(documents, "JobSet")]


def _only_job(jobset: Document) -> Document:
    """The Job of a JobSet, with the JobSet's labels, and what the JobSet does about it in `jobset`."""
    (replicated,) = jobset["spec"]["replicatedJobs"]
    assert replicated.get("replicas", 1) == 1, "the pods of a run are one Job's"
    name = f"{jobset['metadata']['name']}-{replicated['name']}-0"
    metadata = {"name": name, "labels": jobset["metadata"].get("labels", {})}
    return {"metadata": metadata, "spec": replicated["template"]["spec"], "jobset": jobset["spec"]}


def job_specs(documents: list[Document]) -> list[dict[str, Any]]:
    return [job["spec"] for job in jobs(documents)]


def job_labels(documents: list[Document]) -> list[dict[str, str]]:
    return [job.get("metadata", {}).get("labels", {}) for job in jobs(documents)]


def pod_specs(documents: list[Document]) -> list[dict[str, Any]]:
    return [spec["template"]["spec"] for spec in job_specs(documents)]


def containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return [*pod.get("initContainers", []), *pod["containers"]]


def trainer(pod: dict[str, Any]) -> dict[str, Any]:
    return next(container for container in pod["containers"] if container["name"] == CONTAINER)


def environment(pod: dict[str, Any]) -> dict[str, str | None]:
    """Name -> value of the trainer's variables; None where it comes from elsewhere."""
    return {each["name"]: each.get("value") for each in trainer(pod).get("env", [])}


def nodes(pod: dict[str, Any]) -> int:
    """On how many nodes the run is, by what the job is given."""
    return int(environment(pod).get("JOB_NODES") or 1)


def quantity(text: str | int) -> Decimal:
    """A Kubernetes quantity as a number."""
    number, suffix = re.fullmatch(r"([0-9.]+)([a-zA-Z]*)", str(text)).groups()
    return Decimal(number) * _FACTORS[suffix]
