"""What is not learned is said: examples left out, ends at which the base does not stop, nothing better than it."""

import json
import shutil

import pytest
from job_process import records, write_lines


def advice(ended):
    return [line[16:] for line in ended.stdout.splitlines() if line.startswith("!!  learning ")]


def test_empty_answers_and_optional_fields_are_learned_as_they_should_be(job):
    rows = [row | {"input": ""} if n % 3 else row | {"input": 5} for n, row in enumerate(records(24))]
    write_lines(job.data / "train.jsonl", [*rows, {"question": "12 red hats", "answer": " "}])
    job.recipe["data"] |= {"prompt": "[{input?} of ]{question}\n", "completion": "{answer}"}
    ended = job.call("check", "--quick")

    assert ended.code == 0
    assert "24 training and 6 held-out examples" in ended.stdout
    assert 'lines left out: train.jsonl:25: "answer" is empty' in advice(ended)
    assert "data.train: 1 of 25 examples are left out (4.0%): 1 with an empty field" in advice(ended)


@pytest.mark.parametrize("command", ["check", "plan", "run"])
def test_too_many_that_cannot_be_learned_end_every_command(job, command):
    job.recipe["data"] |= {"max_length": 8, "unused_limit": 0.5}
    write_lines(job.data / "train.jsonl", [{"question": "12 red hats " * (2 + n % 3), "answer": "a"} for n in range(9)])
    ended = job.call(command)

    assert ended.code == 65
    told = (
        "data.train: 9 of 9 examples are left out (100.0%), more than data.unused_limit (50.0%) accepts: 9 with nothing"
    )
    assert told in ended.outcome["reason"]


def test_a_field_that_most_records_leave_empty_ends_the_job_even_where_wrong_lines_are_left_out(job):
    rows = [row | {"input": "" if n % 3 else "x"} for n, row in enumerate(records(24))]
    write_lines(job.data / "train.jsonl", rows)
    write_lines(job.data / "validation.jsonl", [row | {"input": "x"} for row in records(6, seed=1)])
    job.recipe["data"] |= {"prompt": "{input}: {question}\n", "on_bad_record": "skip", "bad_record_limit": 0.9}
    ended = job.call("check", "--quick")

    assert ended.code == 65
    assert "16 of 24 examples are left out" in ended.outcome["reason"]
    assert 'data.prompt: "[{input?}: ]{question}\\n"' in ended.outcome["reason"]


def test_a_run_says_what_it_did_not_learn(job):
    base = shutil.copytree(job.recipe["model"]["base"], job.folder / "own-base")
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 5]}))
    job.recipe["model"]["base"] = str(base)
    job.recipe["train"]["learning_rate"] = 1e-12
    with (job.data / "train.jsonl").open("a") as file:
        file.write('{"question": "12 red hats", "answer": ""}\n')
    stops = advice(job.call("check", "--quick"))
    ended = job.call("run")
    report = job.report()

    assert ended.code == 0
    assert report["sweet_spot"]["step"] == 0
    assert report["sweet_spot"]["reason"].startswith("nothing better than the base was found")
    assert report["data"]["train"]["empty"] == 1
    for told in (
        "nothing better than the base was found: none of 2 later evaluations has a significantly lower",
        'lines left out: train.jsonl:25: "answer" is empty',
        "data.train: 1 of 25 examples are left out",
        "the base's generation_config stops at <s> (1) and ",
    ):
        assert sum(note.startswith(told) for note in report["notes"]) == 1, told
    note = next(note for note in report["notes"] if "generation_config" in note)
    assert note in stops
    assert "the examples end with </s> (2): " in note
    assert note.endswith("give it eos_token_id 2 as well")


def test_a_base_that_stops_at_what_is_trained_is_no_matter(job):
    base = shutil.copytree(job.recipe["model"]["base"], job.folder / "own-base")
    job.recipe["model"]["base"] = str(base)
    for stops in (2, [5, 2]):
        (base / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
        assert not [each for each in advice(job.call("check", "--quick")) if "generation_config" in each]
