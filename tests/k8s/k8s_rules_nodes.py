"""What must hold where several processes, or several pods, work on one run: they are as many as is said, and meet."""

import re
from collections.abc import Iterator
from typing import Any

from k8s_manifests import Document
from k8s_parts import environment, jobs, nodes, of_kind, quantity, trainer

JOB_NAME = "metadata.labels['batch.kubernetes.io/job-name']"
INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
RENDEZVOUS = re.compile(r"\$\((?P<job>\w+)\)-0\.(?P<subdomain>[a-z0-9-]+):(?P<port>\d+)")
"""Pod 0 of the Job as the other pods find it, whatever the Job is called."""


def each_process_has_a_gpu_and_threads_of_its_own(pod: dict[str, Any]) -> Iterator[str]:
    resources, found = trainer(pod)["resources"], environment(pod)
    gpus, processes = str(resources.get("limits", {}).get("nvidia.com/gpu")), found.get("JOB_GPUS", "1")
    if gpus != processes:
        yield f"JOB_GPUS {processes}: the limit of nvidia.com/gpu is {gpus}"
    threads = found.get("OMP_NUM_THREADS")
    cpus = quantity(resources.get("requests", {}).get("cpu", 0))
    if threads is not None and int(threads) * int(processes or 1) != cpus:
        yield f"OMP_NUM_THREADS {threads}, for each of {processes} processes: cpu is {cpus}"
    if int(processes or 1) > 1 and threads is None:
        yield "OMP_NUM_THREADS: each process would take the threads of all"


def variables_are_defined_before_they_are_used(pod: dict[str, Any]) -> Iterator[str]:
    """Kubernetes leaves `$(NAME)` as it stands where NAME is not defined, or only later."""
    known: set[str] = set()
    for each in trainer(pod).get("env", []):
        yield from (f"{each['name']}: $({name}) is not known" for name in _used(each.get("value")) if name not in known)
        known.add(each["name"])


def _used(text: str | None) -> list[str]:
    return re.findall(r"\$\((\w+)\)", text or "")


def pods_of_a_run_are_numbered_and_the_first_one_decides(job: Document) -> Iterator[str]:
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    variables = {each["name"]: each for each in trainer(pod).get("env", [])}
    if nodes(pod) == 1:
        if spec.get("completionMode", "NonIndexed") != "NonIndexed" or {"JOB_RENDEZVOUS", "JOB_NODE_RANK"} & {
            *variables
        }:
            yield "one pod: no index, and nobody to meet"
        return
    if spec.get("completionMode") != "Indexed":
        yield "completionMode is not Indexed: pods have no numbers"
    if _field(variables.get("JOB_NODE_RANK")) != INDEX:
        yield f"JOB_NODE_RANK is not {INDEX}"
    if spec.get("successPolicy") != {"rules": [{"succeededIndexes": "0"}]}:
        yield "successPolicy: the run has ended well when pod 0 has, whatever becomes of the others then"
    if "jobset" not in job and ("backoffLimit" in spec or "backoffLimitPerIndex" not in spec):
        yield "backoffLimit counts the end of each pod, and all pods end at once: backoffLimitPerIndex"
    found = RENDEZVOUS.fullmatch((variables.get("JOB_RENDEZVOUS") or {}).get("value", ""))
    if not found:
        yield "JOB_RENDEZVOUS is not pod 0 of the Job"
    elif _field(variables.get(found["job"])) != JOB_NAME:
        yield f"JOB_RENDEZVOUS: {found['job']} is not {JOB_NAME}"
    elif pod.get("subdomain") != found["subdomain"]:
        yield f"JOB_RENDEZVOUS: the pods' subdomain is {pod.get('subdomain')}"


def _field(variable: dict[str, Any] | None) -> str | None:
    found: str | None = (variable or {}).get("valueFrom", {}).get("fieldRef", {}).get("fieldPath")
    return found


def a_subdomain_has_its_service(documents: list[Document]) -> Iterator[str]:
    services = {each["metadata"]["name"]: each for each in of_kind(documents, "Service")}
    for job in jobs(documents):
        name = job["spec"]["template"]["spec"].get("subdomain")
        if name is None:
            continue
        if "jobset" in job:
            yield from _no_network(job["jobset"].get("network", {}), name)
            continue
        service = services.get(name)
        if service is None:
            yield f"subdomain {name}: there is no such Service"
            continue
        labels, spec = job["spec"]["template"]["metadata"]["labels"], service["spec"]
        if spec.get("clusterIP") != "None":
            yield f"Service {name}: not headless, so pods have no names"
        if spec.get("publishNotReadyAddresses") is not True:
            yield f"Service {name}: pods have no names before they are ready"
        if not spec.get("selector") or not spec["selector"].items() <= labels.items():
            yield f"Service {name}: does not select the pods"


def _no_network(network: dict[str, Any], name: str) -> Iterator[str]:
    if network != {"enableDNSHostnames": True, "publishNotReadyAddresses": True, "subdomain": name}:
        yield f"JobSet: network does not give the pods names below {name} before they are ready"


def where_the_network_is_closed_pods_of_a_run_reach_each_other(documents: list[Document]) -> Iterator[str]:
    policies = [each["spec"] for each in of_kind(documents, "NetworkPolicy")]
    for job in jobs(documents):
        if not policies or nodes(job["spec"]["template"]["spec"]) == 1:
            continue
        labels = job["spec"]["template"]["metadata"]["labels"] | {"batch.kubernetes.io/job-completion-index": "0"}
        mine = [each for each in policies if _selects(each["podSelector"], labels)]
        for way, side in (("ingress", "from"), ("egress", "to")):
            peers = [peer for each in mine for rule in each.get(way, []) if "ports" not in rule for peer in rule[side]]
            if not any(_selects(peer["podSelector"], labels) for peer in peers if set(peer) == {"podSelector"}):
                yield f"NetworkPolicy: {way} of the run's own pods is not open"


def _selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    expressions = selector.get("matchExpressions", [])
    assert all(each["operator"] == "Exists" for each in expressions), "others are not needed here"
    return selector.get("matchLabels", {}).items() <= labels.items() and all(e["key"] in labels for e in expressions)
