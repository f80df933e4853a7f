"""Chats in a recipe: what goes with them, and what of it is the run's."""

import pytest
from test_recipe import SMALL, load, refusal

from job.core.recipe.schema import identity_of

CHATS = SMALL.replace('text: "{text}"', "chat: messages")


def test_chats_are_one_way_to_make_text():
    data = load(CHATS).data
    assert (data.chat, data.chat_template, data.learn, data.reasoning, data.tools) == (
        *("messages", None, "all-assistant", "keep", "tools"),
    )
    assert data.has_prompt
    for more in ('data.text="{a}"', 'data.prompt="{a}"', 'data.completion="{a}"'):
        assert "for chats `chat` (data.chat: messages)" in refusal(CHATS, more)
    assert "for chats `chat` (data.chat: messages)" in refusal(CHATS, "data.chat=null")


@pytest.mark.parametrize("given", ["chat_template=chatml", "learn=last-assistant", "reasoning=mask", "tools=functions"])
def test_what_goes_with_chats_goes_with_nothing_else(given):
    assert f"`{given.partition('=')[0]}` goes with `chat`" in refusal(SMALL, f"data.{given}")
    load(CHATS, f"data.{given}")


def test_what_of_a_chat_is_learned_says_learn_alone():
    assert "of a chat `learn` says what is learned" in refusal(CHATS, "data.loss_on=all")
    assert "data.reasoning: input should be 'keep', 'mask' or 'drop'" in refusal(CHATS, "data.reasoning=hide")


def test_held_out_chats_can_be_answered():
    assert load(CHATS, "evaluate.answers=3").evaluate.answers == 3
    assert "data.chat" in refusal(SMALL, "evaluate.answers=3")


def test_the_messages_of_a_chat_are_no_field_of_a_template():
    assert "the messages of a chat are read by data.chat" in refusal(SMALL, 'data.text="{messages[0][content]}"')


def test_a_run_without_chats_is_what_it_was_and_a_run_on_chats_is_its_own():
    """Else every run that was begun before would begin anew."""
    assert not {"chat", "chat_template", "learn", "reasoning", "tools"} & identity_of(load())["data"].keys()
    seen = [
        identity_of(load(CHATS, *more))["data"]
        for more in ([], ["data.chat_template=chatml"], ["data.learn=last-assistant"], ["data.reasoning=mask"])
    ]
    assert all(one != other for n, one in enumerate(seen) for other in seen[:n])
