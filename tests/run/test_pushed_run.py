"""A run that is pushed: what stands on the hub, once over all attempts, and how loud a push is that failed."""

import hashlib
import json

import pytest
from hub_stand_in import TOKEN, hub_stand_in
from run_material import SECRETS


@pytest.fixture
def hub():
    with hub_stand_in() as running:
        yield running


@pytest.fixture
def pushing(job):
    job.recipe["output_hub"] = "someone/notes"
    job.recipe["train"]["steps"] = 2
    return job


def start(job, hub, *words, **environment):
    """A process that reads the hub's settings as its library is loaded."""
    given = hub.environment() | environment
    with job.begun(*(words or ("run",)), forget=["huggingface_hub"], **given) as running:
        return running.end()


def test_adapter_card_page_and_report_stand_on_the_hub_and_a_second_start_asks_for_nothing(pushing, hub):
    ended = start(pushing, hub)
    assert ended.code == 0, ended.stdout
    run, made = pushing.only_run(), hub.repositories["someone/notes"]

    assert made.private
    stored = {path.name: path.read_bytes() for path in (run / "adapter").iterdir()}
    stored |= {name: (run / name).read_bytes() for name in ("report.json", "report.html")}
    assert made.files == stored
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= set(stored)
    named = pushing.report()["adapter"]["files"]
    assert {name: hashlib.sha256(made.files[name]).hexdigest() for name in named} == {
        name: entry["sha256"] for name, entry in named.items()
    }
    noted = json.loads((run / "pushed.json").read_text())
    assert (noted["repository"], noted["commit"]) == ("someone/notes", made.sha)
    assert ended.named("pushed")[0]["url"] == noted["url"]
    assert TOKEN not in ended.stdout + ended.stderr
    assert not any(TOKEN.encode() in content for content in made.files.values())
    asked = hub.asked.total()
    again = start(pushing, hub)
    assert (again.code, hub.asked.total()) == (0, asked)
    assert again.named("already_pushed")


def test_a_push_that_failed_is_loud_and_the_next_start_does_nothing_but_push(pushing, hub):
    hub.refuse = lambda asked: None if "whoami" in asked else 403
    ended = start(pushing, hub)
    run = pushing.only_run()

    assert ended.code == 77
    reason = ended.outcome["reason"]
    assert reason.startswith(f"the run is done and its report stands at file://{run}, but output_hub: someone/notes: ")
    assert "HTTP 403" in reason
    report = (run / "report.json").read_bytes()
    assert json.loads((run / "attempts/01-end.json").read_text())["exit_code"] == 77
    hub.refuse = lambda _asked: None
    again = start(pushing, hub)
    assert again.code == 0
    assert "train" not in again.phases()
    assert (run / "report.json").read_bytes() == report
    assert hub.repositories["someone/notes"].files["report.json"] == report


def test_a_push_that_was_not_noted_is_made_again_and_is_one_commit(pushing, hub):
    """As of a process that was killed behind it."""
    assert start(pushing, hub).code == 0
    (pushing.only_run() / "pushed.json").unlink()
    assert start(pushing, hub).code == 0

    assert len(hub.repositories["someone/notes"].commits) == 1
    assert (pushing.only_run() / "pushed.json").exists()


def test_another_repository_gets_the_same_run(pushing, hub):
    assert start(pushing, hub).code == 0
    pushing.recipe["output_hub"] = "lab/notes"
    assert start(pushing, hub).code == 0
    assert len(pushing.runs()) == 1
    assert hub.repositories["lab/notes"].files == hub.repositories["someone/notes"].files


@pytest.mark.parametrize(("token", "words"), [("", "HF_TOKEN is not set"), ("hf_wrong", "HTTP 401")])
def test_a_token_that_cannot_push_is_refused_before_the_first_step(pushing, hub, token, words):
    ended = start(pushing, hub, HF_TOKEN=token)

    assert ended.code == 77
    assert words in ended.outcome["reason"]
    assert "load_model" not in ended.phases()
    checked = start(pushing, hub, "check", "--quick", HF_TOKEN=token)
    assert checked.code == 77
    assert any(line.startswith("NO  hub ") and words in line for line in checked.stdout.splitlines())


def test_a_hub_that_is_away_at_the_start_is_no_reason_not_to_train(pushing, hub):
    hub.refuse = lambda asked: 500 if "whoami" in asked else None
    ended = start(pushing, hub)

    assert ended.code == 0
    assert ended.named("hub_not_reached")
    assert hub.repositories["someone/notes"].commits


def test_a_secret_of_the_environment_is_not_pushed(pushing, hub):
    pushing.recipe["evaluate"]["prompts"] = [f"12 {SECRETS['MY_API_KEY']}\n"]
    ended = start(pushing, hub, MY_API_KEY=SECRETS["MY_API_KEY"])

    assert ended.code == 77
    assert "holds the value of a secret of this environment and is not pushed" in ended.outcome["reason"]
    assert hub.repositories == {}


def test_check_says_whose_token_it_is(pushing, hub):
    checked = start(pushing, hub, "check", "--quick")

    assert checked.code == 0
    assert "ok  hub         someone/notes: HF_TOKEN is of someone, and can write" in checked.stdout
    assert hub.repositories == {}
