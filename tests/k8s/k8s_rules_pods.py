"""What must hold for what a pod is given: command line, variables, volumes, resources; each is there, and is meant."""

import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

import click
from k8s_manifests import Document
from k8s_parts import containers, environment, of_kind, pod_specs, quantity, trainer

from job.cli import _SECRET_NAME, cli
from job.core.errors import JobError
from job.core.recipe.text import load_recipe

WRITTEN = "/work"
"""Where the image's caches are, whatever JOB_WORKDIR says."""


def the_command_line_is_known(pod: dict[str, Any]) -> Iterator[str]:
    name, *arguments = trainer(pod)["args"]
    if "command" in trainer(pod):
        yield "command: the image's entrypoint with its init is bypassed"
    if name not in cli.commands:
        yield f"args: no command {name}"
        return
    try:
        cli.commands[name].make_parser(click.Context(cli.commands[name])).parse_args(args=arguments)
    except click.UsageError as error:
        yield f"args: {error.message}"


def the_variables_are_known(pod: dict[str, Any]) -> Iterator[str]:
    parameters = [*cli.params, *cli.commands["run"].params]
    options = {option.envvar: option for option in parameters if isinstance(option, click.Option)}
    for variable, value in environment(pod).items():
        if variable.startswith("JOB_") and variable not in options:
            yield f"{variable}: no option of the command line"
        elif variable in options and value is not None:
            try:
                options[variable].type.convert(value, None, None)
            except click.BadParameter as error:
                yield f"{variable}={value}: {error.message}"
    if "JOB_RUN_ID" in environment(pod):
        yield "JOB_RUN_ID is set: the run's identity gives the name"


def the_outcome_is_where_kubernetes_looks_for_it(pod: dict[str, Any]) -> Iterator[str]:
    if environment(pod).get("JOB_OUTCOME_FILE") != trainer(pod).get("terminationMessagePath", "/dev/termination-log"):
        yield "JOB_OUTCOME_FILE is not terminationMessagePath"
    if trainer(pod).get("terminationMessagePolicy") != "FallbackToLogsOnError":
        yield "terminationMessagePolicy: a job that dies without a word leaves no word"


def no_secret_stands_in_the_manifests(documents: list[Document]) -> Iterator[str]:
    for document in of_kind(documents, "Secret"):
        yield f"Secret {document['metadata']['name']}: is made by hand"
    for pod in pod_specs(documents):
        for variable, value in environment(pod).items():
            if value is not None and _SECRET_NAME.search(variable) and not variable.endswith("_FILE"):
                yield f"{variable}: a secret in the open"


def the_recipe_is_right_and_where_the_arguments_say(documents: list[Document]) -> Iterator[str]:
    maps = {document["metadata"]["name"]: document["data"] for document in of_kind(documents, "ConfigMap")}
    for pod in pod_specs(documents):
        path = PurePosixPath(trainer(pod)["args"][1])
        sources = {volume["name"]: volume.get("configMap", {}).get("name") for volume in pod["volumes"]}
        mounts = [m for m in trainer(pod)["volumeMounts"] if PurePosixPath(m["mountPath"]) == path.parent]
        texts = [maps.get(sources.get(mount["name"]), {}).get(path.name) for mount in mounts]
        if len(texts) != 1 or texts[0] is None:
            yield f"{path}: no ConfigMap puts a recipe there"
            continue
        try:
            load_recipe(texts[0], source=str(path))
        except JobError as error:
            yield str(error)


def what_is_named_is_made(documents: list[Document]) -> Iterator[str]:
    made = {(document["kind"], document["metadata"]["name"]) for document in documents}
    for pod in pod_specs(documents):
        named = {("ServiceAccount", pod.get("serviceAccountName"))}
        named |= {("ConfigMap", volume["configMap"]["name"]) for volume in pod["volumes"] if "configMap" in volume}
        claims = [volume["persistentVolumeClaim"] for volume in pod["volumes"] if "persistentVolumeClaim" in volume]
        named |= {("PersistentVolumeClaim", claim["claimName"]) for claim in claims}
        yield from (f"{kind} {name}: none is made" for kind, name in named - made)


def volumes_and_mounts_agree(pod: dict[str, Any]) -> Iterator[str]:
    mounts = [mount for container in containers(pod) for mount in container.get("volumeMounts", [])]
    for name in {mount["name"] for mount in mounts} ^ {volume["name"] for volume in pod["volumes"]}:
        yield f"volume {name}: mounted and defined do not agree"
    paths = [mount["mountPath"] for mount in trainer(pod)["volumeMounts"]]
    if len(paths) != len(set(paths)):
        yield "two volumes at one path"


def what_is_written_lands_on_a_volume(pod: dict[str, Any]) -> Iterator[str]:
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {PurePosixPath(mount["mountPath"]): mount for mount in trainer(pod)["volumeMounts"]}
    for path in map(PurePosixPath, sorted({WRITTEN, environment(pod).get("JOB_WORKDIR") or WRITTEN})):
        mount = next((mounts[each] for each in (path, *path.parents) if each in mounts), None)
        if mount is None or mount.get("readOnly") or "emptyDir" not in volumes.get(mount["name"], {}):
            yield f"{path}: no volume that can be written"
    shared = mounts.get(PurePosixPath("/dev/shm"), {}).get("name")
    if volumes.get(shared, {}).get("emptyDir", {}).get("medium") != "Memory":
        yield "/dev/shm: no memory there but the container's 64 MiB"


def requests_and_limits_agree(pod: dict[str, Any]) -> Iterator[str]:
    requests, limits = (trainer(pod)["resources"].get(kind, {}) for kind in ("requests", "limits"))
    for name in requests.keys() & limits.keys():
        if quantity(requests[name]) > quantity(limits[name]):
            yield f"{name}: the request is above the limit"
    for name in ("memory", "ephemeral-storage"):
        if name not in requests or requests[name] != limits.get(name):
            yield f"{name}: the request is not the limit"
    if "cpu" not in requests:
        yield "cpu: no request"
    gpus = limits.get("nvidia.com/gpu", "none")
    if not re.fullmatch(r"[1-9]\d*", str(gpus)):
        yield "nvidia.com/gpu: a limit in whole numbers"
    if requests.get("nvidia.com/gpu", gpus) != gpus:
        yield "nvidia.com/gpu: the request is not the limit"


def volumes_fit_into_the_limits(pod: dict[str, Any]) -> Iterator[str]:
    directories = [volume["emptyDir"] for volume in pod["volumes"] if "emptyDir" in volume]
    for medium, name in (("Memory", "memory"), ("", "ephemeral-storage")):
        sizes = [quantity(each.get("sizeLimit", "1Ei")) for each in directories if each.get("medium", "") == medium]
        if sum(sizes) >= quantity(trainer(pod)["resources"]["limits"].get(name, 0)):
            yield f"{name}: less than the emptyDir volumes may hold"
