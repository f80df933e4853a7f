"""One planted error of each kind is seen: by the schemas, or by our own rules."""

import copy
import re
from functools import reduce

import pytest
import yaml
from k8s_manifests import documents, overlay, standalone
from k8s_parts import of_kind
from k8s_rules import RULES, complaints, heard
from k8s_schemas import VERSIONS, invalid

POD = "spec.template.spec"
TRAINER = f"{POD}.containers.0"
POLICY = "spec.podFailurePolicy.rules"
CODES = f"{POLICY}.1.onExitCodes.values"
GONE = object()


def planted(base, kind, path, value):
    """The documents with one value replaced, added or gone; a function makes the new value of the old."""
    spoilt = copy.deepcopy(base)
    *way, last = steps(path)
    there = reduce(lambda node, part: node[part], way, of_kind(spoilt, kind)[0])
    if value is GONE:
        del there[last]
    elif callable(value):
        there[last] = value(there[last])
    else:
        there[last] = value
    return spoilt


def steps(path):
    """`a.0.b\\.c` as the keys and places that it leads through; a backslash stands before a point in a key."""
    parts = [part.replace("\\.", ".") for part in re.split(r"(?<!\\)\.", path)]
    return [int(part) if part.isdigit() else part for part in parts]


def without(name):
    return lambda variables: [each for each in variables if each["name"] != name]


def variable(name, value):
    return lambda variables: [*without(name)(variables), {"name": name, "value": value}]


def source(name, kind, **fields):
    return plus({"name": name, "valueFrom": {kind: fields}})


TOKEN = {"serviceAccountToken": {"path": "token", "audience": "x"}}


def plus(*more):
    return lambda items: [*items, *more]


def affinity(operator, *values):
    terms = [{"matchExpressions": [{"key": "nvidia.com/gpu.product", "operator": operator, "values": list(values)}]}]
    return {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}}


def shown(each):
    """A name for a case that is the same in each process: functions and GONE have none of their own."""
    if each is GONE:
        return "gone"
    return "changed" if callable(each) else str(each)[:40]


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("spec.restartPolicy", "Never", "restartPolicy"),  # misplaced
        (f"{POD}.gracePeriodSeconds", 300, "gracePeriodSeconds"),  # no such field
        ("spec.backoffLimit", "3", "'3'"),  # a text for a number
        (f"{TRAINER}.env.0.value", 1, "1 is not of type"),  # a number for a text
        (f"{TRAINER}.args", "run", "args"),
        (f"{POD}.containers", GONE, "containers"),
        (f"{POLICY}.0.onPodConditions.0.type", GONE, "type"),
        ("apiVersion", "batch/v2", "Couldn't find schema"),
    ],
)
@pytest.mark.parametrize("version", [VERSIONS[0], VERSIONS[-1]])
def test_what_no_schema_has_is_seen(path, value, told, version):
    job = of_kind(planted(standalone(), "Job", path, value), "Job")[0]

    assert told in invalid(job, version)


def test_a_field_that_is_newer_than_the_floor_is_seen():
    rules = [{"action": "Restart", "exitCodes": {"operator": "In", "values": [83]}}]
    job = of_kind(planted(standalone(), "Job", f"{TRAINER}.restartPolicyRules", rules), "Job")[0]

    assert "restartPolicyRules" in invalid(job, VERSIONS[0])
    assert invalid(job, VERSIONS[-1]) is None


JOB_ERRORS = [
    # exit codes
    (CODES, [64, 65, 66, 77, 78, 80, 81], "exit code 84: Count"),
    (CODES, [64, 65, 66, 75, 77, 78, 80, 81, 84], "exit code 75: FailJob"),
    (CODES, [64, 65, 66, 69, 77, 78, 80, 81, 84], "exit code 69: FailJob"),
    (f"{POLICY}.2.onExitCodes.values", [75, 82], "exit code 82: Ignore"),
    (POLICY, lambda rules: rules[:2], "exit code 75: Count"),
    (POLICY, lambda rules: rules[1:], "a pod that is evicted and ends 65 is not ignored"),
    (f"{POLICY}.0.onPodConditions.0.type", "PodScheduled", "evicted"),
    (f"{POLICY}.1.onExitCodes.operator", "NotIn", "exit code 137"),
    (f"{POLICY}.3.onExitCodes.values", [69, 70, 74, 82, 83, 137], "not all of them are codes of ours"),
    # what the server refuses
    (f"{POD}.restartPolicy", "OnFailure", "restartPolicy Never"),
    (POLICY, [], "between 1 and 20 rules"),
    (CODES, [65, 64, 66, 77, 78, 80, 81, 84], "sorted"),
    (CODES, [64, 64, 65, 66, 77, 78, 80, 81, 84], "each once"),
    (CODES, [0, 64, 65, 66, 77, 78, 80, 81, 84], "no 0 with In"),
    (f"{POLICY}.1.onExitCodes.containerName", "main", "no such container"),
    (f"{POLICY}.1.onPodConditions", [], "either onExitCodes or onPodConditions"),
    (f"{POLICY}.0.onPodConditions.0.status", GONE, "without status"),
    ("spec.podReplacementPolicy", "TerminatingOrFailed", "two pods could work at once"),
    # time
    (f"{POD}.terminationGracePeriodSeconds", 60, "JOB_GRACE_SECONDS is 300"),
    (f"{POD}.terminationGracePeriodSeconds", GONE, "terminationGracePeriodSeconds is 30"),
    (f"{POD}.terminationGracePeriodSeconds", 0, "less than the job needs to save"),
    (f"{TRAINER}.env", without("JOB_GRACE_SECONDS"), "JOB_GRACE_SECONDS is None"),
    ("spec.activeDeadlineSeconds", GONE, "no activeDeadlineSeconds"),
    ("spec.backoffLimit", GONE, "no backoffLimit"),
    ("spec.completions", 2, "one run"),
    ("spec.suspend", True, "waits for ever"),
    # selectors
    ("spec.selector", {"matchLabels": {"app": "x"}}, "selector is set"),
    ("metadata.labels.app\\.kubernetes\\.io/component", "evaluation", "the pods do not have those of their Job"),
    (f"{POD}.nodeSelector.kubernetes\\.io/arch", "amd 64", "no node can have that label"),
    (f"{POD}.affinity", affinity("In"), "In and its values do not agree"),
    ("spec.ttlSecondsAfterFinished", GONE, "no ttlSecondsAfterFinished"),
    # the command line
    (f"{TRAINER}.args", ["train", "/recipe/recipe.yaml"], "no command train"),
    (f"{TRAINER}.args", ["run", "/recipe/recipe.yaml", "--lr", "1"], "--lr"),
    (f"{TRAINER}.args", ["run", "/recipe/other.yaml"], "no ConfigMap puts a recipe there"),
    (f"{TRAINER}.command", ["python"], "entrypoint"),
    (f"{TRAINER}.env", variable("JOB_GRACE", "300"), "JOB_GRACE: no option"),
    (f"{TRAINER}.env", variable("JOB_DEVICE", "gpu"), "JOB_DEVICE=gpu"),
    (f"{TRAINER}.env", variable("JOB_RUN_ID", "notes"), "JOB_RUN_ID is set"),
    (f"{TRAINER}.env", variable("JOB_OUTCOME_FILE", "/work/o.json"), "is not terminationMessagePath"),
    (f"{TRAINER}.terminationMessagePolicy", GONE, "terminationMessagePolicy"),
    (f"{TRAINER}.env", variable("HF_TOKEN", "hf_x"), "a secret in the open"),
    (f"{TRAINER}.env", source("A", "resourceFieldRef", resource="limits.memory"), "no divisor"),
    (f"{TRAINER}.env", source("A", "fieldRef", fieldPath="spec.nodeName"), "no apiVersion"),
    (f"{POD}.volumes", plus({"name": "t", "projected": {"sources": [TOKEN]}}), "no expirationSeconds"),
    # what is named
    (f"{POD}.serviceAccountName", "default", "ServiceAccount default: none is made"),
    (f"{POD}.volumes.0.configMap.name", "recipe", "ConfigMap recipe: none is made"),
    (f"{TRAINER}.volumeMounts", lambda mounts: mounts[:-1], "volume shm"),
    (f"{TRAINER}.volumeMounts", plus({"name": "cache", "mountPath": "/cache"}), "volume cache"),
    (f"{TRAINER}.volumeMounts", plus({"name": "shm", "mountPath": "/work"}), "two volumes at one path"),
    (f"{POD}.volumes", plus({"name": "m", "persistentVolumeClaim": {"claimName": "m"}}), "PersistentVolumeClaim m"),
    (f"{TRAINER}.volumeMounts.1.mountPath", "/data", "/work: no volume that can be written"),
    (f"{TRAINER}.volumeMounts.1.readOnly", True, "/work: no volume that can be written"),
    (f"{TRAINER}.env", variable("JOB_WORKDIR", "/scratch"), "/scratch: no volume that can be written"),
    (f"{POD}.volumes.2.emptyDir", {}, "/dev/shm"),
    # resources
    (f"{TRAINER}.resources.requests.memory", "32Gi", "the request is above the limit"),
    (f"{TRAINER}.resources.requests.memory", "8Gi", "memory: the request is not the limit"),
    (f"{TRAINER}.resources.limits.nvidia\\.com/gpu", "0.5", "whole numbers"),
    (f"{TRAINER}.resources.limits.nvidia\\.com/gpu", GONE, "whole numbers"),
    (f"{TRAINER}.resources.requests.nvidia\\.com/gpu", 2, "above the limit"),
    (f"{TRAINER}.resources.requests.cpu", GONE, "cpu: no request"),
    (f"{TRAINER}.resources.limits.ephemeral-storage", GONE, "ephemeral-storage: the request is not the limit"),
    (f"{POD}.volumes.1.emptyDir", {}, "less than the emptyDir volumes may hold"),
    (f"{POD}.volumes.2.emptyDir.sizeLimit", "64Gi", "memory: less than the emptyDir"),
    # the restricted profile
    (f"{TRAINER}.securityContext", GONE, "allowPrivilegeEscalation"),
    (f"{TRAINER}.securityContext.allowPrivilegeEscalation", True, "allowPrivilegeEscalation"),
    (f"{TRAINER}.securityContext.privileged", True, "privileged"),
    (f"{TRAINER}.securityContext.capabilities", {"drop": ["NET_RAW"]}, "capabilities"),
    (f"{TRAINER}.securityContext.capabilities.add", ["SYS_ADMIN"], "capabilities"),
    (f"{TRAINER}.securityContext.procMount", "Unmasked", "procMount"),
    (f"{TRAINER}.securityContext.runAsNonRoot", False, "may run as root"),
    (f"{POD}.securityContext.runAsNonRoot", GONE, "may run as root"),
    (f"{POD}.securityContext.runAsUser", 0, "may run as root"),
    (f"{POD}.securityContext.seccompProfile.type", "Unconfined", "seccompProfile"),
    (f"{POD}.securityContext.sysctls", [], "sysctls"),
    (f"{POD}.hostNetwork", True, "hostNetwork"),
    (f"{TRAINER}.ports", [{"containerPort": 1, "hostPort": 1}], "hostPort"),
    (f"{POD}.volumes", plus({"name": "host", "hostPath": {"path": "/"}}), "hostPath"),
    (f"{POD}.initContainers", [{"name": "i", "image": "i:1"}], "allowPrivilegeEscalation"),
    # beyond it
    (f"{TRAINER}.securityContext.readOnlyRootFilesystem", GONE, "readOnlyRootFilesystem"),
    (f"{POD}.automountServiceAccountToken", GONE, "token for the Kubernetes API"),
    (f"{POD}.enableServiceLinks", GONE, "enableServiceLinks"),
    (f"{POD}.securityContext.runAsUser", 1000, "not the image's 10001"),
    (f"{POD}.securityContext.fsGroup", GONE, "not the image's 10001"),
    # names and labels
    ("metadata.name", "My_Job", "name 'My_Job'"),
    ("metadata.namespace", "ml", "namespace"),
    ("spec.template.metadata.labels", {}, "pod-template: without the label"),
    ("metadata.labels.team", "a team", "label value 'a team'"),
    ("spec.template.metadata.annotations.x", True, "annotation value True"),
    (f"{TRAINER}.image", "registry.example.com/qlora-job", "neither a tag that stays"),
    (f"{TRAINER}.image", "registry.example.com/qlora-job:latest", "neither a tag that stays"),
]


@pytest.mark.parametrize(("path", "value", "told"), JOB_ERRORS, ids=shown)
def test_an_error_in_the_job_is_seen(path, value, told):
    wrong = complaints(planted(standalone(), "Job", path, value))

    assert [each for each in wrong if told in each], wrong


OTHER_ERRORS = [
    ("ConfigMap", "data", {"recipe.yaml": "output: 5\n"}, "model"),
    ("ConfigMap", "data", {"other.yaml": ""}, "no ConfigMap puts a recipe there"),
    ("ConfigMap", "metadata.name", "other", "none is made"),
    ("ConfigMap", "immutable", GONE, "can be edited while a Job goes by it"),
    ("ConfigMap", "immutable", False, "can be edited while a Job goes by it"),
    ("ServiceAccount", "automountServiceAccountToken", GONE, "gives its token away"),
    ("ServiceAccount", "metadata.name", "other", "ServiceAccount qlora-job: none is made"),
]


def test_a_port_of_a_network_policy_that_the_server_would_complete_is_seen():
    wrong = complaints(planted(overlay("nightly"), "NetworkPolicy", "spec.egress.1.ports.0.protocol", GONE))

    assert wrong == ["NetworkPolicy: a port without protocol"]


@pytest.mark.parametrize(("kind", "path", "value", "told"), OTHER_ERRORS, ids=shown)
def test_an_error_beside_the_job_is_seen(kind, path, value, told):
    wrong = complaints(planted(standalone(), kind, path, value))

    assert [each for each in wrong if told in each], wrong


NIGHTLY_ERRORS = [
    ("spec.concurrencyPolicy", "Allow", "concurrencyPolicy"),
    ("spec.startingDeadlineSeconds", GONE, "startingDeadlineSeconds"),
    ("spec.startingDeadlineSeconds", 5, "at least 10"),
    ("spec.schedule", "*/30 * * * *", "less than the schedule's 1800 s"),
    ("spec.timeZone", GONE, "timeZone"),
    ("spec.jobTemplate.spec.activeDeadlineSeconds", 172800, "the next comes after 86400 s"),
    ("spec.jobTemplate.spec.activeDeadlineSeconds", 82800, "the next comes after 86400 s"),
    ("spec.schedule", "17 2,14 * * *", "the next comes after 43200 s"),
    ("spec.jobTemplate.spec.activeDeadlineSeconds", GONE, "no activeDeadlineSeconds"),
    ("spec.successfulJobsHistoryLimit", GONE, "successfulJobsHistoryLimit"),
    ("spec.failedJobsHistoryLimit", 0, "failedJobsHistoryLimit"),
    ("spec.jobTemplate.spec.ttlSecondsAfterFinished", 60, "ttlSecondsAfterFinished"),
    ("metadata.name", "n" * 53, "longer than 52"),
    (f"spec.jobTemplate.{POD}.restartPolicy", "OnFailure", "restartPolicy Never"),
]


@pytest.mark.parametrize(("path", "value", "told"), NIGHTLY_ERRORS, ids=shown)
def test_an_error_in_the_cronjob_is_seen(path, value, told):
    wrong = complaints(planted(overlay("nightly"), "CronJob", path, value))

    assert [each for each in wrong if told in each], wrong


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("spec.activeDeadlineSeconds", 60, "begins anew"),
        ("metadata.labels.kueue\\.x-k8s\\.io/max-exec-time-seconds", GONE, "max-exec-time-seconds"),
    ],
)
def test_an_error_in_a_job_of_kueue_is_seen(path, value, told):
    wrong = complaints(planted(overlay("kueue"), "Job", path, value))

    assert [each for each in wrong if told in each], wrong


NODES_ERRORS = [
    ("Job", "spec.completions", 3, "the nodes of one run"),
    ("Job", "spec.parallelism", 1, "the nodes of one run"),
    ("Job", "spec.completionMode", GONE, "pods have no numbers"),
    ("Job", "spec.successPolicy", GONE, "when pod 0 has"),
    ("Job", "spec.successPolicy.rules.0.succeededIndexes", "0-1", "when pod 0 has"),
    ("Job", "spec.backoffLimit", 3, "backoffLimit counts the end of each pod"),
    ("Job", "spec.maxFailedIndexes", GONE, "no backoffLimit"),
    ("Job", f"{POD}.subdomain", GONE, "the pods' subdomain is None"),
    ("Job", f"{POD}.subdomain", "other", "subdomain other: there is no such Service"),
    ("Job", f"{TRAINER}.env", without("JOB_NODES"), "one pod: no index"),
    ("Job", f"{TRAINER}.env", variable("JOB_NODE_RANK", "0"), "JOB_NODE_RANK is not"),
    ("Job", f"{TRAINER}.env", variable("JOB_RENDEZVOUS", "qlora-job-0.qlora-job:29500"), "not pod 0 of the Job"),
    ("Job", f"{TRAINER}.env", variable("POD_JOB", "qlora-job"), "$(POD_JOB) is not known"),
    ("Job", f"{TRAINER}.env", variable("JOB_GPUS", "4"), "JOB_GPUS 4"),
    ("Job", f"{TRAINER}.env", without("JOB_GPUS"), "JOB_GPUS 1"),
    ("Job", f"{TRAINER}.env", variable("OMP_NUM_THREADS", "16"), "OMP_NUM_THREADS 16, for each of 8"),
    ("Job", f"{TRAINER}.env", source("OMP_NUM_THREADS", "resourceFieldRef"), "no divisor"),
    ("Job", f"{TRAINER}.resources.requests.cpu", "8", "cpu is 8"),
    ("Service", "spec.clusterIP", GONE, "not headless"),
    ("Service", "spec.publishNotReadyAddresses", GONE, "no names before they are ready"),
    ("Service", "spec.selector.x", "y", "does not select the pods"),
    ("Service", "metadata.name", "other", "there is no such Service"),
]


@pytest.mark.parametrize(("kind", "path", "value", "told"), NODES_ERRORS, ids=shown)
def test_an_error_in_a_job_of_several_pods_is_seen(kind, path, value, told):
    wrong = complaints(planted(overlay("multi-node"), kind, path, value))

    assert [each for each in wrong if told in each], wrong


@pytest.mark.parametrize("path", ["ingress", "egress", "podSelector.matchLabels.x"])
def test_a_network_policy_that_keeps_the_pods_of_a_run_apart_is_seen(path):
    spoilt = planted(overlay("multi-node")[::-1], "NetworkPolicy", f"spec.{path}", "y" if "." in path else GONE)
    wrong = complaints(spoilt)

    assert [each for each in wrong if "of the run's own pods is not open" in each], wrong


CHILD = "spec.replicatedJobs.0.template.spec"
JOBSET_RULES = "spec.failurePolicy.rules"
JOBSET_ERRORS = [
    (f"{JOBSET_RULES}.0.onJobFailureMessagePatterns", ["rule at index 0$"], "exit code 75: FailJob"),
    (f"{JOBSET_RULES}.0.onJobFailureMessagePatterns", GONE, "exit code 64: Ignore"),
    (JOBSET_RULES, lambda rules: rules[1:], "exit code 75: FailJob"),
    (JOBSET_RULES, lambda rules: rules[:1], "exit code 64: Count"),
    (f"{JOBSET_RULES}.1.onJobFailureReasons", ["PodFailurePolicy"], "activeDeadlineSeconds bounds nothing"),
    ("spec.failurePolicy.maxRestarts", GONE, "no maxRestarts"),
    (f"{CHILD}.podFailurePolicy.rules.0.action", "Ignore", "a pod that is evicted and ends 65 is not ignored"),
    (f"{CHILD}.podFailurePolicy.rules.2.action", "Ignore", "the Job makes a pod anew, alone"),
    (f"{CHILD}.backoffLimit", 3, "the Job makes a pod anew, alone"),
    (f"{CHILD}.completions", 3, "the nodes of one run"),
    (f"{CHILD}.template.spec.terminationGracePeriodSeconds", 60, "JOB_GRACE_SECONDS is 300"),
    ("spec.network.publishNotReadyAddresses", GONE, "network does not give the pods names"),
    ("spec.network.subdomain", "other", "network does not give the pods names"),
    ("spec.ttlSecondsAfterFinished", GONE, "no ttlSecondsAfterFinished"),
    ("metadata.labels.team", "a", "the pods do not have those of their Job"),
]


@pytest.mark.parametrize(("path", "value", "told"), JOBSET_ERRORS, ids=shown)
def test_an_error_in_a_jobset_is_seen(path, value, told):
    wrong = complaints(planted(overlay("jobset"), "JobSet", path, value))

    assert [each for each in wrong if told in each], wrong


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("spec.replicas", 2, "'replicas' was unexpected"),
        ("spec.failurePolicy.maxRestarts", "3", "'3' is not of type"),
        (f"{JOBSET_RULES}.0.action", "Restart", "'Restart' is not one of"),
        (f"{JOBSET_RULES}.0.name", GONE, "'name' is a required property"),
        (f"{JOBSET_RULES}.0.name", "goes-on", "does not match"),
        (f"{JOBSET_RULES}.0.onJobFailureReasons", ["Evicted"], "'Evicted' is not one of"),
        (f"{JOBSET_RULES}.0.onJobFailureMessagePatterns", ["["], "is not a 'regex'"),
        ("spec.network.enableDNS", True, "'enableDNS' was unexpected"),
        ("spec.replicatedJobs.0.name", GONE, "'name' is a required property"),
        (f"{CHILD}.completionMode", 5, "completionMode"),
        (f"{CHILD}.template.spec.gracePeriodSeconds", 300, "gracePeriodSeconds"),
        ("apiVersion", "jobset.x-k8s.io/v1", "v1alpha2"),
    ],
)
def test_what_no_jobset_has_is_seen(path, value, told):
    (jobset,) = of_kind(planted(overlay("jobset"), "JobSet", path, value), "JobSet")

    assert told in invalid(jobset, VERSIONS[0])


def test_a_secret_in_the_manifests_is_seen():
    secret = {"kind": "Secret", "metadata": {"name": "s3", "labels": {"app.kubernetes.io/name": "qlora-job"}}}

    assert complaints([*standalone(), secret]) == ["Secret s3: is made by hand"]


def test_every_rule_has_seen_an_error():
    """A rule that nothing can break would hold for ever."""
    spoilt = [planted(standalone(), "Job", path, value) for path, value, _ in JOB_ERRORS]
    spoilt += [planted(standalone(), kind, path, value) for kind, path, value, _ in OTHER_ERRORS]
    spoilt += [planted(overlay("nightly"), "CronJob", path, value) for path, value, _ in NIGHTLY_ERRORS]
    spoilt += [planted(overlay("multi-node"), kind, path, value) for kind, path, value, _ in NODES_ERRORS]
    spoilt.append(planted(overlay("multi-node")[::-1], "NetworkPolicy", "spec.ingress", GONE))

    assert [rule.__name__ for rule in RULES if not any(heard(rule, each) for each in spoilt)] == []


def test_planting_spoils_a_copy():
    before = yaml.safe_dump_all(standalone())
    base = standalone()
    planted(base, "Job", "spec.backoffLimit", 0)

    assert documents(yaml.safe_dump_all(base)) == documents(before)
