"""What k8s/README.md says is what the manifests and the table do."""

import json
import os
import re
import subprocess

import pytest
import yaml
from k8s_manifests import COMPONENTS, JOB, K8S, KUBECTL, OVERLAYS, composed, documents, kustomized, overlay, standalone
from k8s_parts import environment, job_labels, job_specs, of_kind, pod_specs, trainer
from k8s_rules import complaints
from k8s_schemas import VERSIONS, invalid

from job.core.errors import ENDINGS, Again

README = (K8S / "README.md").read_text(encoding="utf-8")
SAID = {
    Again.DONE: "Complete",
    Again.NEVER: "Failed at once",
    Again.COUNTED: "a new pod, counted",
    Again.ELSEWHERE: "a new pod, counted; see below",
    Again.ALWAYS: "a new pod, not counted",
}
needs_kubectl = pytest.mark.skipif(KUBECTL is None, reason="NO KUBECTL: the README's commands are not tried here")


def blocks(language=""):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_the_table_says_of_every_exit_code_what_the_job_does():
    rows = [f"| {row.code} | {row.meaning} | {SAID[row.again]} |" for row in ENDINGS]

    assert re.findall(r"^\| \d.*$", README, re.MULTILINE) == rows


def test_every_component_and_overlay_is_named():
    tree = re.sub(r"\s+", " ", blocks()[0])

    assert set(re.findall(r"[a-z-]+", tree.split("can be added:")[1].split("overlays/")[0])) == set(COMPONENTS)
    assert set(tree.split("together:")[1].split()) == set(OVERLAYS)


def test_the_numbers_that_are_named_are_those_of_the_manifests():
    (spec,), (pod,) = job_specs(standalone()), pod_specs(standalone())

    assert f"`backoffLimit: {spec['backoffLimit']}`" in README
    assert spec["backoffLimit"] == 3  # "Failed with the fourth"
    assert spec["ttlSecondsAfterFinished"] == 3 * 86400  # "three days after its end"
    assert pod["serviceAccountName"] == "qlora-job"


def test_the_secrets_that_are_made_are_those_that_the_components_read():
    made = set(re.findall(r"create secret generic (\S+)", README))
    read = {
        name
        for path in K8S.rglob("kustomization.yaml")
        for name in re.findall(r"qlora-job-(?:s3|hub)", path.read_text())
    }

    assert made == read == {"qlora-job-s3", "qlora-job-hub"}


def test_the_secret_of_the_registry_is_the_one_that_pods_pull_with():
    (made,) = re.findall(r"create secret docker-registry (\S+)", README)
    (switched_on,) = pod_specs(documents(JOB.read_text().replace("# imagePullSecrets:", "imagePullSecrets:")))
    (pod,) = pod_specs(overlay("once"))

    assert pod["imagePullSecrets"] == switched_on["imagePullSecrets"] == [{"name": made}]


def test_the_secret_with_keys_is_in_job_yaml_to_be_switched_on():
    text = JOB.read_text(encoding="utf-8").replace("# envFrom:", "envFrom:")
    (pod,), (other,) = pod_specs(documents(text)), pod_specs(overlay("once"))
    (switched_on,), (component,) = ([each["envFrom"] for each in found["containers"]] for found in (pod, other))

    assert switched_on == component
    assert [wrong for v in VERSIONS for each in documents(text) if (wrong := invalid(each, v))] == []


def test_all_that_cannot_be_changed_is_deleted_before_an_edited_job_yaml_is_applied():
    """Else `kubectl apply` makes a Job with the recipe of before, or none."""
    (line,) = re.findall(r"^kubectl delete (.*) && kubectl apply -f k8s/job.yaml$", README, re.MULTILINE)
    kept = {f"{each['kind'].lower()}/{each['metadata']['name']}" for each in standalone()} - {
        "serviceaccount/qlora-job"
    }

    assert set(line.split()) == kept | {"--cascade=foreground", "--ignore-not-found"}


def test_the_line_that_waits_for_the_pod_waits_until_there_is_a_log(tmp_path):
    """Word by word, with a kubectl that tells of no pod, then of one that waits."""
    (block,) = [block for block in blocks() if "status.phase" in block]
    (tmp_path / "kubectl").write_text(
        "#!/bin/bash\ncase $1 in\n  get) n=$(cat n 2> /dev/null); echo $((n + 1)) > n\n"
        '    case $n in "") ;; [1-3]) printf Pending ;; *) printf "Failed Running" ;; esac ;;\n'
        '  logs) echo "$@ after $(cat n)" ;;\nesac\n'
    )
    (tmp_path / "sleep").write_text("#!/bin/bash\n")
    for name in ("kubectl", "sleep"):
        (tmp_path / name).chmod(0o755)
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", block], cwd=tmp_path, env=path, capture_output=True, text=True, check=True)

    assert done.stdout == "logs -f job/qlora-job after 5\n"


def test_the_variable_of_a_gated_model_is_in_job_yaml_to_be_switched_on():
    text = re.sub(r"# (- name: HF_TOKEN|  valueFrom: \{secretKeyRef)", r"\1", (K8S / "job.yaml").read_text())
    (pod,) = pod_specs(documents(text))

    assert "HF_TOKEN" in environment(pod)
    assert [wrong for v in VERSIONS for each in documents(text) if (wrong := invalid(each, v))] == []


def test_the_labels_that_are_selected_by_are_those_of_the_jobs():
    selected = set(re.findall(r" -l ([\w./-]+)=([\w.-]+)", README)) - {("batch.kubernetes.io/job-name", "qlora-job")}

    assert selected
    assert [labels for labels in job_labels(overlay("nightly")) if not selected <= labels.items()] == []


def test_manifests_that_are_shown_are_valid():
    shown = [
        each for block in blocks("yaml") for each in documents(block) if each.get("kind", "Component") != "Component"
    ]

    assert [document["kind"] for document in shown] == ["PriorityClass"]
    assert [wrong for v in VERSIONS for document in shown if (wrong := invalid(document, v))] == []
    (pod,) = pod_specs(overlay("kueue"))
    assert pod["priorityClassName"] == shown[0]["metadata"]["name"]


@needs_kubectl
def test_the_patch_for_gitops_keeps_the_job(tmp_path):
    (patch,) = [block for block in blocks("yaml") if block.startswith("patches:")]
    (spec,) = job_specs(composed(tmp_path, more=patch))

    assert "ttlSecondsAfterFinished" not in spec


def test_the_hours_of_a_night_are_those_of_the_manifests():
    (night,) = of_kind(overlay("nightly"), "CronJob")
    hours = night["spec"]["jobTemplate"]["spec"]["activeDeadlineSeconds"] / 3600

    assert f"A night ends after {hours:.0f} hours" in README
    assert night["spec"]["startingDeadlineSeconds"] == 3600  # "within an hour"


@needs_kubectl
@pytest.mark.parametrize("last", [[], ["jobset"], ["nightly"]], ids=["indexed", "jobset", "nightly"])
def test_the_component_for_another_size_gives_all_numbers_that_belong_together(tmp_path, last):
    (text,) = [block for block in blocks("yaml") if "kind: Component" in block]
    (tmp_path / "size").mkdir()
    (tmp_path / "size" / "kustomization.yaml").write_text(text, encoding="utf-8")
    here = os.path.relpath(K8S / "components", tmp_path.resolve())
    names = [f"{here}/multi-gpu", f"{here}/multi-node", "size", *(f"{here}/{name}" for name in last)]
    lines = [f"resources: [{here}/../base]", f"components: [{', '.join(names)}]"]
    (tmp_path / "kustomization.yaml").write_text("\n".join(lines), encoding="utf-8")
    rendered = documents(kustomized(tmp_path))

    assert complaints(rendered) == []
    assert [wrong for v in VERSIONS for each in rendered if (wrong := invalid(each, v))] == []
    (spec,) = job_specs(rendered)
    assert spec["completions"] == 3
    assert trainer(spec["template"]["spec"])["resources"]["limits"]["nvidia.com/gpu"] == 4


def test_the_numbers_of_several_nodes_are_those_of_the_manifests():
    (spec,), (child,) = job_specs(overlay("multi-node")), job_specs(overlay("jobset"))
    (jobset,) = of_kind(overlay("jobset"), "JobSet")

    assert f"`backoffLimitPerIndex: {spec['backoffLimitPerIndex']}`" in README
    assert f"`maxRestarts: {jobset['spec']['failurePolicy']['maxRestarts']}`" in README
    assert f"`{jobset['metadata']['name']}-{jobset['spec']['replicatedJobs'][0]['name']}-0`" in README
    assert spec["completions"] == child["completions"] == 2  # "on each of two nodes"


@needs_kubectl
def test_the_five_lines_of_your_own_render(tmp_path):
    (text,) = [block for block in blocks("yaml") if block.startswith("resources:")]
    (tmp_path / "qlora-job").mkdir()
    (tmp_path / "qlora-job" / "k8s").symlink_to(K8S)
    own = tmp_path / "own"
    own.mkdir()
    (own / "kustomization.yaml").write_text(text, encoding="utf-8")
    (own / "recipe.yaml").write_text((K8S / "base" / "recipe.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    done = subprocess.run([KUBECTL, "kustomize", str(own)], capture_output=True, text=True, check=False)

    assert len(text.splitlines()) == 5
    assert done.returncode == 0, done.stderr
    (job,) = of_kind(documents(done.stdout), "Job")
    assert job["metadata"]["namespace"] == "ml"
    assert job["spec"]["template"]["spec"]["containers"][0]["image"] == "registry.example.com/ml/qlora-job:0.1.0"


@needs_kubectl
def test_the_command_that_shows_how_it_ended_shows_it(tmp_path):
    """Its template, without a server: on a list of pods in a file."""
    (template,) = re.findall(r"jsonpath='(\{range.*?\{end\})'", README)
    message = json.dumps({"state": "ended", "code": 75})
    state = {"terminated": {"exitCode": 75, "message": message}}
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "qlora-job-x"},
        "status": {"containerStatuses": [{"name": "trainer", "state": state}]},
    }
    one = re.sub(r"\{range \.items\[\*\]\}|\{end\}", "", template)
    (tmp_path / "pod.yaml").write_text(yaml.safe_dump(pod), encoding="utf-8")
    command = [KUBECTL, "annotate", "--local", "-f", str(tmp_path / "pod.yaml"), "a=b", "-o", f"jsonpath={one}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.stdout == f"qlora-job-x\t{message}\n", done.stderr


@needs_kubectl
@pytest.mark.parametrize("kind", ["Job", "CronJob"])
def test_the_patches_that_are_shown_suspend(tmp_path, kind):
    (text,) = set(re.findall(rf"kubectl patch {kind.lower()} \S+ --type=merge -p '(.*?)'", README))
    path = tmp_path / "job.yaml"
    path.write_text(
        yaml.safe_dump({"apiVersion": "batch/v1", "kind": kind, "metadata": {"name": "x"}}), encoding="utf-8"
    )
    command = [KUBECTL, "patch", "--local", "-f", str(path), "--type=merge", "-p", text, "-o", "yaml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert yaml.safe_load(done.stdout)["spec"]["suspend"] is True, done.stderr


@pytest.mark.parametrize("target", re.findall(r"\]\((?!https?://)([^)#\s]+)", README))
def test_every_link_leads_somewhere(target):
    assert (K8S / target).exists()
