"""k8s/ask.txt, as `plan` fills it in, is what stands below a container of job.yaml."""

import pytest
import yaml
from filled_ask import filled
from k8s_manifests import standalone
from k8s_parts import pod_specs, trainer
from k8s_rules import heard
from k8s_rules_pods import requests_and_limits_agree
from k8s_rules_safety import a_node_can_have_what_is_asked_of_it
from k8s_schemas import VERSIONS, invalid


@pytest.fixture
def pasted():
    """job.yaml with it in place of its own numbers."""
    found = standalone()
    (pod,) = pod_specs(found)
    trainer(pod).update(yaml.safe_load(filled("k8s")[0]))
    return found


def test_it_is_the_resources_of_a_container():
    assert set(yaml.safe_load(filled("k8s")[0])) == {"resources"}


@pytest.mark.parametrize("version", VERSIONS)
def test_job_yaml_with_it_is_valid(pasted, version):
    assert [invalid(document, version) for document in pasted] == [None, None, None]


@pytest.mark.parametrize("rule", [requests_and_limits_agree, a_node_can_have_what_is_asked_of_it])
def test_job_yaml_with_it_keeps_our_rules(pasted, rule):
    assert heard(rule, pasted) == []


def test_memory_and_disk_are_those_of_the_json_and_the_rest_is_job_yaml_s():
    text, ask = filled("k8s")
    found = yaml.safe_load(text)["resources"]
    (pod,) = pod_specs(standalone())
    ours = trainer(pod)["resources"]
    sizes = {"memory": f"{ask['host_memory_gib']}Gi", "ephemeral-storage": f"{ask['disk_gib']}Gi"}

    assert found["limits"] == ours["limits"] | sizes
    assert found["requests"] == ours["requests"] | sizes | {"cpu": int(ours["requests"]["cpu"])}
