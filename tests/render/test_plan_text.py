"""A plan for people: its end is what they paste."""

from dataclasses import replace

import pytest
from filled_ask import ROOT, TEMPLATES, ask_lines
from llama_2_7b import LLAMA_2_7B, WORK
from report_fixtures import DATA

from job.core.plan.forecast import Ask, ask_for, forecast
from job.core.plan.gpus import Gpu, gpu_named
from job.core.plan.scaling import ALONE, cluster_of
from job.render.plan_text import plan_lines


def lines_of(*gpus, cluster=ALONE, work=WORK, usd_per_hour=None):
    found = [forecast(work, gpu, cluster) for gpu in gpus]
    return plan_lines(DATA, [], work, found, words=(), templates=(), usd_per_hour=usd_per_hour)


def test_the_templates_follow_the_sentence_each_after_a_blank_line():
    ask = ask_for(WORK)
    sentence, *lines = ask_lines("a ${host_memory_gib}\n  b\n", "c ${disk_gib}\n")

    assert sentence == (
        f"ask for: one GPU (from {ask.gpu_memory_gib} GiB; more is faster), {ask.host_memory_gib} GiB of host memory, "
        f"{ask.disk_gib} GiB of disk (the base and the work folder)"
    )
    assert lines == ["", f"  a {ask.host_memory_gib}", "    b", "", f"  c {ask.disk_gib}"]


def test_without_a_template_the_sentence_stands_alone():
    assert len(ask_lines()) == 1


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_template_is_filled_in_whole(path):
    """An unknown field, or a `$` by itself, is an error here and not in front of a user."""
    assert "$" not in "\n".join(ask_lines(path.read_text(encoding="utf-8")))


def test_every_scheduler_has_a_template():
    assert [path.parent.name for path in TEMPLATES] == ["k8s", "slurm"]


@pytest.mark.parametrize(("template", "error"), [("${gpu}", KeyError), ("$", ValueError)])
def test_a_template_that_cannot_be_filled_in_is_seen(template, error):
    assert "gpu" not in Ask.model_fields
    with pytest.raises(error):
        ask_lines(template)


# --- several GPUs ----------------------------------------------------------------------------------------------------

BY_TWO = cluster_of(gpus=2, nodes=1, gigabits=100)


def test_several_gpus_have_columns_of_their_own_and_what_they_lose():
    lines = lines_of(gpu_named("h100"), gpu_named("l4"), cluster=BY_TWO, usd_per_hour=3)
    there = forecast(WORK, gpu_named("h100"), BY_TWO)

    assert "2 GPUs of one node; memory is that of each GPU:" in lines
    (row,) = [line.split() for line in lines if line.startswith("h100 ")]
    assert row[5:9] == [
        f"{there.tokens_per_second:,.0f}",
        f"{there.tokens_per_second / 2:,.0f}",
        f"{there.scaled.times_one:.2f}",
        "replicated",
    ]
    assert row[-2] == f"{there.usd(3):.2f}"
    assert "what several GPUs do together is computed, not measured" in lines
    shown = 1000 * there.scaled.exchange_seconds
    assert 0.1 < shown < 2.5
    assert f"exchanged a step: 324 MB a GPU over NVLink 4, {shown:.1f} ms of it not hidden" in lines


def test_columns_stand_below_their_heads():
    for cluster in (ALONE, BY_TWO):
        lines = lines_of(gpu_named("h100"), gpu_named("l4"), cluster=cluster)
        head, row = (next(line for line in lines if line.startswith(name)) for name in ("gpu ", "h100 "))
        assert len(head) == len(row)
        speed = forecast(WORK, gpu_named("h100"), cluster).tokens_per_second
        assert row[: head.index("tokens/s") + len("tokens/s")].endswith(f" {speed:,.0f}")


def test_several_nodes_are_said_with_their_network_and_what_to_ask_for_on_each():
    lines = lines_of(gpu_named("h100"), cluster=cluster_of(gpus=1, nodes=4, gigabits=400))

    assert "1 GPU of each of 4 nodes, a network of 400 Gbit/s; memory is that of each GPU:" in lines
    assert lines[-1].startswith("ask for: one GPU (from 8 GiB each; more is faster), ")
    assert lines[-1].endswith(", on each of 4 nodes")


def test_one_gpu_is_shown_as_ever():
    lines = lines_of(gpu_named("h100"))

    assert not [line for line in lines if "GPUs" in line or "placement" in line]


def test_a_base_that_fits_no_gpu_of_a_kind_is_planned_in_shards():
    large = replace(WORK, shape=replace(LLAMA_2_7B, layers=80, linear_parameters=68_451_041_280))
    unknown = Gpu(name="your GPU", memory_gib=30, speed=None, link=None)
    lines = lines_of(gpu_named("a100-40", memory_gib=30), unknown, cluster=BY_TWO, work=large)

    assert any("base in 4 bits, a part of each layer and two of them whole" in line for line in lines)
    assert [line.split()[-1] for line in lines if line.startswith("your GPU ")] == ["sharded"]
