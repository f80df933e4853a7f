"""How GPUs are linked, through the real nvidia-ml-py, whose C library an object with the same functions plays."""

import sys
from itertools import combinations

import pynvml
import pytest
from nvml_calls import LinkedGpus, play

from job.edge.host.gpu import look_at_links

FOUR = "0,1,2,3"


@pytest.fixture
def node(monkeypatch):
    return play(monkeypatch, LinkedGpus(*["NVIDIA H200"] * 4))


def test_gpus_behind_a_switch_of_nvlinks_are_all_linked(node):
    node.by_nvlink, node.up = {*combinations(range(4), 2)}, 18

    assert str(look_at_links(FOUR)) == "4 NVIDIA H200: 18 x NVLink"


def test_pairs_that_are_bridged_are_told_from_those_that_are_not(node):
    node.by_nvlink, node.up = {(0, 1), (2, 3)}, 12
    node.reaching = {*combinations(range(4), 2)}
    node.level = pynvml.NVML_TOPOLOGY_NODE

    assert str(look_at_links(FOUR)) == (
        "4 NVIDIA H200: 12 x NVLink (2 of 6 pairs); PCIe, in one NUMA node (4 of 6 pairs)"
    )


def test_gpus_that_do_not_reach_into_each_other_have_no_link(node):
    assert str(look_at_links("2,3")) == ("2 NVIDIA H200: no link, by the memory of the host, across NUMA nodes")


@pytest.mark.parametrize(
    ("level", "words"), [(0, "on one board"), (10, "behind one switch"), (30, "at one host bridge"), (99, "far apart")]
)
def test_how_far_apart_they_are_is_said(node, level, words):
    node.reaching, node.level = {(0, 1)}, level

    assert str(look_at_links("0,1")) == f"2 NVIDIA H200: PCIe, {words}"


def test_those_that_were_chosen_count_by_number_or_by_uuid(node):
    node.by_nvlink = {(1, 3)}

    assert look_at_links("3,1").pairs == look_at_links("GPU-1a0b,GPU-3").pairs == {"NVLink": 1}
    assert str(look_at_links("2")) == "1 NVIDIA H200"
    assert "the driver lists 4, and not all of MIG-9,1" in str(look_at_links("MIG-9,1"))
    assert look_at_links("-1") is None


def test_without_a_choice_it_is_all_of_them(node, tmp_path):
    (tmp_path / "dev").mkdir()
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidia3"):
        (tmp_path / "dev" / name).touch()

    assert len(look_at_links(None, root=tmp_path).names) == 4
    assert look_at_links(None, root=tmp_path / "elsewhere") is None


def test_gpus_of_several_kinds_are_counted_apart(monkeypatch):
    play(monkeypatch, LinkedGpus("NVIDIA L4", "NVIDIA A10G", "NVIDIA L4")).reaching = {*combinations(range(3), 2)}

    assert str(look_at_links("0,1,2")) == "2 NVIDIA L4, 1 NVIDIA A10G: PCIe, across NUMA nodes"


def test_links_that_the_driver_does_not_count_are_left_out(node):
    node.by_nvlink, node.refused = {(0, 1)}, {"nvmlDeviceGetNvLinkState": pynvml.NVML_ERROR_NOT_SUPPORTED}

    assert str(look_at_links("0,1")) == "2 NVIDIA H200: NVLink"


# --- what cannot be asked is no failure ------------------------------------------------------------------------------


@pytest.mark.parametrize("question", ["nvmlInitWithFlags", "nvmlDeviceGetP2PStatus", "nvmlDeviceGetUUID"])
def test_what_the_driver_refuses_is_said(node, question):
    node.refused = {question: pynvml.NVML_ERROR_NOT_SUPPORTED}

    assert str(look_at_links("0,1")) == "2 GPUs; how they are linked is not known: Not Supported"


def test_without_the_package_the_look_says_how_to_have_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)

    assert (
        str(look_at_links("0"))
        == "1 GPU; how they are linked is not known: nvidia-ml-py is not installed (extra `gpu`)"
    )
