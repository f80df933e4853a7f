"""What must hold for safety and names: the restricted profile, nothing more open than needed, labels that are taken."""

import re
from collections.abc import Iterator
from typing import Any

from k8s_manifests import ROOT, Document
from k8s_parts import containers, job_specs, of_kind, pod_specs, trainer

POD_VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral"}
POD_VOLUMES |= {"persistentVolumeClaim", "projected", "secret"}
"""All that the restricted profile lets a pod mount."""
LABEL = r"([A-Za-z0-9]([\w.-]{0,61}[A-Za-z0-9])?)?"
NAME = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
KEY = rf"({NAME}(\.{NAME})*/)?[A-Za-z0-9]([\w.-]{{0,61}}[A-Za-z0-9])?"
IMAGE = r"[a-z0-9.:/-]+(:(?!latest$)\w[\w.-]*|@sha256:[0-9a-f]{64})"


def pods_keep_to_the_restricted_profile(pod: dict[str, Any]) -> Iterator[str]:
    yield from (f"{field}: true" for field in ("hostNetwork", "hostPID", "hostIPC") if pod.get(field))
    for volume in pod["volumes"]:
        yield from (f"volume {volume['name']}: {kind}" for kind in volume.keys() - {"name"} - POD_VOLUMES)
    above = pod.get("securityContext", {})
    if "sysctls" in above:
        yield "sysctls"
    for container in containers(pod):
        yield from _open({**above, **container.get("securityContext", {})})
        if any("hostPort" in port for port in container.get("ports", [])):
            yield "hostPort"


def _open(context: dict[str, Any]) -> Iterator[str]:
    if context.get("privileged"):
        yield "privileged"
    if context.get("allowPrivilegeEscalation") is not False:
        yield "allowPrivilegeEscalation is not false"
    capabilities = context.get("capabilities", {})
    if capabilities.get("drop") != ["ALL"] or capabilities.get("add"):
        yield "capabilities: not all of them are dropped"
    if context.get("runAsNonRoot") is not True or context.get("runAsUser") == 0:
        yield "may run as root"
    if context.get("seccompProfile", {}).get("type") not in {"RuntimeDefault", "Localhost"}:
        yield "seccompProfile: neither RuntimeDefault nor Localhost"
    if context.keys() & {"procMount", "seLinuxOptions", "appArmorProfile"}:
        yield "procMount, seLinuxOptions or appArmorProfile"


def no_pod_has_a_token_or_can_change_its_image(pod: dict[str, Any]) -> Iterator[str]:
    if pod.get("automountServiceAccountToken") is not False:
        yield "the pod has a token for the Kubernetes API"
    if pod.get("enableServiceLinks") is not False:
        yield "enableServiceLinks is not false"
    if trainer(pod).get("securityContext", {}).get("readOnlyRootFilesystem") is not True:
        yield "readOnlyRootFilesystem is not true"


def a_node_can_have_what_is_asked_of_it(pod: dict[str, Any]) -> Iterator[str]:
    for key, value in pod.get("nodeSelector", {}).items():
        if not re.fullmatch(KEY, key) or not re.fullmatch(LABEL, value):
            yield f"nodeSelector {key}: {value}: no node can have that label"
    required = "requiredDuringSchedulingIgnoredDuringExecution"
    terms = pod.get("affinity", {}).get("nodeAffinity", {}).get(required, {}).get("nodeSelectorTerms", [])
    for each in (each for term in terms for each in term.get("matchExpressions", [])):
        if (each["operator"] in {"In", "NotIn"}) != bool(each.get("values")):
            yield f"nodeAffinity {each['key']}: {each['operator']} and its values do not agree"


def the_user_is_the_image_s(pod: dict[str, Any]) -> Iterator[str]:
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    user = re.findall(r"^USER (\d+):\1$", dockerfile, re.MULTILINE)[-1]
    context = pod.get("securityContext", {})
    if {context.get(field) for field in ("runAsUser", "runAsGroup", "fsGroup")} != {int(user)}:
        yield f"user, group and fsGroup are not the image's {user}"


def the_image_is_always_the_same(pod: dict[str, Any]) -> Iterator[str]:
    if not re.fullmatch(IMAGE, trainer(pod)["image"]):
        yield "image: neither a tag that stays nor a digest"


def a_recipe_never_changes_under_a_job(documents: list[Document]) -> Iterator[str]:
    for document in of_kind(documents, "ConfigMap"):
        if document.get("immutable") is not True:
            yield f"ConfigMap {document['metadata']['name']}: can be edited while a Job goes by it"


def what_the_server_fills_in_is_written_out(documents: list[Document]) -> Iterator[str]:
    """In fields that have one owner as a whole: a default there is a conflict for server-side apply."""
    for pod in pod_specs(documents):
        sources = [each.get("valueFrom", {}) for container in containers(pod) for each in container.get("env", [])]
        tokens = [s for volume in pod["volumes"] for s in volume.get("projected", {}).get("sources", [])]
        for kind, field in (("resourceFieldRef", "divisor"), ("fieldRef", "apiVersion")):
            yield from (f"{kind}: no {field}" for each in sources if kind in each and field not in each[kind])
        for each in (each["serviceAccountToken"] for each in tokens if "serviceAccountToken" in each):
            if "expirationSeconds" not in each:
                yield "serviceAccountToken: no expirationSeconds"
    for policy in of_kind(documents, "NetworkPolicy"):
        rules = [rule for way in ("ingress", "egress") for rule in policy["spec"].get(way, [])]
        if any("protocol" not in port for rule in rules for port in rule.get("ports", [])):
            yield "NetworkPolicy: a port without protocol"


def service_accounts_give_no_token_away(documents: list[Document]) -> Iterator[str]:
    for document in of_kind(documents, "ServiceAccount"):
        if document.get("automountServiceAccountToken") is not False:
            yield "ServiceAccount: gives its token away"


def objects_carry_names_and_labels_that_the_server_takes(documents: list[Document]) -> Iterator[str]:
    templates = [{**spec["template"]["metadata"], "name": "pod-template"} for spec in job_specs(documents)]
    for metadata in [*(document["metadata"] for document in documents), *templates]:
        name, labels = metadata["name"], metadata.get("labels", {})
        if labels.get("app.kubernetes.io/name") != "qlora-job":
            yield f"{name}: without the label app.kubernetes.io/name"
        wrong = [each for each in labels.values() if not isinstance(each, str) or not re.fullmatch(LABEL, each)]
        yield from (f"{name}: label value {each!r}" for each in wrong)
        annotations = metadata.get("annotations", {}).values()
        yield from (f"{name}: annotation value {each!r}" for each in annotations if not isinstance(each, str))
        if not re.fullmatch(NAME, name):
            yield f"name {name!r}"
        if "namespace" in metadata:
            yield f"{name}: a namespace is set, where kubectl's own decides"
