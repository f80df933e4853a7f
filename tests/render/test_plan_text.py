"""A plan for people: its end is what they paste."""

import pytest
from filled_ask import ROOT, TEMPLATES, ask_lines
from llama_2_7b import WORK

from job.core.forecast import Ask, ask_for


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


@pytest.mark.parametrize(("template", "error"), [("${gpus}", KeyError), ("$", ValueError)])
def test_a_template_that_cannot_be_filled_in_is_seen(template, error):
    assert "gpus" not in Ask.model_fields
    with pytest.raises(error):
        ask_lines(template)
