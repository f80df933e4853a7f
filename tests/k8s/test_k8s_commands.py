"""Every command of k8s/README.md as it is typed, by kubectl itself: what would change something as a dry run."""

import os
import re
import subprocess

import pytest
from k8s_manifests import K8S, KUBECTL, overlay, standalone
from k8s_parts import of_kind
from k8s_server import LOG, api_server

pytestmark = pytest.mark.skipif(KUBECTL is None, reason="NO KUBECTL: the README's commands are not tried here")
README = (K8S / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
TYPED = [line for block in BLOCKS for line in block.splitlines() if re.match(r"(until )?kubectl ", line)]
WITHIN = [
    re.sub(r"\s+", " ", each)
    for each in re.findall(r"`(kubectl\s[^`]+)`", re.sub(r"```.*?```", "", README, flags=re.DOTALL))
]
MENTIONED = {"apply", "apply --server-side", "delete pod", "describe job", "describe pod", "logs", "wait"}
"""In a sentence about them, without what they are to work on."""
WHOLE = [each for each in dict.fromkeys(WITHIN) if each.removeprefix("kubectl ") not in MENTIONED]
KUBECTL_HERE = """#!/bin/bash
case $1 in
  apply) dry=(--dry-run=client --validate=false) ;;
  create | delete | patch | cordon | taint) dry=(--dry-run=client) ;;
  kustomize) exec {kubectl} "$@" ;;
  *) dry=() ;;
esac
exec {kubectl} --server={url} "$@" "${{dry[@]}}"
"""


def pod_and_node():
    (job,) = of_kind(standalone(), "Job")
    name = {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
    number = {"batch.kubernetes.io/job-completion-index": "0"}  # of several pods
    labels = name | number | job["spec"]["template"]["metadata"]["labels"]
    terminated = {"exitCode": 75, "message": "{}"}
    status = {"phase": "Running", "containerStatuses": [{"name": "trainer", "state": {"terminated": terminated}}]}
    spec = job["spec"]["template"]["spec"] | {"nodeName": "NODE"}
    yield {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "POD", "labels": labels},
        "spec": spec,
        "status": status,
    }
    yield {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "NODE", "labels": {}}, "spec": {}, "status": {}}
    job["spec"]["selector"] = {"matchLabels": name}
    job["status"] = {"conditions": [{"type": "Complete", "status": "True"}]}
    yield job


@pytest.fixture(scope="module")
def server():
    manifests = [each for each in standalone() if each["kind"] != "Job"] + of_kind(overlay("nightly"), "CronJob")
    objects = [*manifests, *of_kind(overlay("jobset"), "JobSet"), *pod_and_node()]
    for each in objects:
        each["metadata"] |= {"namespace": "default", "uid": "1"} if each["kind"] != "Node" else {}
    with api_server(objects) as running:
        yield running


@pytest.fixture
def typed(tmp_path, server):
    """Types a line in a folder that has the checkout's k8s/, and the files that the README speaks of."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "kubectl").write_text(KUBECTL_HERE.format(kubectl=KUBECTL, url=server.url), encoding="utf-8")
    (tmp_path / "bin" / "kubectl").chmod(0o755)
    (tmp_path / "k8s").symlink_to(K8S)
    (tmp_path / "FILE").write_text("AWS_ACCESS_KEY_ID=x\n", encoding="utf-8")
    (tmp_path / "FOLDER").mkdir()
    (tmp_path / "FOLDER" / "kustomization.yaml").write_text("resources: [../k8s/overlays/once]\n", encoding="utf-8")
    environment = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "HOME": str(tmp_path), "KUBECONFIG": os.devnull}

    def at_the_prompt(line):
        server.asked.clear()
        command = ["bash", "-c", line]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900, check=False
        )

    return at_the_prompt


def test_there_are_commands():
    assert len(TYPED) >= 20
    assert len(WHOLE) >= 5


@pytest.mark.parametrize("line", [each for each in [*TYPED, *WHOLE] if "kubectl exec" not in each])
def test_it_is_one_that_kubectl_understands_and_finds_what_it_names(typed, line):
    done = typed(line)

    assert done.returncode == 0, done.stderr
    assert "No resources found" not in done.stderr
    assert "not found" not in done.stdout + done.stderr


def test_the_outcome_is_read_in_the_pod_of_the_job(typed, server):
    (line,) = [each for each in TYPED if "kubectl exec" in each]
    done = typed(line)

    assert "/api/v1/namespaces/default/pods/POD/exec" in server.asked, done.stderr


def test_the_log_that_is_followed_is_the_pod_s(typed):
    assert typed("kubectl logs -f job/qlora-job").stdout == LOG


def test_a_mistake_in_a_command_is_seen(typed):
    for line in (
        "kubectl get job qlora",
        "kubectl delete job/qlora-job --cascade=front",
        "kubectl get pods -l a=b --foo",
    ):
        assert typed(line).returncode != 0
