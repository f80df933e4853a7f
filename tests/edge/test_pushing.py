"""A push makes or updates one repository, gives each refusal its code, and ends when it is asked to or must."""

import time

import pytest
from hub_stand_in import TOKEN, hub_stand_in

from job.core.errors import DeniedError, NotFoundError, StopRequestedError, UnavailableError, UsageError
from job.edge import pushing
from job.edge.pushing import HubRepository
from job.edge.store.patience import Patience

QUICK = Patience(attempts=3, budget_seconds=60.0, first_pause_seconds=0.01, longest_pause_seconds=0.01)


@pytest.fixture
def hub(monkeypatch):
    """The library reads its settings as it is loaded: here they are its own constants."""
    from huggingface_hub import constants

    with hub_stand_in() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
        monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", running.url)
        yield running


def repository(**changes):
    given = {"name": "someone/notes", "token": TOKEN, "should_stop": lambda: False, "on_beat": lambda: None}
    return HubRepository(**given | changes)


@pytest.fixture
def files(tmp_path):
    content = {
        "README.md": b"---\nbase_model: owner/name\n---\n# Card\n",
        "adapter_model.safetensors": b"weights" * 1000,
        "report.json": b"{}",
    }
    for name, each in content.items():
        (tmp_path / name).write_bytes(each)
    return {name: tmp_path / name for name in content}


def test_it_makes_a_private_repository_with_the_files(hub, files):
    pushed = repository().push(files, message="Run ab")
    made = hub.repositories["someone/notes"]

    assert made.private
    assert made.files == {name: path.read_bytes() for name, path in files.items()}
    assert made.commits == ["Run ab"]
    assert (pushed.repository, pushed.commit) == ("someone/notes", made.sha)
    assert pushed.url == f"{hub.url}/someone/notes/tree/{made.sha}"


def test_weights_go_by_lfs_also_where_xet_is_installed(hub, files):
    """As locked it is, and the library would take it."""
    from huggingface_hub.utils._runtime import is_xet_available

    assert is_xet_available()
    repository().push(files, message="Run ab")
    assert not [asked for asked in hub.asked if "xet" in asked]
    assert [asked for asked in hub.asked if asked.startswith("PUT /blobs/")]


def test_the_same_again_changes_nothing_and_another_file_alone_is_sent(hub, files):
    first = repository().push(files, message="Run ab")
    assert repository().push(files, message="Run ab").commit == first.commit
    assert hub.repositories["someone/notes"].commits == ["Run ab"]
    files["report.json"].write_bytes(b'{"a": 1}')
    uploads = [asked for asked in hub.asked if asked.startswith("PUT")]
    repository().push(files, message="Run cd")

    assert hub.repositories["someone/notes"].commits == ["Run ab", "Run cd"]
    assert hub.repositories["someone/notes"].files["report.json"] == b'{"a": 1}'
    assert [asked for asked in hub.asked if asked.startswith("PUT")] == uploads


def test_what_stands_there_already_stays(hub, files):
    repository().push({"README.md": files["README.md"]}, message="by hand")
    hub.repositories["someone/notes"].private = False
    repository().push(files, message="Run ab")

    assert set(hub.repositories["someone/notes"].files) == set(files)
    assert not hub.repositories["someone/notes"].private  # whose it is has made it public


def test_a_push_without_a_token_is_denied_before_the_hub_is_asked(hub, files):
    for token in (None, ""):
        with pytest.raises(DeniedError, match="HF_TOKEN is not set"):
            repository(token=token).push(files, message="a")
        with pytest.raises(DeniedError, match="HF_TOKEN is not set"):
            repository(token=token).look()
    assert not hub.asked


@pytest.mark.parametrize(
    ("status", "error", "words"),
    [
        (401, DeniedError, "the hub refuses it"),
        (403, DeniedError, "HTTP 403"),
        (404, NotFoundError, "correct the name"),
        (400, UsageError, "does not take it as it is"),
    ],
)
def test_a_refusal_is_final_and_has_its_code(hub, files, status, error, words):
    hub.refuse = lambda asked: status if "preupload" in asked else None
    with pytest.raises(error, match=words) as raised:
        repository().push(files, message="a", patience=QUICK)

    assert TOKEN not in str(raised.value)
    assert sum(count for asked, count in hub.asked.items() if "preupload" in asked) == 1


def test_a_card_that_the_hub_refuses_is_said_in_its_words(hub, files):
    files["README.md"].write_bytes(b"---\nbase_model: /models/base\n---\n")
    with pytest.raises(UsageError, match='"base_model" with value "/models/base" is not valid'):
        repository().push(files, message="a", patience=QUICK)
    assert hub.repositories["someone/notes"].files == {}


@pytest.mark.parametrize("status", [500, 503])
def test_a_hub_that_fails_is_asked_again_and_one_that_keeps_failing_is_unavailable(hub, files, monkeypatch, status):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    times = []

    def once(asked):
        times.append(asked)
        return status if asked == "POST /api/repos/create" and times.count(asked) == 1 else None

    hub.refuse = once
    repository().push(files, message="a", patience=QUICK)
    assert hub.repositories["someone/notes"].commits == ["a"]
    hub.refuse = lambda asked: status if asked == "POST /api/repos/create" else None
    with pytest.raises(UnavailableError, match=f"HTTP {status}.*tried 3 times"):
        repository().push(files, message="b", patience=QUICK)


def test_a_hub_that_does_not_answer_is_left_after_the_time_of_a_try(hub, files, monkeypatch):
    monkeypatch.setattr(pushing, "_TRY_SECONDS", 0.3)
    hub.refuse = lambda asked: 0 if "preupload" in asked else None
    beats = []
    with pytest.raises(UnavailableError, match=r"TimeoutError.*tried 3 times"):
        repository(on_beat=lambda: beats.append(1)).push(files, message="a", patience=QUICK)

    assert beats


def test_a_stop_is_heard_while_the_hub_is_waited_for(hub, files):
    hub.refuse = lambda asked: 0 if "preupload" in asked else None
    until = time.monotonic() + 0.5
    with pytest.raises(StopRequestedError, match="the next start of the job pushes it"):
        repository(should_stop=lambda: time.monotonic() > until).push(files, message="a")


def test_a_look_says_whose_the_token_is(hub):
    assert repository().look() == "someone"
    assert repository(name="lab/notes").look() == "someone"
    hub.account = {"name": "someone"}
    assert repository().look() == "someone"
    hub.account = []
    assert repository().look() == "None"


def test_a_token_that_cannot_write_there_is_denied(hub):
    with pytest.raises(DeniedError, match="HF_TOKEN is of someone, who is no member of others"):
        repository(name="others/notes").look()
    hub.account["auth"]["accessToken"]["role"] = "read"
    with pytest.raises(DeniedError, match="HF_TOKEN can only read"):
        repository().look()
    with pytest.raises(DeniedError, match="HTTP 401"):
        repository(token="hf_wrong").look()


def test_offline_and_pushing_contradict_each_other(hub, files, monkeypatch):
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    close_session()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="HF_HUB_OFFLINE is set"):
        repository().push(files, message="a", patience=QUICK)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    close_session()
