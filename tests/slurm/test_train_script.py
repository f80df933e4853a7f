"""slurm/train.sbatch decides as the table of exit codes says, and starts no job again that nobody wants."""

import json
import os
import shutil
import signal
import time

import pytest
from stand_ins import (
    CANCELLED,
    CANCELLED_IN_GRACE,
    NOBODY_ANSWERS,
    PATIENCE_SECONDS,
    PREEMPTED,
    QUEUED_AGAIN,
    RUNNING,
    TIME_OUT,
    Desk,
    bash,
)

from job.core.errors import ENDINGS, Again

WORDS = {Again.ALWAYS: "always", Again.COUNTED: "counted", Again.ELSEWHERE: "elsewhere"}


@pytest.fixture
def desk(tmp_path):
    desk = Desk(tmp_path)
    yield desk
    desk.clear()


def wait_for(path):
    end = time.monotonic() + PATIENCE_SECONDS
    while not path.exists():
        assert time.monotonic() < end, f"{path} does not come"
        time.sleep(0.02)


# --- the table -------------------------------------------------------------------------------------------------------


def test_every_exit_code_leads_to_what_the_table_in_the_code_says():
    """All codes that a process can end with, those of no row of the table included: they are never started again."""
    expected = {row.code: WORDS.get(row.again, "never") for row in ENDINGS}
    words = bash("for code in {0..255}; do again $code; done").split()

    assert words == [expected.get(code, "never") for code in range(256)]
    assert {"always", "counted", "elsewhere", "never"} == set(words)


@pytest.mark.parametrize("code", [0, 64, 65, 66, 77, 78, 80, 81, 84, 1, 137])
def test_what_does_not_help_is_not_started_again(desk, code):
    desk.behave(f"exit {code}")
    done = desk.start()

    assert done.code == code
    assert done.requeued == []


@pytest.mark.parametrize("code", [69, 70, 74, 75, 82, 83])
def test_what_may_help_is_started_again_and_the_job_s_exit_code_is_the_script_s(desk, code):
    desk.behave(f"exit {code}")
    done = desk.start()

    assert done.code == code
    assert done.requeued == ["7"]


def test_failures_are_counted_and_stops_on_request_are_not(desk):
    """SLURM_RESTART_COUNT counts both, so the script counts the failures itself."""
    requeued = []
    for restarts, code in enumerate([75, 75, 69, 75, 83, 75, 70, 75, 69]):
        desk.behave(f"exit {code}")
        requeued.append(bool(desk.start(restarts=restarts).requeued))

    assert requeued == [True] * 8 + [False]


def test_the_limit_can_be_chosen(desk):
    desk.behave("exit 69")

    assert [bool(desk.start(restarts=n, QLORA_RETRIES="1").requeued) for n in range(2)] == [True, False]


def test_where_nothing_can_be_written_down_slurm_s_own_count_is_the_bound(desk):
    desk.behave("exit 69")
    (desk.folder / "qlora-job-7").write_text("a file where the folder belongs")

    assert desk.start(restarts=2).code == 74
    assert desk.start(restarts=2).requeued == ["7"]
    assert desk.start(restarts=3).requeued == []


def test_a_count_that_was_removed_begins_with_slurm_s_own(desk):
    """Else a job whose folder is tidied away fails for ever."""
    desk.behave("exit 69")

    assert desk.start(restarts=2).requeued == ["7"]
    shutil.rmtree(desk.folder / "qlora-job-7")
    assert desk.start(restarts=3).requeued == []


def test_a_failure_that_the_job_calls_final_is_not_started_again(desk):
    """The same failure at the same step twice: the code alone does not tell."""
    desk.behave("exit 70", outcome={"state": "ended", "code": 70, "again": "no", "reason": "twice"})
    done = desk.start()

    assert done.code == 70
    assert done.requeued == []


# --- who ended it ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shown", "by"),
    [
        (RUNNING, "itself"),
        (CANCELLED, "person"),
        (CANCELLED_IN_GRACE, "person"),
        (QUEUED_AGAIN, "slurm"),
        (PREEMPTED, "preemption"),
        (TIME_OUT, "time"),
    ],
)
def test_what_slurm_shows_tells_who_ended_the_job(shown, by):
    about = shown.format(restarts=2, more=3, excluded="(null)")
    found = bash(f"asked=TERM SLURM_RESTART_COUNT=2 id=7; scontrol() {{ echo '{about}'; }}; ended_by")

    assert found == f"{by}\n"


@pytest.mark.parametrize(
    ("shown", "again"),
    [
        (CANCELLED, []),
        (CANCELLED_IN_GRACE, []),
        (QUEUED_AGAIN, []),
        (PREEMPTED, ["7"]),
        (TIME_OUT, ["7"]),
        (RUNNING, ["7"]),
    ],
)
def test_a_cancelled_job_is_never_brought_back_and_a_queued_one_not_queued_twice(desk, shown, again):
    """scontrol requeue would start a cancelled job again."""
    desk.behave("exit 75")

    assert desk.start(job=shown).requeued == again


def test_when_slurm_does_not_answer_a_stopped_job_is_left_alone(desk):
    """It may have been cancelled."""
    desk.behave("trap 'exit 75' USR2; touch $DESK/up; while true; do read -r -t 0.1 <> <(:); done")
    running = desk.begin(job=NOBODY_ANSWERS)
    wait_for(desk.folder / "up")
    running.send_signal(signal.SIGTERM)

    assert running.wait(PATIENCE_SECONDS) == 75
    assert desk.calls() == []


# --- stopping --------------------------------------------------------------------------------------------------------

SAVES = (
    "trap 'stop=1' USR2; touch $DESK/up; until [[ -n ${stop:-} ]]; do read -r -t 0.1 <> <(:); done; sleep 1; exit 75"
)


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_a_request_to_stop_reaches_the_job_and_the_script_waits_for_its_end(desk, number):
    desk.behave(SAVES)
    running = desk.begin()
    wait_for(desk.folder / "up")
    running.send_signal(number)

    assert running.wait(PATIENCE_SECONDS) == 75
    assert desk.calls() == ["scontrol requeue 7"]


def test_a_request_to_stop_before_the_start_is_kept(desk):
    """Nothing is started, nothing is lost, and it is queued again."""
    (desk.folder / "slow").touch()
    running = desk.begin()
    wait_for(desk.folder / "preparing")
    running.send_signal(signal.SIGUSR2)
    (desk.folder / "slow").unlink()

    assert running.wait(PATIENCE_SECONDS) == 75
    assert desk.calls() == ["scontrol requeue 7"]
    assert not (desk.folder / "arguments").exists()


def test_a_burst_of_signals_does_not_lose_the_job_s_exit_code(desk):
    """CONT, USR2 and TERM arrive back to back; each interrupts bash's `wait`."""
    desk.behave(SAVES)
    running = desk.begin(QLORA_TELL_SECONDS="0")
    wait_for(desk.folder / "up")
    for _ in range(40):
        for number in (signal.SIGCONT, signal.SIGUSR2, signal.SIGTERM):
            if running.poll() is None:
                os.kill(running.pid, number)
        time.sleep(0.005)

    assert running.wait(PATIENCE_SECONDS) == 75


def test_a_job_that_did_not_listen_yet_lost_nothing(desk):
    """Ended by the signal itself, before its handlers were set: that is a stop on request, no failure."""
    desk.behave("touch $DESK/up; while true; do sleep 0.1; done")
    running = desk.begin()
    wait_for(desk.folder / "up")
    running.send_signal(signal.SIGUSR2)

    assert running.wait(PATIENCE_SECONDS) == 75
    assert desk.calls() == ["scontrol requeue 7"]


# --- 82: elsewhere ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("had", "then"), [("(null)", "n1"), ("n9", "n9,n1")])
def test_after_82_the_queued_job_avoids_the_node_besides_those_it_avoided_before(desk, had, then):
    desk.behave("exit 82")
    done = desk.start(excluded=had)

    assert done.calls == ["scontrol requeue 7", f"scontrol update JobId=7 ExcNodeList={then}"]


def test_the_last_node_is_not_excluded(desk):
    """The job would wait for ever."""
    desk.behave("exit 82")
    desk.nodes("n1", "n9")
    done = desk.start(excluded="n9")

    assert done.calls == ["scontrol requeue 7"]
    assert "no other node is left in gpu" in done.said


# --- what is told, what is left --------------------------------------------------------------------------------------


def test_the_outcome_file_becomes_the_job_s_comment_and_stays_beside_the_log(desk):
    outcome = {"state": "ended", "code": 0, "reason": 'it\'s "done"', "run_uri": "s3://models/notes/runs/x"}
    desk.behave("exit 0", outcome=outcome)
    done = desk.start()

    assert [json.loads(text) for text in done.comments] == [outcome]
    assert json.loads((desk.folder / "qlora-job-7" / "outcome.json").read_text()) == outcome


def test_the_comment_is_kept_current_while_the_job_runs(desk):
    """The job here goes on only when the comment says what it wrote; it writes at one stroke, as the real one does."""
    written = 'echo "{\\"step\\": $n}" > "$JOB_OUTCOME_FILE.new"; mv "$JOB_OUTCOME_FILE.new" "$JOB_OUTCOME_FILE"'
    seen = 'until grep -q "Comment=.*step.*$n" "$DESK/calls"; do sleep 0.1; done'
    desk.behave(f"for n in 1 2 3; do {written}; {seen}; done; exit 0", outcome={"step": 0})
    done = desk.start(QLORA_TELL_SECONDS="0")

    assert [json.loads(text)["step"] for text in done.comments][-3:] == [1, 2, 3]


def test_a_comment_is_as_long_as_slurm_takes(desk):
    desk.behave("exit 0", outcome='{"reason": "' + "ü" * 3000)

    assert [900 < len(text.encode()) <= 1024 for text in desk.start().comments] == [True]


def test_where_comments_are_not_allowed_it_is_asked_once(desk):
    desk.refuse("update")
    desk.behave('for n in 1 2 3; do echo $n > "$JOB_OUTCOME_FILE"; sleep 0.5; done; exit 0', outcome="0")
    done = desk.start(QLORA_TELL_SECONDS="0")

    assert done.code == 0
    assert len(done.comments) == 1


def test_slurm_may_refuse_to_queue_it_again_and_the_exit_code_stays(desk):
    desk.refuse("requeue")
    desk.behave("exit 75")
    done = desk.start()

    assert done.code == 75
    assert "submit it again, it goes on where it stood" in done.said


def test_caches_and_work_folder_are_on_node_local_scratch_and_gone_at_the_end(desk):
    desk.behave('touch "$JOB_WORKDIR/file" && exit 0')
    done = desk.start()
    scratch = str(desk.folder / "scratch" / "qlora-job-7")

    assert done.code == 0
    seen = desk.seen()
    for name in ("JOB_WORKDIR", "TMPDIR"):
        assert seen[name] == scratch
    for name in ("XDG_CACHE_HOME", "HF_HOME", "MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        assert seen[name].startswith(f"{scratch}/cache"), name
    assert list((desk.folder / "scratch").iterdir()) == []


def test_what_a_killed_attempt_left_on_the_node_is_removed(desk):
    left = desk.folder / "scratch" / "qlora-job-7"
    left.mkdir()
    (left / "old").touch()
    desk.behave("[[ ! -e $JOB_WORKDIR/old ]] && exit 0; exit 1")

    assert desk.start(restarts=1).code == 0


def test_without_room_for_scratch_it_ends_as_a_full_disk_does(desk):
    done = desk.start(QLORA_SCRATCH="/nowhere")

    assert done.code == 74
    assert "set QLORA_SCRATCH to a node-local folder" in done.said
    assert done.requeued == ["7"]


def test_the_job_is_told_its_notice_and_its_end(desk):
    """KillWait and the partition's GraceTime; the end as Slurm shows it."""
    desk.start(TZ="UTC")

    assert desk.seen()["JOB_GRACE_SECONDS"] == "120"
    assert desk.seen()["JOB_DEADLINE"] == "1738346400"  # 2025-01-31T18:00:00Z


def test_what_the_user_says_wins(desk):
    desk.start(JOB_GRACE_SECONDS="45", JOB_DEADLINE="1738340000", JOB_WORKDIR="/big", OMP_NUM_THREADS="3")

    seen = desk.seen()
    assert (seen["JOB_GRACE_SECONDS"], seen["JOB_DEADLINE"]) == ("45", "1738340000")
    assert (seen["JOB_WORKDIR"], seen["OMP_NUM_THREADS"]) == ("/big", "3")


def test_a_job_that_is_started_again_keeps_the_recipe_that_it_began_with(desk):
    recipe, kept = desk.folder / "recipe.yaml", desk.folder / "qlora-job-7" / "recipe.yaml"
    desk.behave("exit 75")
    desk.start()
    began_with = recipe.read_text()
    recipe.write_text("output: s3://elsewhere\n")
    desk.start(restarts=1)

    assert kept.read_text() == began_with
    assert str(kept) in (desk.folder / "arguments").read_text().splitlines()
    desk.start()  # another cluster, another job with the same number
    assert kept.read_text() == recipe.read_text()
    recipe.unlink()
    assert desk.start(restarts=1).requeued == ["7"]


def test_a_container_sees_what_stands_beside_the_recipe(desk, tmp_path_factory):
    """Model and data of `fetch` do; the job itself reads a copy of the recipe."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (desk.folder / "recipe.yaml").rename(elsewhere / "recipe.yaml")
    (desk.folder / "recipe.yaml").symlink_to(elsewhere / "recipe.yaml")
    done = desk.start(QLORA_RUNTIME="apptainer", QLORA_IMAGE="x")

    assert done.code == 0
    words = (desk.folder / "arguments").read_text().splitlines()
    assert words[words.index("--bind") + 1] == f"{desk.folder}:{desk.folder},{elsewhere}:{elsewhere}"
    assert words[-1] == str(desk.folder / "qlora-job-7" / "recipe.yaml")


def test_a_task_of_an_array_is_queued_again_by_its_own_name(desk):
    """The plain number of an array's last task means all of them."""
    desk.behave("exit 75")
    done = desk.start(SLURM_ARRAY_JOB_ID="5", SLURM_ARRAY_TASK_ID="3")

    assert done.requeued == ["5_3"]
    assert (desk.folder / "qlora-job-5_3" / "recipe.yaml").exists()


def test_credentials_come_from_a_file_of_the_user_s_own(desk):
    file = desk.folder / "secrets"
    file.write_text("AWS_SECRET_ACCESS_KEY='two words'\nexport HF_TOKEN=hf_x\n")
    file.chmod(0o600)
    done = desk.start(QLORA_ENV_FILE=str(file))

    assert "two words" not in done.said
    assert desk.seen()["AWS_SECRET_ACCESS_KEY"] == "two words"
    assert desk.seen()["HF_TOKEN"] == "hf_x"
    assert "others may read" not in done.said
    file.chmod(0o640)
    assert "others may read" in desk.start(QLORA_ENV_FILE=str(file)).said


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        ({"QLORA_VENV": "/nowhere"}, "/nowhere/bin/python is not there"),
        ({"QLORA_RUNTIME": "docker"}, "use venv, apptainer or pyxis"),
        ({"QLORA_RUNTIME": "pyxis"}, "QLORA_IMAGE is not set"),
        ({"QLORA_ENV_FILE": "/nowhere"}, "QLORA_ENV_FILE=/nowhere cannot be read"),
    ],
)
def test_what_cannot_work_ends_64_before_anything_is_started(desk, extra, told):
    done = desk.start(**extra)

    assert done.code == 64
    assert told in done.said
    assert done.calls == []


def test_a_recipe_that_is_not_there_ends_64(desk):
    (desk.folder / "recipe.yaml").unlink()
    done = desk.start()

    assert done.code == 64
    assert "recipe.yaml: cannot be read" in done.said
