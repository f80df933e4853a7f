"""check: what comes first and what comes after torch, what it advises, and what it refuses as a run does."""

import json
import shutil

import pytest
from job_process import ROOT, environment_without_job, records, write_lines
from nvml_calls import LinkedGpus, play
from run_material import make_base
from terminals import lines_seen, terminal

from job.commands.check import FOR_A_PERSON
from job.core.plan.advice import of_recipe
from job.core.recipe.text import load_recipe


def rows(ended):
    return [(line[:2], line[4:15].strip()) for line in ended.stdout.splitlines() if line[:2] in {"ok", "NO", "!!"}]


def settings_of(base, **changes):
    path = base / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def own_base(job):
    job.recipe["model"]["base"] = str(shutil.copytree(job.recipe["model"]["base"], job.folder / "own-base"))
    return job.folder / "own-base"


def test_what_needs_torch_comes_last_and_quick_leaves_it_out(job):
    whole, quick = job.call("check"), job.call("check", "--quick")

    assert rows(whole)[-4:] == [("ok", "model"), ("!!", "serving"), ("ok", "weights"), ("ok", "self-test")]
    assert rows(quick) == rows(whole)[:-4]
    assert "as config.json promises: 21 tensors, 0.00 GB on this machine; fp32" in whole.stdout
    assert "24 training and 6 held-out examples" in quick.stdout
    assert quick.code == whole.code == 0


def test_a_node_with_gpus_says_how_they_are_linked(job, monkeypatch):
    play(monkeypatch, LinkedGpus("NVIDIA L40S", "NVIDIA L40S")).reaching = {(0, 1)}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    ended = job.call("check", "--quick", "--device", "auto")

    assert "ok  gpus        2 NVIDIA L40S: PCIe, across NUMA nodes\n" in ended.stdout
    assert ("ok", "gpus") not in rows(job.call("check", "--quick"))  # on the CPU they are nobody's business


def test_quick_comes_from_the_environment_as_well(job, monkeypatch):
    monkeypatch.setenv("JOB_QUICK", "1")

    assert ("ok", "model") not in rows(job.call("check"))


def test_what_needs_torch_is_still_refused(job):
    job.recipe["lora"]["targets"] = ["c_attn"]
    ended = job.call("check")

    assert ended.code == 64
    assert rows(ended)[-1] == ("NO", "model")
    assert job.call("check", "--quick").code == 0


def test_where_the_base_names_no_tokenizer_lengths_come_with_the_model(job, own_base):
    settings_of(own_base, tokenizer_class=None)
    whole, quick = job.call("check"), job.call("check", "--quick")

    assert "30 right lines, 0 wrong ones; lengths need the model's own classes" in quick.stdout
    assert rows(quick)[-1] == ("ok", "data")
    assert [row for row in rows(whole) if row[0] == "ok"][-5:-2] == [("ok", "model"), ("ok", "lengths"), ("ok", "plan")]
    assert "24 training and 6 held-out examples" in whole.stdout


def test_where_training_takes_another_tokenizer_lengths_are_counted_again(job, own_base, monkeypatch):
    monkeypatch.setattr("job.tune.model.tokenizer.named_positions", lambda _folder: 7)
    told = job.call("check").stdout

    assert "the base model has 7 positions" in told
    assert "covers the longest example" in told.split("ok  lengths")[1]


def test_wrong_lines_are_counted_once(job, own_base):
    with (job.data / "train.jsonl").open("a") as file:
        file.write("oops\n")
    ended = job.call("check")

    assert ended.code == 65
    assert [row for row in rows(ended) if row[0] == "NO"] == [("NO", "data")]


@pytest.mark.parametrize("command", ["check", "plan", "run"])
@pytest.mark.parametrize("length", [{"steps": 6}, {"steps": None, "epochs": 0.5}])
def test_a_warm_up_as_long_as_the_run_is_refused_by_every_command(job, command, length):
    job.recipe["train"] |= {**length, "warmup_steps": 6}
    ended = job.call(command)

    assert ended.code == 64
    assert "train.warmup_steps is 6 and the run has 6 steps" in ended.outcome["reason"]


def test_advice_has_rows_of_its_own_and_refuses_nothing(job):
    for name, rows in (("train", records(24)), ("validation", records(400, seed=1))):
        write_lines(job.data / f"{name}.jsonl", [row | {"answer": f" {row['answer']}"} for row in rows])
    job.recipe["data"] |= {"prompt": "{question}", "completion": "{answer}"}
    job.recipe["train"] |= {"batch_size": 32, "learning_rate": 0.1}
    job.recipe["evaluate"] |= {"every_steps": 6, "prompts": ["{question}"]}
    ended = job.call("check", "--quick")

    assert ended.code == 0
    said = [line[16:] for line in ended.stdout.splitlines() if line.startswith("!!  learning ")]
    for words in ("learning_rate 0.1", "nothing separates", "evaluate.prompts.0", "batch_size is 32", "max_examples: "):
        assert sum(words in each for each in said) == 1, words
    assert len(said) == 5


def test_the_suggested_number_of_examples_is_the_cure(job):
    write_lines(job.data / "validation.jsonl", records(2000, seed=1))
    write_lines(job.data / "train.jsonl", records(400, seed=2))
    job.recipe["train"] |= {"steps": 50, "batch_size": 32}
    job.recipe["evaluate"]["every_steps"] = 25
    before = job.call("check", "--quick").stdout
    enough = before.split("set evaluate.max_examples: ")[1].split()[0]
    after = job.call("check", "--quick", "--set", f"evaluate.max_examples={enough}").stdout

    assert "evaluation would take" in before
    assert "evaluation would take" not in after
    assert f"evaluations of {enough} examples, about 20% of the time" in after


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "recipes").glob("*.yaml")))
def test_the_recipes_that_ship_need_no_advice(name):
    path = ROOT / "recipes" / name

    assert of_recipe(load_recipe(path.read_text(), source=name)) == []


def test_a_person_is_told_within_ten_seconds_that_the_hub_does_not_answer():
    each = FOR_A_PERSON.answer_seconds + FOR_A_PERSON.longest_pause_seconds

    assert FOR_A_PERSON.attempts * each <= 10


def test_at_a_terminal_a_hub_that_is_away_is_asked_twice(job, warm):
    job.recipe["model"] = {"base": "owner/name", "revision": "0" * 40}
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "TERM": "xterm"}
    with terminal(200) as shown:
        child = warm.begin(
            job.command("check")[2:],
            environment=environment_without_job(environment),
            cwd=job.folder,
            stdout=shown.writer,
            stderr=shown.writer,
            forget=["huggingface_hub"],
        )
        code, text = child.wait(), shown.text()
    seen = "\n".join(lines_seen(text))

    assert code == 69
    assert "tried 2 times" in seen
    assert "30 right lines, 0 wrong ones; lengths need the base model" in seen
    assert "... base model" in text
    assert "... base model" not in seen


def test_what_a_server_refuses_is_said_by_its_name_and_refuses_no_run(job):
    job.recipe["lora"] |= {"r": 600, "targets": ["q_proj"]}
    ended = job.call("check")

    assert ended.code == 0
    said, base = [line[16:] for line in ended.stdout.splitlines() if line.startswith("!!  serving ")]
    assert said.startswith("vLLM refuses adapters of a rank above 512, and lora.r is 600: lower it")
    assert base.startswith("servers on transformers 4 (vLLM before 0.19.1) cannot read this base's tokenizer_config")


@pytest.mark.parametrize(("rows_of_the_head", "refused"), [(258_056, 1), (258_048, 0)])
def test_a_head_that_vllm_refuses_is_said_by_check_and_stands_in_the_report_with_the_adapter(
    job, tmp_path, rows_of_the_head, refused
):
    job.recipe["model"]["base"] = str(make_base(tmp_path / "large-head", rows=rows_of_the_head))
    job.recipe["lora"] |= {"r": 2, "targets": ["q_proj", "lm_head"]}
    job.recipe["train"] |= {"steps": 2, "warmup_steps": 1}
    job.recipe["evaluate"] |= {"every_steps": 2}
    said = (
        "vLLM refuses an adapter on lm_head of a vocabulary beyond 258,048, and this base has 258,056: leave lm_head "
        "out of lora.targets, or merge the adapter into the base (export) and serve that"
    )

    assert job.call("check").stdout.count(f"!!  serving     {said}") == refused
    ended = job.call("run")
    assert ended.code == 0, ended.stderr[-2000:]
    assert job.report()["adapter"]["refused_by"] == [said] * refused
    card, page = ((job.only_run() / name).read_text() for name in ("adapter/README.md", "report.html"))
    assert (said in card, said in page) == (bool(refused), bool(refused))
    assert ("vllm serve" in card, "vllm serve" in page) == (not refused, not refused)
