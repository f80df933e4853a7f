"""The recipe: what it takes, what it refuses, and that it says so all at once, with lines."""

from pathlib import Path

import jsonschema
import pytest
import yaml
from pydantic import ValidationError

from job.core.errors import UsageError
from job.core.given import Given, set_lines
from job.core.recipe.data_section import DataSection, Fraction, template_fields
from job.core.recipe.mistakes import OTHER_WORDS, known_keys
from job.core.recipe.schema import Recipe, identity_of, is_hub_id
from job.core.recipe.text import _Loader, load_recipe

SHIPPED = sorted((Path(__file__).parents[3] / "recipes").glob("*.yaml"))
COMMIT = "01c7f73d771dfac7d292323805ebc428287df4f9"
SMALL = """\
model: {base: ./base}
data:
  train: s3://notes/train.jsonl
  text: "{text}"
train:
  steps: 3
  batch_size: 2
  learning_rate: 2e-4
output: s3://models/notes
"""


def load(text=SMALL, *overrides):
    given = [each if isinstance(each, Given) else Given(text=each, source="--set") for each in overrides]
    return load_recipe(text, source="recipe.yaml", overrides=given)


def refusal(text=SMALL, *overrides):
    """What is said about a wrong recipe."""
    with pytest.raises(UsageError) as caught:
        load(text, *overrides)
    return str(caught.value)


def test_a_small_recipe_gets_the_defaults():
    recipe = load()

    assert recipe.data.train == ("s3://notes/train.jsonl",)
    assert recipe.data.validation == Fraction(fraction=0.05)
    assert (recipe.data.max_length, recipe.lora.targets) == ("auto", "all-linear")
    assert (recipe.lora.r, recipe.lora.alpha, recipe.lora.dropout) == (32, 64, 0)
    assert (recipe.train.optimizer, recipe.train.schedule, recipe.train.seed) == ("adamw_8bit", "linear", 0)


@pytest.mark.parametrize(("written", "value"), [("2e-4", 2e-4), ("2.5E-5", 2.5e-5), (".5e-3", 5e-4), ("1e0", 1.0)])
def test_a_number_with_an_exponent_needs_no_point(written, value):
    """YAML 1.1 takes `2e-4` for text."""
    assert load(SMALL.replace("2e-4", written)).train.learning_rate == value


def test_every_mistake_is_told_at_once_with_its_line():
    told = refusal(
        """\
model: {base: ./base}
data:
  train: []
  text: "{text"
  tekst: oops
train:
  steps: 3.5
  batch_size: 0
  learning_rate: fast
lora:
  r: -1
ouput: s3://models/notes
"""
    )

    first, *mistakes = told.splitlines()
    assert first == "recipe.yaml: 9 mistakes in the recipe (docs/recipe.md lists the keys)"
    places = {line.strip().rsplit(": ", 1)[0].split(": ")[0] + " " + line.split(": ")[1] for line in mistakes}
    assert places == {
        "recipe.yaml:3 data.train",
        "recipe.yaml:4 data.text",
        "recipe.yaml:5 data.tekst",
        "recipe.yaml:7 train.steps",
        "recipe.yaml:8 train.batch_size",
        "recipe.yaml:9 train.learning_rate",
        "recipe.yaml:11 lora.r",
        "recipe.yaml:12 ouput",
        "recipe.yaml:1 output",
    }


def test_an_unknown_key_is_a_mistake_in_every_section():
    for section in Recipe.model_fields:
        if section not in {"output", "output_hub"}:
            assert f"--set {section}.nope: {section}.nope: unknown key" in refusal(SMALL, f"{section}.nope=1")


def test_a_missing_key_is_named_where_its_section_begins():
    assert "recipe.yaml:5: train.batch_size: missing" in refusal(SMALL.replace("  batch_size: 2\n", ""))


def test_a_wrong_entry_of_a_list_is_named_by_its_line():
    told = refusal(SMALL.replace("s3://notes/train.jsonl", "\n    - a.jsonl\n    - 5"))

    assert "recipe.yaml:5: data.train.1: input should be text (it is 5)" in told


def test_a_key_that_stands_twice_is_refused():
    assert refusal(SMALL + "output: s3://other\n") == 'recipe.yaml:10: not valid YAML: the key "output" stands twice'
    assert "recipe.yaml:7" in refusal(SMALL.replace("  steps: 3\n", "  steps: 3\n  steps: 3\n"))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "this is empty"),
        ("# only a comment\n", "this is empty"),
        ("- a\n- b\n", "this is a list"),
        ("hello", "this is 'hello'"),
        ("a: [1, 2", "recipe.yaml:1: not valid YAML"),
        ("a: 1\n\tb: 2\n", "recipe.yaml:2: not valid YAML"),
        ("a: \0", "not valid YAML"),
        ("a: 2024-13-45", "not valid YAML"),
        ("? [a]\n: b\n", "recipe.yaml:1: not valid YAML: a key is plain text"),
        ("{a: 1}: b\n", "a key is plain text"),
        ("a: " + "[" * 3000, "not valid YAML"),
        ("a: !!python/object/apply:os.getcwd []", "recipe.yaml:1: not valid YAML"),
        ("a: *b", "recipe.yaml:1: not valid YAML"),
        ("on: 1\n" + SMALL, "keys should be strings (it is true)"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_what_is_no_recipe_at_all_is_refused_with_a_reason(text, reason):
    assert reason in refusal(text)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("data.validation=0.2", "data.validation: input should be a section of keys and values (it is 0.2)"),
        ("data.train=5", "data.train: input should be a list (it is 5)"),
        ("data.train=[]", "data.train: the list is empty"),
        ("data.text={text}", "input should be text (it is a section of keys and values; put quotes around text"),
        ("train=[]", "train: input should be a section of keys and values (it is a list)"),
        ("train.steps=1.5", "train.steps: input should be a whole number (it is 1.5)"),
        ("train.steps=true", "train.steps: input should be a whole number (it is true)"),
        ("train.learning_rate=fast", "train.learning_rate: input should be a number (it is 'fast')"),
        ("store.checksums=0", "store.checksums: input should be true or false (it is 0)"),
        ("output=", "output: input should be text (it is empty)"),
    ],
)
def test_a_value_of_the_wrong_kind_is_told_in_yamls_words(override, told):
    assert told in refusal(SMALL, override)


@pytest.mark.parametrize(
    "override",
    [
        *("train.learning_rate=0", "train.learning_rate=-1e-4", "train.learning_rate=.nan", "train.learning_rate=.inf"),
        *("train.learning_rate=true", "train.learning_rate='2e-4'", "train.batch_size=true", "train.batch_size=2.0"),
        *("train.steps=0", "train.warmup_steps=-1", "train.optimizer=adam", "train.schedule=step"),
        *("train.seed=-1", f"train.seed={2**63}", "train.max_grad_norm=0", "train.weight_decay=-0.1"),
        *("lora.dropout=1", "lora.dropout=-0.1", "lora.alpha=0", "lora.targets=[]", "lora.targets=all"),
        *("data.max_length=7", "data.max_length=512.0", "data.max_length=long", "data.bad_record_limit=1"),
        *("data.validation={fraction: 0}", "data.validation={fraction: 1}", "data.validation={}", "data.validation=[]"),
        *("data.train=''", "data.on_bad_record=ignore", "data.too_long=keep", "data.loss_on=prompt"),
        *("checkpoint.every_steps=0", "checkpoint.keep=0", "evaluate.patience=0", "evaluate.prompts=['']"),
        *("store.checksums=1", "track.trackers=[comet]", "output=''", "model.base=''", "lora=5"),
    ],
)
def test_a_value_out_of_bounds_or_of_another_kind_is_refused(override):
    key = override.partition("=")[0]

    assert f"--set {key}" in refusal(SMALL, override)


def test_a_whole_number_is_also_a_number():
    assert load(SMALL, "train.learning_rate=1", "lora.alpha=16").lora.alpha == 16


def test_the_loss_needs_one_way_to_make_text():
    reason = "data: give either `text`, or `prompt` and `completion`"

    assert reason in refusal(SMALL.replace('  text: "{text}"\n', ""))
    assert reason in refusal(SMALL, "data.prompt='{q}'")
    assert reason in refusal(SMALL, "data.prompt='{q}'", "data.completion='{a}'")
    assert reason in refusal(SMALL, "data.prompt='{q}'", "data.text=")
    assert reason in refusal(SMALL, "data.completion='{a}'", "data.text=null")
    assert load(SMALL, "data.prompt='{q}'", "data.completion='{a} {q}'", "data.text=").data.fields == ("q", "a")


def test_a_run_has_steps_or_epochs():
    assert "train: give either `steps` or `epochs`" in refusal(SMALL, "train.epochs=3")
    assert "train: give either `steps` or `epochs`" in refusal(SMALL, "train.steps=null")
    assert load(SMALL, "train.steps=null", "train.epochs=0.5").train.epochs == 0.5


def test_answers_need_a_prompt():
    assert "evaluate.answers needs data.prompt" in refusal(SMALL, "evaluate.answers=3")
    assert load(SMALL, "data={train: a, prompt: '{q}', completion: '{a}'}", "evaluate.answers=3").evaluate.answers == 3


def test_a_hub_id_names_its_full_commit():
    hub = SMALL.replace("base: ./base", "base: owner/name")
    with_commit = SMALL.replace("base: ./base", f"base: owner/name, revision: {COMMIT}")

    assert "owner/name is a hub id" in refusal(hub)
    for moving in ("main", COMMIT[:7], COMMIT.upper(), COMMIT + "0"):
        assert "model.revision: string should match pattern" in refusal(hub, f"model.revision='{moving}'")
    assert load(with_commit).model.revision == COMMIT


@pytest.mark.parametrize(
    "base", ["./base", "../base", "/models/base", "base", "s3://models/base", "a/b/c", ".demo/base"]
)
def test_only_a_hub_id_has_a_revision(base):
    assert not is_hub_id(base)
    assert load(SMALL, f"model.base={base}").model.revision is None
    assert "only a hub id has a revision" in refusal(SMALL, f"model.base={base}", f"model.revision='{COMMIT}'")


@pytest.mark.parametrize(
    "uri",
    [
        "s3://AKIAEXAMPLE:wJalrXUtnFEMI@bucket/prefix",
        "s3://AKIAEXAMPLE:wJalr/XUtn/FEMI@bucket/prefix",
        "S3://AKIAEXAMPLE:wJalrXUtnFEMI@bucket/prefix",
    ],
)
@pytest.mark.parametrize("key", ["output", "data.train", "model.base"])
def test_credentials_in_a_uri_are_refused_and_not_repeated(uri, key):
    told = refusal(SMALL, f"{key}={uri}")

    assert "a URI holds no credentials" in told
    assert "wJalr" not in told


def test_a_colon_or_an_at_sign_in_a_key_is_no_credential():
    assert load(SMALL, "output=s3://models/a:b@c").output == "s3://models/a:b@c"


@pytest.mark.parametrize(
    ("template", "fields"),
    [
        ("### Question: {input}\n ### Answer: {output}", ["input", "output"]),
        ("{{literal}} {field}", ["field"]),
        ("{a}{b}{a}", ["a", "b", "a"]),
        ("{first name} {naïve} {_x-1}", ["first name", "naïve", "_x-1"]),
        ("nothing {{here}}", []),
        ("{meta.lang} [{input?}]", ["meta.lang", "input"]),
    ],
)
def test_a_template_names_its_fields(template, fields):
    assert template_fields(template) == fields


@pytest.mark.parametrize(
    "template", ["{a.}", "{.a}", "{a[0]}", "{a!r}", "{a:>3}", "{}", "{0}", "{ a }", "{a", "a}", "{a{b}}"]
)
def test_a_template_holds_plain_field_names_only(template):
    """Anything more could reach into Python objects."""
    with pytest.raises(ValueError, match=r"brace|field|'[{}]'"):
        template_fields(template)
    with pytest.raises(ValidationError):
        DataSection(train=("a",), text=template)


def test_a_template_without_a_field_is_refused():
    assert "names no field of the record" in refusal(SMALL, "data.text='always the same'")


def test_a_nested_key_is_set_and_the_last_one_wins():
    recipe = load(SMALL, "lora.r=8", "lora.r=16", "data.validation.fraction=0.1", "evaluate.prompts=[a, 'b: c']")

    assert recipe.lora.r == 16
    assert recipe.data.validation == Fraction(fraction=0.1)
    assert recipe.evaluate.prompts == ("a", "b: c")


def test_a_value_that_is_set_may_hold_an_equals_sign():
    assert load(SMALL, "data.text=x={text}").data.text == "x={text}"


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("lora.r", "--set lora.r: write section.key=value"),
        ("=5", "--set =5: write section.key=value"),
        ("lora..r=5", "write section.key=value"),
        ("lora.rank=5", "--set lora.rank: lora.rank: unknown key"),
        ("nope.r=5", "--set nope: nope: unknown key"),
        ("lora={rank: 5}", "--set lora.rank: lora.rank: unknown key"),
        ("output.x=5", "output is 's3://models/notes' in the recipe, not a section"),
        ("lora.targets=[a", "--set lora.targets=[a: the value is not valid YAML; quote it"),
        ("track.project=2024-13-45", "the value is not valid YAML; quote it"),
        ("lora.targets=" + "[" * 3000, "the value is not valid YAML; quote it"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_wrong_override_is_named_as_such(override, told):
    assert told in refusal(SMALL, override)


def test_a_wrong_override_is_named_by_where_it_came_from():
    wrong = [Given(text="lora.rank=5", source="JOB_SET"), Given(text="lora.r=0", source="--set")]
    told = refusal(SMALL, *wrong)

    assert "JOB_SET lora.rank: lora.rank: unknown key" in told
    assert "--set lora.r: lora.r: input should be greater than 0" in told
    assert "JOB_SET lora.r: write section.key=value" in refusal(SMALL, Given(text="lora.r", source="JOB_SET"))


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("train.learningrate=1", "train.learning_rate"),
        ("train.batchsize=1", "train.batch_size"),
        ("trian.steps=1", "train"),
        ("data.validation.fractoin=0.1", "data.validation.fraction"),
        ("lora.learning_rate=1", "train.learning_rate"),
        ("max_lenght=512", "data.max_length"),
        ("data.every_step=5", "checkpoint.every_steps or evaluate.every_steps"),
        ("train.lr=1", "train.learning_rate"),
        ("lora.rank=8", "lora.r"),
        ("train.optimizer=adamw8bit", "adamw_8bit"),
        ("train.schedule=linaer", "linear"),
    ],
)
def test_the_key_or_choice_that_was_meant_is_told(override, meant):
    assert f"; did you mean {meant}?" in refusal(SMALL, override)


def test_nothing_is_suggested_for_what_looks_like_no_key():
    assert "did you mean" not in refusal(SMALL, "train.zzz=1", "train.optimizer=zzz")


def test_what_other_trainers_call_a_key_is_none_here_and_names_one_of_ours():
    known = {*known_keys()}
    assert {*OTHER_WORDS.values()} <= known
    assert {*OTHER_WORDS} & {key.rpartition(".")[2] for key in known} == set()


def test_what_overruled_an_override_is_told():
    given = [
        Given(text="lora.r=8", source="JOB_SET"),
        Given(text="lora.alpha=8", source="JOB_SET"),
        Given(text="lora.r=16", source="--set"),
    ]

    assert set_lines(given) == [
        "lora.r = 8, by JOB_SET, overruled by --set",
        "lora.alpha = 8, by JOB_SET",
        "lora.r = 16, by --set",
    ]


def test_a_recipe_is_frozen():
    recipe = load()

    with pytest.raises(ValidationError, match="frozen"):
        recipe.output = "s3://elsewhere"
    with pytest.raises(ValidationError, match="frozen"):
        recipe.train.steps = 5


def test_the_identity_is_what_can_change_weights_or_their_evaluation():
    same = ("checkpoint.every_steps=7", "store.checksums=false", "track.project=x", "output=s3://elsewhere/x")
    same += ("output_hub=someone/notes",)
    same += ("model.quantised_copies=s3://elsewhere/copies",)
    same += ("data.max_record=2000",)  # a record that is too long ends the job; where it is left out it does matter
    other = ("train.seed=1", "lora.r=8", "data.text='{x}'", "evaluate.max_examples=5", "model.base=./other")

    for override in same:
        assert identity_of(load(SMALL, override)) == identity_of(load()), override
    for override in other:
        assert identity_of(load(SMALL, override)) != identity_of(load()), override
    skipping = load(SMALL, "data.on_bad_record=skip")
    assert identity_of(load(SMALL, "data.on_bad_record=skip", "data.max_record=2000")) != identity_of(skipping)


def test_a_default_that_is_written_out_leaves_the_identity_alone():
    written_out = load(SMALL, "lora.alpha=64", "train.weight_decay=0", "data.validation={fraction: 0.05}")

    assert identity_of(written_out) == identity_of(load())


def test_a_recipe_comes_back_from_its_json_values():
    recipe = load()

    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe


def test_recipes_are_shipped():
    assert SHIPPED


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_a_shipped_recipe_is_right_and_the_json_schema_says_so_too(path):
    text = path.read_text(encoding="utf-8")
    load_recipe(text, source=path.name)
    plain = yaml.load(text, Loader=_Loader)  # YAML's own would read 2e-4 as text

    validator = jsonschema.Draft202012Validator(Recipe.model_json_schema())
    assert [error.message for error in validator.iter_errors(plain)] == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"nope": 1},
        {"lora": {"r": 0}},
        {"lora": {"rank": 5}},
        {"model": {"base": "owner/name", "revision": "main"}},
        {"data": {"train": [], "text": "{text}"}},
        {"data": {"train": "a", "text": "{text}", "validation": {"fraction": 2}}},
    ],
)
def test_the_json_schema_refuses_what_the_recipe_refuses(wrong):
    validator = jsonschema.Draft202012Validator(Recipe.model_json_schema())
    right = load().model_dump(mode="json", exclude_none=True)

    assert validator.is_valid(right)
    assert not validator.is_valid({**right, **wrong})


def test_a_warm_up_that_would_not_happen_is_a_mistake():
    with pytest.raises(UsageError, match="constant_with_warmup"):
        load(SMALL, "train.warmup_steps=5", "train.schedule=constant")


@pytest.mark.parametrize(
    ("uri", "meant"),
    [
        ("file:///my%20data%20%5Bv1%5D%20100%25/a.jsonl", "/my data [v1] 100%/a.jsonl"),
        ("file:///my data [v1] 100%/a.jsonl", "file:///my data [v1] 100%/a.jsonl"),
        ("file:///gr%C3%B6%C3%9Fe", "/größe"),
        ("/my%20data", "/my%20data"),
        ("s3://data/my%20data", "s3://data/my%20data"),
    ],
)
def test_a_file_uri_is_decoded_once_and_a_path_is_not(uri, meant):
    recipe = load(SMALL, f"output='{uri}'", f"data.train='{uri}'")
    assert (recipe.output, recipe.data.train) == (meant, (meant,))
    assert load(SMALL, f"output='{recipe.output}'").output == meant


@pytest.mark.parametrize("signs", ["%00", "%FF"])
def test_a_file_uri_of_no_path_is_refused(signs):
    assert "data.train" in refusal(SMALL, f"data.train='file:///a{signs}'")


def test_what_decides_only_whether_the_job_ends_changes_no_identity():
    for key in ("data.unused_limit=0.5", "data.strict_types=true"):
        assert identity_of(load(SMALL, key)) == identity_of(load(SMALL))
    skip = "data.on_bad_record=skip"
    assert identity_of(load(SMALL, skip, "data.strict_types=true")) != identity_of(load(SMALL, skip))


def test_the_hub_s_repository_has_an_owner_and_a_name():
    assert load(SMALL).output_hub is None
    assert load(SMALL, "output_hub=some-one/notes.v1").output_hub == "some-one/notes.v1"
    for wrong in ("notes", "a/b/c", "/notes", "'a/b c'", "https://hub/a/b", "''"):
        assert "output_hub" in refusal(SMALL, f"output_hub={wrong}")
