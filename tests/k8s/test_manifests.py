"""What `kubectl apply` sends is right for every Kubernetes from the floor on, and means what the job means."""

import re

import pytest
import yaml
from k8s_manifests import (
    COMPONENTS,
    IN_BASE,
    JOB,
    K8S,
    KUBECTL,
    OVERLAYS,
    RENDERED,
    ROOT,
    composed,
    documents,
    kustomized,
    overlay,
    recorded_digest,
    sources_digest,
    standalone,
)
from k8s_parts import environment, job_labels, job_specs, jobs, of_kind, pod_specs, trainer
from k8s_rules import complaints
from k8s_rules_jobs import fate, fate_of_run, shortest_interval_seconds
from k8s_schemas import VERSIONS, invalid
from kubernetes_validate import utils

from job.core.recipe.text import load_recipe

needs_kubectl = pytest.mark.skipif(KUBECTL is None, reason="NO KUBECTL: components are not rendered here")
CONFIGMAP = "qlora-job-recipe"
LAST = {"nightly", "jobset"}
"""They take the Job as the others have made it, into something else."""


def recipe_of(rendered):
    (found,) = of_kind(rendered, "ConfigMap")
    return load_recipe(found["data"]["recipe.yaml"], source="ConfigMap")


def test_there_are_schemas_of_every_version_from_the_floor_to_the_newest():
    """For a version that it does not have, kubernetes-validate takes an older one without a word."""
    assert VERSIONS[0] == "1.31"
    assert len(VERSIONS) >= 7
    assert set(VERSIONS) <= {utils.major_minor(version) for version in utils.all_versions()}


# --- job.yaml alone --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
def test_job_yaml_is_valid(version):
    assert [invalid(document, version) for document in standalone()] == [None, None, None]


def test_job_yaml_is_right():
    assert complaints(standalone()) == []
    assert [document["kind"] for document in standalone()] == ["ConfigMap", "ServiceAccount", "Job"]


def test_its_recipe_is_the_one_that_ships():
    shipped = load_recipe((ROOT / "recipes" / "llama2-7b.yaml").read_text(encoding="utf-8"), source="llama2-7b.yaml")

    assert recipe_of(standalone()) == shipped
    assert load_recipe((K8S / "base" / "recipe.yaml").read_text(encoding="utf-8"), source="base") == shipped


@pytest.mark.parametrize(
    ("code", "disrupted", "expected"),
    [
        *((code, False, "FailJob") for code in (64, 65, 66, 77, 78, 80, 81, 84)),
        *((code, False, "Count") for code in (69, 70, 74, 82, 83)),
        (75, False, "Ignore"),
        (75, True, "Ignore"),
        (137, True, "Ignore"),  # killed while it was evicted
        (137, False, "Count"),  # killed for its memory
        (65, True, "Ignore"),
    ],
)
def test_a_pod_that_ends_so_makes_the_job_do_that(code, disrupted, expected):
    """As README.md says in words; the rules say it once more from the table."""
    (spec,) = job_specs(standalone())

    assert fate(spec, code, disrupted=disrupted) == expected


# --- overlays --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_is_valid_and_right(name):
    rendered = overlay(name)

    assert [wrong for v in VERSIONS for document in rendered if (wrong := invalid(document, v))] == []
    assert complaints(rendered) == []


def test_every_component_is_in_an_overlay():
    """So that it is looked at where kubectl is missing too."""
    text = "\n".join((K8S / "overlays" / name / "kustomization.yaml").read_text() for name in OVERLAYS)

    assert {name for name in COMPONENTS if f"components/{name}" not in text} == set()
    assert set(OVERLAYS) == {
        *("once", "nightly", "spot-gke", "spot-aws", "kueue"),
        *("multi-gpu", "multi-node", "jobset"),
    }


@needs_kubectl
def test_what_was_rendered_for_machines_without_kubectl_is_what_kubectl_renders():
    recorded = {path.stem: documents(path.read_text(encoding="utf-8")) for path in RENDERED.glob("*.yaml")}

    assert recorded == {name: overlay(name) for name in OVERLAYS}, "run `make templates`"


def test_what_was_rendered_is_of_these_sources():
    assert recorded_digest() == sources_digest(), "run `make templates`"


def test_once_has_a_name_of_its_own_and_its_recipe_in_the_name_of_the_configmap():
    rendered = overlay("once")

    assert [document["metadata"]["name"] for document in of_kind(rendered, "Job")] == ["notes-1"]
    (found,) = of_kind(rendered, "ConfigMap")
    assert found["metadata"]["name"].startswith(f"{CONFIGMAP}-")
    (pod,) = pod_specs(rendered)
    assert pod["volumes"][-3]["configMap"]["name"] == found["metadata"]["name"]


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_configmap_s_name_ends_in_a_hash_of_the_recipe(name):
    """An edited one is another object; the Job, which names it, is refused and not left as it is without a word."""
    (found,) = of_kind(overlay(name), "ConfigMap")

    assert re.fullmatch(rf"{CONFIGMAP}-[a-z0-9]{{10}}", found["metadata"]["name"])


def test_nightly_makes_the_job_that_would_run_once():
    (nightly,) = of_kind(overlay("nightly"), "CronJob")
    (base,) = job_specs(standalone())
    made = nightly["spec"]["jobTemplate"]["spec"]

    assert of_kind(overlay("nightly"), "Job") == []
    assert base.keys() - made.keys() == {"ttlSecondsAfterFinished"}
    for field in ("podFailurePolicy", "podReplacementPolicy", "backoffLimit"):
        assert made[field] == base[field]
    assert environment(made["template"]["spec"]).items() >= environment(base["template"]["spec"]).items()


@pytest.mark.parametrize(("name", "grace", "label"), [("spot-gke", 15, "gke-spot"), ("spot-aws", 110, "capacity")])
def test_spot_gives_what_the_cloud_gives_and_asks_for_spot_nodes(name, grace, label):
    (pod,) = pod_specs(overlay(name))

    assert pod["terminationGracePeriodSeconds"] == grace
    assert environment(pod)["JOB_GRACE_SECONDS"] == str(grace)
    assert label in yaml.safe_dump([pod["nodeSelector"], pod.get("affinity")])


def test_on_spot_nodes_of_aws_karpenter_may_drain_the_pod():
    """It never drains a pod with the annotation, not even when the node is about to be taken."""
    (before,), (after,) = job_specs(standalone()), job_specs(overlay("spot-aws"))
    name = "karpenter.sh/do-not-disrupt"

    assert name in before["template"]["metadata"]["annotations"]
    assert name not in after["template"]["metadata"]["annotations"]


def test_kueue_decides_when_and_counts_the_time_over_all_admissions():
    rendered = overlay("kueue")
    (spec,), (labels,), (base,) = job_specs(rendered), job_labels(rendered), job_specs(standalone())

    assert labels["kueue.x-k8s.io/queue-name"]
    assert labels["kueue.x-k8s.io/max-exec-time-seconds"] == str(base["activeDeadlineSeconds"])
    assert not {"activeDeadlineSeconds", "suspend"} & spec.keys()


def test_with_the_network_policy_the_pod_reaches_names_and_https_and_nothing_reaches_the_pod():
    policy, peers = of_kind(overlay("nightly"), "NetworkPolicy")
    (spec,) = job_specs(overlay("nightly"))
    open_ports = [(port["protocol"], port["port"]) for rule in policy["spec"]["egress"] for port in rule["ports"]]

    assert peers["metadata"]["name"] == "qlora-job-peers"
    assert policy["spec"]["podSelector"] == {"matchLabels": {"app.kubernetes.io/name": "qlora-job"}}
    assert policy["spec"]["podSelector"]["matchLabels"].items() <= spec["template"]["metadata"]["labels"].items()
    assert set(policy["spec"]["policyTypes"]) == {"Ingress", "Egress"}
    assert "ingress" not in policy["spec"]
    assert open_ports == [("UDP", 53), ("TCP", 53), ("TCP", 443)]
    # The other policy is for pods that have a number among several, which those of a plain Job have not.
    assert peers["spec"]["podSelector"]["matchExpressions"] == [
        {"key": "batch.kubernetes.io/job-completion-index", "operator": "Exists"}
    ]
    assert spec.get("completionMode") is None


# --- several GPUs, several nodes --------------------------------------------------------------------------------------


def test_several_gpus_of_a_node_have_what_one_has_each():
    (pod,), (one,) = pod_specs(overlay("multi-gpu")), pod_specs(standalone())
    resources, alone = trainer(pod)["resources"], trainer(one)["resources"]

    assert environment(pod)["JOB_GPUS"] == "8"
    assert resources["limits"]["nvidia.com/gpu"] == 8 * alone["limits"]["nvidia.com/gpu"]
    assert resources["limits"]["memory"] == f"{8 * int(alone['limits']['memory'].removesuffix('Gi'))}Gi"
    assert resources["requests"]["cpu"] == str(8 * int(alone["requests"]["cpu"]))
    assert environment(pod)["OMP_NUM_THREADS"] == alone["requests"]["cpu"]  # as one process alone has, so it is exact
    assert environment(pod)["JOB_GRACE_SECONDS"] == str(pod["terminationGracePeriodSeconds"])


@pytest.mark.parametrize("name", ["multi-node", "jobset"])
@pytest.mark.parametrize(
    ("code", "disrupted", "expected"),
    [
        *((code, False, "FailJob") for code in (64, 65, 66, 77, 78, 80, 81, 84)),
        *((code, False, "Count") for code in (69, 70, 74, 82, 83, 137)),
        (75, False, "Ignore"),
        (70, True, "Ignore"),  # its node is lost
        (137, True, "Ignore"),
    ],
)
def test_the_first_of_several_pods_that_ends_decides_as_one_alone_does(name, code, disrupted, expected):
    (job,) = jobs(overlay(name))

    assert fate_of_run(job, code, disrupted=disrupted) == expected


@pytest.mark.parametrize("name", ["multi-node", "jobset"])
def test_several_pods_are_one_run_whose_report_ends_it(name):
    (job,) = jobs(overlay(name))
    spec, variables = job["spec"], environment(job["spec"]["template"]["spec"])

    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 2, 2)
    assert variables["JOB_NODES"] == "2"
    assert spec["successPolicy"] == {"rules": [{"succeededIndexes": "0"}]}
    assert spec["podReplacementPolicy"] == "Failed"


def test_an_end_counts_once_for_each_pod_of_an_indexed_job():
    (spec,), (alone,) = job_specs(overlay("multi-node")), job_specs(standalone())

    assert "backoffLimit" not in spec
    assert (spec["backoffLimitPerIndex"], spec["maxFailedIndexes"]) == (alone["backoffLimit"], 0)


def test_the_jobset_is_the_indexed_job_and_makes_all_its_pods_anew_at_once():
    """Whatever was said of the Job is said once: only what follows the end of a pod is the JobSet's."""
    (made,), (job,) = job_specs(overlay("jobset")), job_specs(overlay("multi-node"))
    (jobset,) = of_kind(overlay("jobset"), "JobSet")
    own = {"backoffLimit", "backoffLimitPerIndex", "maxFailedIndexes", "podFailurePolicy", "ttlSecondsAfterFinished"}

    assert {name: made[name] for name in made.keys() - own} == {name: job[name] for name in job.keys() - own}
    assert made["backoffLimit"] == 0
    assert "Ignore" not in {rule["action"] for rule in made["podFailurePolicy"]["rules"]}
    assert jobset["spec"]["ttlSecondsAfterFinished"] == job["ttlSecondsAfterFinished"]
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == job["backoffLimitPerIndex"]
    assert jobset["metadata"]["labels"] == of_kind(overlay("multi-node"), "Job")[0]["metadata"]["labels"]
    kinds = [document["kind"] for document in overlay("jobset")]
    assert "Job" not in kinds
    assert "Service" not in kinds  # JobSet makes one of the same name


# --- components ------------------------------------------------------------------------------------------------------


def test_the_base_has_job_yaml_as_it_is():
    assert IN_BASE.read_bytes() == JOB.read_bytes(), "run `make templates`"


@needs_kubectl
def test_the_base_is_job_yaml_with_the_recipe_in_a_file():
    base = documents(kustomized(K8S / "base"))
    (found,) = of_kind(base, "ConfigMap")
    name = found["metadata"]["name"]

    plain = yaml.safe_load(yaml.safe_dump(of_kind(base, "Job")).replace(name, CONFIGMAP))
    assert plain == of_kind(standalone(), "Job")
    assert of_kind(base, "ServiceAccount") == of_kind(standalone(), "ServiceAccount")
    assert recipe_of(base) == recipe_of(standalone())


@needs_kubectl
@pytest.mark.parametrize("nightly", [[], ["nightly"]], ids=["once", "every night"])
@pytest.mark.parametrize("name", [each for each in COMPONENTS if each not in LAST])
def test_a_component_alone_is_valid_and_right(tmp_path, name, nightly):
    rendered = composed(tmp_path, name, *nightly)

    assert [wrong for v in VERSIONS for document in rendered if (wrong := invalid(document, v))] == []
    assert complaints(rendered) == []
    assert bool(of_kind(rendered, "CronJob")) == bool(nightly)


@needs_kubectl
@pytest.mark.parametrize("last", sorted(LAST))
def test_components_go_together_in_any_order_and_leave_each_other_alone(tmp_path, last):
    names = [each for each in COMPONENTS if each not in {*LAST, "spot-gke"}]
    one, other = composed(tmp_path, *names, last), composed(tmp_path, *reversed(names), last)

    assert complaints(one) == complaints(other) == []
    assert [wrong for v in VERSIONS for document in one if (wrong := invalid(document, v))] == []
    (pod,), (reverse) = pod_specs(one), pod_specs(other)
    assert environment(pod) == environment(reverse[0])
    assert {"HF_TOKEN", "AWS_ROLE_ARN", "JOB_GRACE_SECONDS", "JOB_GPUS", "JOB_NODES"} <= environment(pod).keys()
    assert pod["containers"][0]["envFrom"] == [{"secretRef": {"name": "qlora-job-s3", "optional": True}}]
    assert {volume["name"] for volume in pod["volumes"]} == {"recipe", "work", "shm", "models", "identity"}
    assert "eks.amazonaws.com/role-arn" in of_kind(one, "ServiceAccount")[0]["metadata"]["annotations"]
    assert "kueue.x-k8s.io/queue-name" in job_labels(one)[0]


@needs_kubectl
def test_a_night_in_a_queue_has_the_bound_of_the_queue_alone(tmp_path):
    (spec,), (labels,) = (f(composed(tmp_path, "kueue", "nightly")) for f in (job_specs, job_labels))

    assert "activeDeadlineSeconds" not in spec
    assert labels["kueue.x-k8s.io/max-exec-time-seconds"]


@needs_kubectl
def test_another_recipe_is_another_configmap(tmp_path):
    """So a Job, and the pods that it makes later, keep the recipe that they were made with."""
    own = "behavior: replace, files: [recipe.yaml], options: {immutable: true}"
    more = f"configMapGenerator: [{{name: {CONFIGMAP}, {own}}}]"
    text = (K8S / "base" / "recipe.yaml").read_text(encoding="utf-8")
    names = []
    for learning_rate in ("2.0e-4", "3.0e-4"):
        (tmp_path / "recipe.yaml").write_text(text.replace("2.0e-4", learning_rate), encoding="utf-8")
        rendered = composed(tmp_path, "nightly", more=more)
        assert complaints(rendered) == []
        names += [document["metadata"]["name"] for document in of_kind(rendered, "ConfigMap")]

    assert len(set(names)) == 2


@pytest.mark.parametrize(
    ("schedule", "seconds"), [("17 2 * * *", 86400), ("0 */6 * * *", 21600), ("5 1,4 * * 0", 10800), ("* * * * *", 60)]
)
def test_the_interval_of_a_schedule_is_seen(schedule, seconds):
    assert shortest_interval_seconds(schedule) == seconds
