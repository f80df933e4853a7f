"""A base's chat template that does not end, grows without bounds, or reaches for what it may not have."""

import shutil
from pathlib import Path

import pytest
from job_process import write_lines

from job.core.errors import JobError, StopRequestedError
from job.tune.data.chats.rendering import Renderer

ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
OUTSIDE = {
    "loops": ENDLESS,
    "a number folded while it is compiled": "{{ 9 ** (9 ** 9) }}",
    "a number": "{% set n = messages | length + 8 %}{{ n ** (n ** n) }}",
    "a text at once": "{{ 'a' * 9999999999 }}",
    "a text that doubles": (
        "{% set of = namespace(x='a') %}{% for i in range(60) %}{% set of.x = of.x ~ of.x %}{% endfor %}"
    ),
    "a width": "{{ '%9999999999d' % 1 }}",
    "output": "{% for a in range(99999) %}{{ 'a' * 999 }}{% endfor %}",
    "recursion": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "nesting": "{{ " + "[" * 20000 + "]" * 20000 + " }}",
    "a class": "{{ messages.__class__.__mro__ }}",
    "globals": "{{ cycler.__init__.__globals__ }}",
    "a class by format": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "a list that is changed": "{{ messages.append(1) }}",
    "a namespace": "{% set of = namespace() %}{% set of.__class__ = 1 %}",
    "no template": "{% for %}",
}
WORDS = {
    **dict.fromkeys(("loops", "a number", "a number folded while it is compiled"), "does not come to an end"),
    **dict.fromkeys(("a class", "globals", "a class by format", "a list that is changed"), "may not have"),
    "output": "more than 1,000,000 characters",
    "no template": "line 1",
}


def renderer(template, *, should_stop=lambda: False):
    setup = {
        "template": template,
        "variables": {},
        "control": "(?!)",
        "seconds": 1,
        "most_bytes": 2**29,
        "most_characters": 10**6,
    }
    return Renderer(setup, should_stop=should_stop)


ASKED = {"messages": [{"role": "user", "content": "a"}], "tools": None, "turns": None, "reasoning": "keep"}


@pytest.mark.parametrize("attack", OUTSIDE)
def test_a_template_without_bounds_is_stopped_and_named(attack):
    with renderer(OUTSIDE[attack]) as rendering:
        [answer] = rendering.render([ASKED, ASKED])
    assert WORDS.get(attack, "") in answer["fatal"]


def test_what_was_rendered_before_the_attack_is_not_lost():
    with renderer("{% if messages | length > 1 %}" + ENDLESS + "{% endif %}{{ messages[0].content }}") as rendering:
        two = ASKED | {"messages": ASKED["messages"] * 2}
        answers = rendering.render([ASKED, ASKED, two, ASKED])
        assert [list(answer) for answer in answers] == [["text", "spans"], ["text", "spans"], ["fatal"]]
        assert rendering.render([ASKED]) == [{"text": "a", "spans": []}]  # by a new process


def test_the_process_has_nothing_of_ours(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with renderer("a") as rendering:
        rendering.render([ASKED])
        environment = Path(f"/proc/{rendering._process.pid}/environ").read_bytes().split(b"\0")
    assert {each.partition(b"=")[0] for each in environment if each} == {b"LC_ALL", b"PYTHONHASHSEED"}


def test_a_process_that_is_ended_from_outside_is_begun_anew_once():
    with renderer("b") as rendering:
        for _ in range(2):
            assert len(rendering.render([ASKED])) == 1
            rendering._process.kill()
            rendering._process.wait()
        assert len(rendering.render([ASKED])) == 1
    ended = renderer("b")
    ended._begun = _always_killed(ended, ended._begun)
    with pytest.raises(JobError, match="ended from outside twice"):
        ended.render([ASKED])


def _always_killed(rendering, begun):
    def killed():
        found = begun()
        rendering._process.kill()
        rendering._process.wait()
        return found

    return killed


def test_a_stop_is_heard_while_a_template_is_at_work():
    with renderer(ENDLESS, should_stop=lambda: True) as rendering, pytest.raises(StopRequestedError):
        rendering.render([ASKED])
    assert rendering._process is None


def test_a_run_on_a_base_with_an_endless_template_ends_with_its_outcome(job):
    base = shutil.copytree(job.recipe["model"]["base"], job.folder / "own-base")
    job.recipe["model"]["base"] = str(base)
    (base / "chat_template.jinja").write_text("{{ messages[0].content ~ 'x' * 99999999999 }}")
    messages = [{"role": "user", "content": "12 red"}, {"role": "assistant", "content": "red 12"}]
    write_lines(job.data / "train.jsonl", [{"messages": messages}] * 20)
    job.recipe["data"] |= {"text": None, "prompt": None, "completion": None, "chat": "messages"}
    ended = job.attacked("run", mib=1024)
    assert ended.code == ended.outcome["code"] == 65, ended.stdout
    assert "chat template needs more memory" in ended.outcome["reason"]
    assert "data.chat_template" in ended.outcome["reason"]
