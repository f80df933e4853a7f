"""What would not learn is said before it is paid for, with numbers; what is usual is let alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.core.errors import UsageError
from job.core.plan.advice import evaluation_share, of_data, of_recipe, refuse_endless_warm_up
from job.core.plan.course import course_of, evaluation_count
from job.core.recipe.schema import Recipe

RECIPE = {
    "model": {"base": "./base"},
    "data": {"train": "file:///d/*.jsonl", "prompt": "Q: {question}\nA:", "completion": " {answer}"},
    "train": {"steps": 100, "batch_size": 8, "learning_rate": 2e-4},
    "evaluate": {"every_steps": 50, "prompts": ["Q: why?\nA:"]},
    "output": "file:///o",
}


def recipe(**changes):
    sections = {name: {**RECIPE[name], **changes.get(name, {})} for name in ("model", "data", "train", "evaluate")}
    return Recipe.model_validate({**RECIPE, **sections})


def advice(wanted, *, examples=1000, held_out=100, tokens=100):
    return of_data(
        wanted,
        course_of(wanted.train, examples=examples),
        held_out=held_out,
        training_tokens=examples * tokens,
        validation_tokens=held_out * tokens,
    )


def test_a_usual_recipe_gets_no_advice():
    assert of_recipe(recipe()) == []
    assert advice(recipe()) == []


# --- the warm-up -----------------------------------------------------------------------------------------------------


@given(steps=st.integers(1, 10_000), warmup=st.integers(0, 20_000))
def test_a_warm_up_is_refused_exactly_when_it_does_not_end_before_the_run(steps, warmup):
    course = course_of(recipe(train={"steps": steps}).train, examples=50)
    if warmup < steps:
        refuse_endless_warm_up(course, warmup_steps=warmup)
    else:
        with pytest.raises(UsageError, match=rf"warmup_steps is {warmup} and the run has {steps} steps"):
            refuse_endless_warm_up(course, warmup_steps=warmup)


def test_the_steps_of_epochs_count():
    course = course_of(recipe(train={"steps": None, "epochs": 2}).train, examples=40)

    with pytest.raises(UsageError, match=r"10 steps \(2 epochs of 40 examples, 8 a step\).*lower train.warmup_steps"):
        refuse_endless_warm_up(course, warmup_steps=10)


# --- what is said of the recipe alone --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "rate", "said"),
    [
        ("adamw_8bit", 1e-7, "1e-07 is out of the 1e-06 to 0.002 that are usual for adamw_8bit"),
        ("paged_adamw_8bit", 0.02, "training may diverge"),
        ("lion_8bit", 1e-3, "out of the 1e-07 to 0.0006"),
        ("adamw_torch", 2e-3, None),
        ("sgd", 0.5, None),
    ],
)
def test_a_learning_rate_out_of_the_usual_range(optimizer, rate, said):
    found = of_recipe(recipe(train={"optimizer": optimizer, "learning_rate": rate}))

    assert (said is None and found == []) or said in found[0]


@pytest.mark.parametrize(
    ("prompt", "completion", "apart"),
    [
        ("{question}", "{answer}", False),
        ("Q: {question} A:", "{answer}", False),
        ("Q: {question} A:", "it is {answer}", False),
        ("Q: {question} A:", " {answer}", True),
        ("{question}\n", "{answer}", True),
        ("{question} ", "{answer}", True),
        ("[INST] {question} [/INST]", "{answer}", True),
        ("<|user|>{question}<|assistant|>", "{answer}", True),
        ("{question}", "<answer>{answer}", True),
        ("\u554f\uff1a{question}\u7b54\uff1a", "{answer}", True),
    ],
)
def test_a_prompt_that_runs_into_its_completion(prompt, completion, apart):
    found = of_recipe(recipe(data={"prompt": prompt, "completion": completion}))

    assert ("nothing separates prompt and completion" in "".join(found)) is not apart


def test_one_text_has_no_border():
    assert of_recipe(recipe(data={"prompt": None, "completion": None, "text": "{question}{answer}"})) == []


def test_braces_in_a_prompt_are_asked_as_they_are():
    found = of_recipe(recipe(evaluate={"prompts": ["fine", "Q: {question} {question}\nA:", "{ } and {1} are text"]}))

    assert [each.split(",")[0] for each in found] == ["evaluate.prompts.1 holds {question}"]


# --- what is said of the data ----------------------------------------------------------------------------------------


def test_a_batch_larger_than_the_data():
    (found,) = advice(recipe(train={"batch_size": 64}), examples=40, held_out=50, tokens=100)

    assert "train.batch_size is 64, and there are 40 training examples" in found
    assert advice(recipe(train={"batch_size": 40}), examples=40, held_out=50) == []


@pytest.mark.parametrize(("held_out", "few"), [(49, True), (50, False)])
def test_few_held_out_examples(held_out, few):
    assert any("held-out examples are few" in each for each in advice(recipe(), held_out=held_out)) is few


def test_the_cost_of_fifty_thousand_held_out_examples_and_how_many_would_do():
    (found,) = advice(recipe(), examples=100_000, held_out=50_000)

    assert "about 98% of the time: 3 times 50,000 held-out examples; set evaluate.max_examples: 200" in found


def test_where_few_are_too_many_it_is_to_be_done_less_often():
    (found,) = advice(recipe(evaluate={"every_steps": 1}), held_out=60)

    assert "evaluate less often than every 1 steps" in found


def test_a_run_of_next_to_nothing_is_let_alone():
    assert advice(recipe(train={"steps": 2}), held_out=60) == []


@given(
    steps=st.integers(1, 3000),
    every=st.integers(1, 500),
    held_out=st.integers(50, 100_000),
    tokens=st.integers(1, 4000),
    validation_tokens=st.integers(1, 4000),
)
def test_what_is_suggested_takes_a_fifth_of_the_time_at_most(steps, every, held_out, tokens, validation_tokens):
    wanted = recipe(train={"steps": steps}, evaluate={"every_steps": every})
    course = course_of(wanted.train, examples=5000)

    def share(examples):
        return evaluation_share(
            wanted, course, training_tokens=5000 * tokens, validation_tokens=examples * validation_tokens
        )

    found = of_data(
        wanted,
        course,
        held_out=held_out,
        training_tokens=5000 * tokens,
        validation_tokens=held_out * validation_tokens,
    )
    said = [each for each in found if "evaluation would take" in each]
    assert not said or share(held_out) > 0.2
    if said and "max_examples" in said[0]:
        enough = int(said[0].rpartition(" ")[2])
        assert 50 <= enough < held_out
        assert share(enough) <= 0.2 + 1e-9
        assert share(enough + 1) > 0.2 - 1e-9


@pytest.mark.parametrize(("steps", "every", "count"), [(100, 50, 3), (101, 50, 4), (1, 50, 2), (50, 50, 2)])
def test_how_often_a_run_is_judged(steps, every, count):
    """At step 0, at each multiple, and at the end."""
    at = {0, steps, *range(0, steps + 1, every)}

    assert evaluation_count(steps, every) == len(at) == count
