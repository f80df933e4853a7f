"""What must hold for the fields of Jobs and CronJobs: exit codes go the way of the table, nothing lasts for ever."""

import re
from collections.abc import Iterator
from typing import Any

from k8s_manifests import Document
from k8s_parts import containers, environment, nodes, of_kind

from job.core.errors import ENDINGS, Again

FATES = {
    Again.NEVER: "FailJob",
    Again.ALWAYS: "Ignore",
    Again.COUNTED: "Count",
    Again.ELSEWHERE: "Count",  # a Job cannot say "on another node"
}
SHORTEST_NOTICE_SECONDS = 15
"""The least that a cloud gives (spot nodes of GKE). A stop of Llama-2-7B with r 32 fits: a step of 0.5 s, 490 MB at
100 MB/s, 2 s for the end."""
OURS = {row.code for row in ENDINGS}
QUEUE, QUEUE_SECONDS = "kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/max-exec-time-seconds"


JOBSET_FATES = {
    "FailJobSet": "FailJob",
    "RestartJobSet": "Count",
    "RestartJobSetAndIgnoreMaxRestarts": "Ignore",
}
"""What a JobSet does with all pods, as what a Job does with one."""


def fate(spec: dict[str, Any], code: int, *, disrupted: bool = False) -> str:
    """What the Job controller does with a pod that ended so: the first rule that matches, else it counts."""
    rule = _first_rule(spec, code, disrupted=disrupted)
    return "Count" if rule is None else spec["podFailurePolicy"]["rules"][rule]["action"]


def _first_rule(spec: dict[str, Any], code: int, *, disrupted: bool) -> int | None:
    for number, rule in enumerate(spec["podFailurePolicy"]["rules"]):
        if codes := rule.get("onExitCodes"):
            if (code in codes["values"]) == (codes["operator"] == "In"):
                return number
        elif disrupted and any(
            (each["type"], each.get("status")) == ("DisruptionTarget", "True") for each in rule["onPodConditions"]
        ):
            return number
    return None


def fate_of_run(job: Document, code: int, *, disrupted: bool = False) -> str:
    """What becomes of the run after the first pod that ended so: by the Job alone, or by its JobSet."""
    action = fate(job["spec"], code, disrupted=disrupted)
    if "jobset" not in job:
        return action
    if action == "Ignore" or (action == "Count" and job["spec"].get("backoffLimit") != 0):
        return "the Job makes a pod anew, alone"
    if action == "Count":
        return _by_jobset(job["jobset"], "BackoffLimitExceeded", "Job has reached the specified backoff limit")
    number = _first_rule(job["spec"], code, disrupted=disrupted)
    what = "has condition DisruptionTarget" if disrupted else f"failed with exit code {code}"
    return _by_jobset(job["jobset"], "PodFailurePolicy", f"Pod ns/pod {what} matching FailJob rule at index {number}")


def _by_jobset(jobset: dict[str, Any], reason: str, message: str) -> str:
    """What its controller does about a Job that failed so: the first rule that matches, else all begin anew."""
    for rule in jobset["failurePolicy"].get("rules", []):
        reasons, patterns = rule.get("onJobFailureReasons"), rule.get("onJobFailureMessagePatterns")
        fits = not patterns or any(re.search(pattern, message) for pattern in patterns)
        if fits and (not reasons or reason in reasons):
            return JOBSET_FATES[rule["action"]]
    return "Count"


def exit_codes_go_the_way_of_the_table(job: Document) -> Iterator[str]:
    for row in ENDINGS:
        if row.again is Again.DONE:
            continue
        if (found := fate_of_run(job, row.code)) != FATES[row.again]:
            yield f"exit code {row.code}: {found}, but the table says {row.again.value!r}: {FATES[row.again]}"
        if fate_of_run(job, row.code, disrupted=True) != "Ignore":
            yield f"a pod that is evicted and ends {row.code} is not ignored"
    for code in (1, 137, 143):
        if fate_of_run(job, code) != "Count":
            yield f"exit code {code}, which is none of ours, does not count"


def the_failure_policy_is_one_that_the_server_takes(job: Document) -> Iterator[str]:
    pod, rules = job["spec"]["template"]["spec"], job["spec"]["podFailurePolicy"]["rules"]
    if not 1 <= len(rules) <= 20:
        yield "podFailurePolicy: between 1 and 20 rules"
    if pod.get("restartPolicy") != "Never":
        yield "podFailurePolicy needs restartPolicy Never"
    if job["spec"].get("podReplacementPolicy") != "Failed":
        yield "podReplacementPolicy is not Failed: two pods could work at once"
    for rule in rules:
        if ("onExitCodes" in rule) == ("onPodConditions" in rule):
            yield "a rule has either onExitCodes or onPodConditions"
        if any("status" not in each for each in rule.get("onPodConditions", [])):
            yield "onPodConditions: without status"
        if "onExitCodes" in rule:
            yield from _wrong_codes(rule["onExitCodes"], {container["name"] for container in containers(pod)})


def _wrong_codes(codes: dict[str, Any], names: set[str]) -> Iterator[str]:
    values = codes["values"]
    if values != sorted(set(values)) or not 1 <= len(values) <= 255:
        yield f"onExitCodes.values {values}: sorted, each once, at most 255"
    if codes["operator"] == "In" and 0 in values:
        yield "onExitCodes.values: no 0 with In"
    if codes.get("containerName") not in names:
        yield f"onExitCodes.containerName {codes.get('containerName')}: no such container"
    if not set(values) <= OURS:
        yield f"onExitCodes.values {values}: not all of them are codes of ours"


def the_job_knows_its_grace_period(job: Document) -> Iterator[str]:
    pod = job["spec"]["template"]["spec"]
    grace, told = pod.get("terminationGracePeriodSeconds", 30), environment(pod).get("JOB_GRACE_SECONDS")
    if told != str(grace):
        yield f"JOB_GRACE_SECONDS is {told}, terminationGracePeriodSeconds is {grace}"
    if grace < SHORTEST_NOTICE_SECONDS:
        yield f"terminationGracePeriodSeconds {grace}: less than the job needs to save"


def every_job_has_a_last_bound(job: Document) -> Iterator[str]:
    spec, labels = job["spec"], job.get("metadata", {}).get("labels", {})
    by_index = (spec.get("backoffLimitPerIndex"), spec.get("maxFailedIndexes"))
    if spec.get("backoffLimit") is None and (by_index[0] is None or by_index[1] != 0):
        yield "no backoffLimit"
    if "jobset" in job and not job["jobset"]["failurePolicy"].get("maxRestarts"):
        yield "no maxRestarts"
    if "jobset" in job and _by_jobset(job["jobset"], "DeadlineExceeded", "") != "FailJob":
        yield "activeDeadlineSeconds bounds nothing: the JobSet begins anew"
    if QUEUE not in labels and not spec.get("activeDeadlineSeconds"):
        yield "no activeDeadlineSeconds"
    if QUEUE in labels and "activeDeadlineSeconds" in spec:
        yield "activeDeadlineSeconds begins anew with every admission by Kueue"
    if QUEUE in labels and not labels.get(QUEUE_SECONDS, "").isdigit():
        yield f"a Job of Kueue has no {QUEUE_SECONDS}"


def a_job_is_one_run_that_starts_when_it_is_applied(job: Document) -> Iterator[str]:
    of_a_run = nodes(job["spec"]["template"]["spec"])
    if (job["spec"].get("completions", 1), job["spec"].get("parallelism", 1)) != (of_a_run, of_a_run):
        yield "completions and parallelism are the nodes of one run, JOB_NODES, or 1"
    if "suspend" in job["spec"]:
        yield "suspend is set: without Kueue the Job waits for ever"


def selectors_select_what_is_meant(job: Document) -> Iterator[str]:
    if job["spec"].keys() & {"selector", "manualSelector"}:
        yield "selector is set: the server makes one, which no other Job's pods match"
    labels = job.get("metadata", {}).get("labels", {})
    if not labels.items() <= job["spec"]["template"]["metadata"].get("labels", {}).items() | _of_queues(labels).items():
        yield "labels: the pods do not have those of their Job, so what selects by them misses the pods"


def _of_queues(labels: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in labels.items() if name.startswith("kueue.x-k8s.io/")}


def a_single_job_is_tidied_up_by_its_ttl(documents: list[Document]) -> Iterator[str]:
    for document in of_kind(documents, "Job") + of_kind(documents, "JobSet"):
        if not document["spec"].get("ttlSecondsAfterFinished"):
            yield "no ttlSecondsAfterFinished"


def a_cronjob_never_overlaps_or_piles_up(documents: list[Document]) -> Iterator[str]:
    for document in of_kind(documents, "CronJob"):
        spec, name = document["spec"], document["metadata"]["name"]
        if len(name) > 52:
            yield f"CronJob {name}: longer than 52 characters"
        if spec.get("concurrencyPolicy") != "Forbid":
            yield "concurrencyPolicy is not Forbid"
        if not spec.get("timeZone"):
            yield "no timeZone: the schedule is in the controller's"
        limits = ("successfulJobsHistoryLimit", "failedJobsHistoryLimit")
        yield from (f"no {limit}" for limit in limits if not spec.get(limit))
        if "ttlSecondsAfterFinished" in spec["jobTemplate"]["spec"]:
            yield "ttlSecondsAfterFinished empties the CronJob's history"
        interval = shortest_interval_seconds(spec["schedule"])
        if not 10 <= spec.get("startingDeadlineSeconds", 0) < interval:
            yield f"startingDeadlineSeconds: at least 10 and less than the schedule's {interval} s"
        yield from _blocks_the_next(spec, interval)


def _blocks_the_next(spec: dict[str, Any], interval: int) -> Iterator[str]:
    """A night that starts late, and waits for a node until its deadline, has stopped before the next one."""
    job = spec["jobTemplate"]["spec"]
    grace = job["template"]["spec"].get("terminationGracePeriodSeconds", 30)
    longest = spec.get("startingDeadlineSeconds", 0) + job.get("activeDeadlineSeconds", 0) + grace
    if longest >= interval:
        yield f"activeDeadlineSeconds: a night may last {longest} s, and the next comes after {interval} s"


def shortest_interval_seconds(schedule: str) -> int:
    """Between two starts of a schedule by minute, hour and weekday."""
    minute, hour, day, month, weekday = schedule.split()
    assert (day, month) == ("*", "*"), "days of a month are not needed here"
    minutes, hours, days = _times(minute, 60), _times(hour, 24), _times(weekday, 7)
    starts = sorted(d * 86400 + h * 3600 + m * 60 for d in days for h in hours for m in minutes)
    return min(later - earlier for earlier, later in zip(starts, [*starts[1:], starts[0] + 7 * 86400], strict=True))


def _times(field: str, size: int) -> list[int]:
    if field == "*":
        return list(range(size))
    if field.startswith("*/"):
        return list(range(0, size, int(field[2:])))
    times = [int(each) for each in field.split(",")]
    assert all(0 <= each < size for each in times), field
    return times
