"""Several sources in a recipe: what is taken, what is refused, what each is called."""

import pytest

from job.core.errors import UsageError
from job.core.recipe.data_section import DataSection
from job.core.recipe.schema import Recipe, identity_of
from job.core.recipe.text import load_recipe

RECIPE = """\
model: {{base: ./base}}
data:
  train: {train}
  {rest}
train: {{{length}, batch_size: 2, learning_rate: 2e-4}}
output: s3://models/notes
"""


def load(train, rest='text: "{text}"', length="steps: 3"):
    return load_recipe(RECIPE.format(train=train, rest=rest, length=length), source="recipe.yaml")


def refusal(*arguments, **named):
    with pytest.raises(UsageError) as caught:
        load(*arguments, **named)
    return str(caught.value)


def names(*uris):
    sources = ", ".join(uri if uri.startswith("{") else f"{{uri: '{uri}'}}" for uri in uris)
    return [source.name for source in load(f"[{sources}]").data.sources]


def test_a_source_without_templates_takes_those_of_the_section():
    own = '{uri: b.jsonl, prompt: "{q}", completion: " {a}", loss_on: all}'
    first, second = load(f"[{{uri: a.jsonl}}, {own}]").data.sources

    assert (first.data.text, first.data.prompt, first.data.loss_on) == ("{text}", None, "completion")
    assert (second.data.text, second.data.prompt, second.data.loss_on) == (None, "{q}", "all")
    assert (second.data.fields, second.data.has_prompt) == (("q", "a"), True)
    assert first.data.max_record == second.data.max_record


def test_strings_are_one_source_as_ever():
    data = load("[a.jsonl, b.jsonl]").data
    (only,) = data.sources

    assert (only.uris, only.data, only.weight, only.epochs) == (("a.jsonl", "b.jsonl"), data, None, 1)
    assert data.held_out_sources == ()


def test_a_source_is_called_by_the_last_part_of_its_uri_that_is_a_name():
    assert names("s3://data/notes/*.jsonl", "s3://data/chats.jsonl", "s3://old/", "file:///x/[ab]/") == [
        "notes",
        "chats.jsonl",
        "old",
        "x",
    ]


def test_two_of_one_name_are_numbered_around_those_that_are_given():
    assert names("a/x.jsonl", "b/x.jsonl", "{uri: c, name: x.jsonl-2}") == ["x.jsonl", "x.jsonl-3", "x.jsonl-2"]
    assert names("a/x.jsonl", "{uri: c, name: x.jsonl}") == ["x.jsonl-2", "x.jsonl"]


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ("[{uri: a, weight: 1}, {uri: b}]", "give every source a `weight`, or none of them"),
        ("[{uri: a, weight: 1, epochs: 2}]", "data.train.0: give either `weight` or `epochs`"),
        ("[{uri: a, epochs: 2}]", "a source's `epochs` go with train.epochs, and train.steps is given"),
        ("[{uri: a, weight: 0}]", "data.train.0.weight"),
        ("[{uri: a, prompt: '{q}'}]", "data.train.0: give either `text`, or `prompt` and `completion`"),
        ("[{uri: a, loss_on: all}]", "data.train.0: `loss_on` goes with templates of the source's own"),
        ("[{uri: a, name: x}, {uri: b, name: x}]", "two sources are called 'x'"),
        ('[{uri: a, name: "x\\ny"}]', "data.train.0.name: a name is one line of printable characters"),
        ("[{uri: a}, b.jsonl]", "data.train.1: input should be a section of keys and values (it is 'b.jsonl')"),
        ("[{name: a}]", "data.train.0.uri: missing"),
        ("[{uri: a, wieght: 2}]", "data.train.0.wieght: unknown key; did you mean data.train.weight?"),
        ("[{uri: 's3://me:secret@bucket/a'}]", "data.train.0.uri.0: a URI holds no credentials"),
        ("{uri: a}", "data.train: input should be a list (it is a section of keys and values)"),
    ],
)
def test_what_is_wrong_with_a_source_is_said_where_it_stands(train, said):
    assert said in refusal(train)


def test_without_templates_in_the_section_every_source_needs_its_own():
    own = '[{uri: a, text: "{t}"}, {uri: b, prompt: "{q}", completion: "{a}"}]'

    assert load(own, rest="max_length: 64").data.sources[1].data.prompt == "{q}"
    assert "or give every source its own" in refusal("[{uri: a, text: '{t}'}, {uri: b}]", rest="max_length: 64")
    assert "give either `text`" in refusal(own, rest="validation: held.jsonl")
    held = "validation: [{uri: held.jsonl, text: '{t}'}]"
    (judged,) = load(own, rest=held).data.held_out_sources
    assert (judged.name, judged.data.text) == ("held.jsonl", "{t}")


def test_answers_need_a_prompt_in_some_held_out_source():
    with_prompt = '{uri: b, prompt: "{q}", completion: "{a}"}'
    answers = 'text: "{text}"\nevaluate: {answers: 2}'

    assert load(f"[{{uri: a}}, {with_prompt}]", rest=answers).evaluate.answers == 2
    assert "evaluate.answers needs data.prompt" in refusal("[{uri: a}]", rest=answers)
    held = f"validation: [{{uri: c}}]\n  {answers}"
    assert "evaluate.answers needs data.prompt" in refusal(f"[{{uri: a}}, {with_prompt}]", rest=held)


def test_sources_weights_and_order_are_identity_and_names_are_none():
    first, second = "{uri: a, weight: 1, name: x}", "{uri: b, weight: 2}"
    identity = identity_of(load(f"[{first}, {second}]"))

    assert identity == identity_of(load(f"[{first.replace(', name: x', '')}, {second}]"))
    assert identity != identity_of(load(f"[{second}, {first}]"))
    assert identity != identity_of(load(f"[{first}, {second.replace('2', '3')}]"))


def test_what_a_report_holds_is_read_again_as_the_same_recipe():
    recipe = load('[{uri: a, weight: 1}, {uri: [b, c], weight: 2, name: x, text: "{t}", loss_on: all}]')
    written = recipe.model_dump(mode="json")

    assert Recipe.model_validate(written) == recipe
    assert written["data"]["train"][0] == {"uri": ["a"], "weight": 1.0}


def test_a_section_of_one_kind_of_files_is_written_as_ever():
    """Runs of earlier versions are found again by what they recorded."""
    written = DataSection(train=("a.jsonl",), text="{text}").model_dump(mode="json")

    assert written["train"] == ["a.jsonl"]
