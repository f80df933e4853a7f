"""Every way in which a job comes, goes and comes back on a real Slurm, with the real job (make test-slurm)."""

import json
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cluster import ROOT, STEPS, TRAIN, frozen_once, python_that_runs, result, until
from job_process import write_lines

pytestmark = pytest.mark.slurm
NIGHTLY, SWEEP = ROOT / "slurm" / "nightly.sh", ROOT / "slurm" / "sweep.sh"


def exit_codes(report):
    return [attempt["exit_code"] for attempt in report["attempts"]]


def finished_as_if_undisturbed(job, undisturbed, codes):
    report = job.report()
    assert exit_codes(report) == codes
    assert result(report) == result(undisturbed)
    return True


@pytest.mark.slurm_short
def test_from_submission_to_the_report_of_the_demo(real_slurm, tmp_path):
    """As the README says it, from a folder of the user's own; the script is found by the path it was submitted with."""
    base = tmp_path / "base"
    subprocess.run([sys.executable, ROOT / "recipes/demo_base.py", base], check=True, cwd=ROOT)
    data = [f"--set=data.{side}={ROOT}/recipes/shop-orders/{side}.jsonl" for side in ("train", "validation")]
    output = tmp_path / "store"
    words = [f"--set=model.base={base}", *data, f"--output=file://{output}"]
    run = real_slurm.submit(tmp_path, TRAIN, ROOT / "recipes/demo.yaml", *words)

    assert run.until_ended()["JobState"] == "COMPLETED", run.log()
    assert (run.exit_code(), run.restarts()) == (0, 0)
    (folder,) = (output / "runs").iterdir()
    report = json.loads((folder / "report.json").read_text())
    assert report["exact_match"]["tuned"] > 0.9
    assert run.comment()["run_uri"] == f"file://{folder}"
    assert run.comment()["code"] == 0
    assert (tmp_path / f"qlora-job-{run.number}.out").exists()
    assert real_slurm.completed(run.number)["JobState"] == "COMPLETED"
    scratch = re.search(r"scratch (\S+)", run.log())[1]
    assert scratch.endswith(f"qlora-job-{run.number}")
    assert not Path(scratch).exists()


def test_what_is_saved_only_after_the_limit_is_queued_again_as_well(real_slurm, job):
    """At the limit Slurm ends script and job, and leaves them KillWait."""
    # What the real one does only on a slow day.
    late = "[[ ! -e saved ]] || exit 0; trap '' USR2; trap 'touch saved; exit 75' TERM; while true; do sleep 0.1; done"
    python = python_that_runs(job.folder, late)
    run = real_slurm.submit(job.folder, "--time=1", TRAIN, "recipe.yaml", QLORA_VENV=python)

    assert run.until_ended()["JobState"] == "COMPLETED", run.log()
    assert "DUE TO TIME LIMIT" in run.log()
    assert run.restarts() == 1


def test_preemption_with_grace_takes_as_long_as_the_save_and_the_run_goes_on(real_slurm, job, undisturbed):
    """With GraceTime only the job is told, and Slurm takes its end for a failure: the script queues it again."""
    run = real_slurm.submit(
        job.folder, "--partition=grace", "--nodelist=n1", TRAIN, "recipe.yaml", **frozen_once(job.folder)
    )
    run.until_frozen()
    important = real_slurm.occupy("n1")

    assert run.until_ended()["JobState"] == "COMPLETED", run.log()
    assert important.about()["JobState"] == "COMPLETED"
    assert (run.exit_code(), run.restarts()) == (0, 1)
    assert "exit code 75; queued again" in run.log()
    assert finished_as_if_undisturbed(job, undisturbed, [75, 0])


def test_a_job_that_is_preempted_by_cancelling_queues_itself_again(real_slurm, job, undisturbed):
    """PreemptMode=CANCEL makes --requeue mean nothing; scontrol requeue works all the same."""
    run = real_slurm.submit(
        job.folder, "--partition=cancel", "--nodelist=n1", TRAIN, "recipe.yaml", **frozen_once(job.folder)
    )
    run.until_frozen()
    real_slurm.occupy("n1")

    assert run.until_ended()["JobState"] == "COMPLETED", run.log()
    assert run.restarts() == 1
    assert finished_as_if_undisturbed(job, undisturbed, [75, 0])


def test_what_cancelling_did_end_the_next_night_goes_on_with(real_slurm, job, undisturbed):
    """The site allows no requeue at all."""
    night = ("--partition=cancel", "--nodelist=n1", "--no-requeue", "--cpus-per-task=1", "--mem=2000", "recipe.yaml")
    first = tick(real_slurm, job, *night, **frozen_once(job.folder))
    first.until_frozen()
    important = real_slurm.occupy("n1")
    assert first.until_ended()["JobState"] == "PREEMPTED", first.log()
    until(lambda: important.about()["JobState"] == "COMPLETED", first.log)
    assert "submit it again, it goes on where it stood" in first.log()

    second = tick(real_slurm, job, *night)
    assert second.until_ended()["JobState"] == "COMPLETED", second.log()
    assert finished_as_if_undisturbed(job, undisturbed, [75, 0])

    third = real_slurm.call(NIGHTLY, *night, cwd=job.folder)
    assert third.returncode == 0
    assert "nothing changed, the run is finished; nothing submitted" in third.stderr
    write_lines(job.data / "train-2.jsonl", [{"question": "12 red hats", "answer": "red 12"}])
    fourth = tick(real_slurm, job, *night)
    assert fourth.until_ended()["JobState"] == "COMPLETED", fourth.log()
    assert len(job.runs()) == 2


def tick(slurm, job, *words, **environment):
    """A night on which a job is submitted."""
    done = slurm.call(NIGHTLY, *words, cwd=job.folder, **environment)
    assert done.returncode == 0, done.stderr
    number = re.search(r"submitted as job (\d+)", done.stderr)
    assert number, done.stderr
    return slurm.job(number[1], job.folder)


def test_two_nightly_ticks_at_once_make_one_run(real_slurm, job):
    """Whichever of them submits: singleton lets the second wait, and then there is nothing left to do."""
    words = (NIGHTLY, "--cpus-per-task=1", "--mem=2000", "recipe.yaml")
    with ThreadPoolExecutor(2) as both:
        ticks = list(both.map(lambda _: real_slurm.call(*words, cwd=job.folder), range(2)))
    assert [tick.returncode for tick in ticks] == [0, 0], ticks
    numbers = [n for tick in ticks for n in re.findall(r"submitted as job (\d+)", tick.stderr)]
    assert numbers
    real_slurm.wait_for_all()

    jobs = [real_slurm.job(number, job.folder) for number in numbers]
    assert [j.about()["JobState"] for j in jobs] == ["COMPLETED"] * len(jobs), [j.log() for j in jobs]
    assert exit_codes(job.report()) == [0]
    assert sum(bool(j.named("finished")) for j in jobs) >= 1
    assert len([j for j in jobs if j.named("step")]) == 1


@pytest.mark.slurm_short
def test_a_cancelled_job_saves_and_stays_cancelled(real_slurm, job):
    run = real_slurm.submit(job.folder, TRAIN, "recipe.yaml", **frozen_once(job.folder))
    run.until_frozen()
    real_slurm.asked("scancel", run.number)

    assert run.until_ended()["JobState"] == "CANCELLED", run.log()
    assert "exit code 75; cancelled, so not started again" in run.log()
    assert run.restarts() == 0
    assert real_slurm.queued() == []
    assert any(job.only_run().glob("checkpoints/*/MANIFEST.json"))


def test_a_node_that_goes_down_takes_the_job_to_another(real_slurm, job, undisturbed):
    run = real_slurm.submit(job.folder, TRAIN, "recipe.yaml", **frozen_once(job.folder))
    frozen = run.until_frozen()
    node = run.about()["NodeList"]
    real_slurm.asked("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")
    run.until_log("DUE TO NODE FAILURE")
    os.kill(frozen, signal.SIGCONT)
    try:
        assert run.until_ended()["JobState"] == "COMPLETED", run.log()
    finally:
        real_slurm.asked("scontrol", "update", f"NodeName={node}", "State=RESUME")

    assert run.restarts() == 1
    assert run.about()["NodeList"] != node
    report = job.report()
    assert exit_codes(report)[-1] == 0
    assert result(report) == result(undisturbed)


@pytest.mark.slurm_short
def test_wrong_data_ends_65_and_is_not_started_again(real_slurm, job):
    with (job.data / "train.jsonl").open("a") as file:
        file.write("oops\n")
    run = real_slurm.submit(job.folder, TRAIN, "recipe.yaml")

    assert run.until_ended()["JobState"] == "FAILED", run.log()
    assert (run.exit_code(), run.restarts()) == (65, 0)
    assert "train.jsonl:25: not JSON" in run.comment()["reason"]
    assert real_slurm.completed(run.number)["JobState"] == "FAILED"


def test_a_store_that_is_down_is_asked_again_up_to_the_limit(real_slurm, job):
    """69: the script counts, and gives up."""
    job.recipe["output"] = "s3://models/notes"
    job.write()
    nobody = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "planted"}
    run = real_slurm.submit(job.folder, TRAIN, "recipe.yaml", QLORA_RETRIES="1", **nobody)

    assert run.until_ended()["JobState"] == "FAILED", run.log()
    assert (run.exit_code(), run.restarts()) == (69, 1)
    assert run.log().count("exit code 69; queued again") == 1
    assert "exit code 69, and started again 1 times before: given up" in run.log()
    assert "planted" not in run.log() + json.dumps(run.comment())


def test_a_node_without_a_gpu_is_avoided(real_slurm, job):
    """82: counted, and elsewhere; with the last node left there is no elsewhere. The GPUs here are no GPUs."""
    words = (TRAIN, "recipe.yaml")
    run = real_slurm.submit(job.folder, *words, JOB_DEVICE="cuda", QLORA_RETRIES="2")

    assert run.until_ended()["JobState"] == "FAILED", run.log()
    assert (run.exit_code(), run.restarts()) == (82, 2)
    nodes = re.findall(r"train.sbatch: job \d+ on (n\d)", run.log())
    assert len(nodes) == 3
    assert nodes[0] != nodes[1]
    assert f"not on {nodes[0]} again" in run.log()
    assert f"{nodes[1]} is not excluded: no other node is left in low" in run.log()


def test_a_sweep_of_four_with_one_that_fails_ends_with_a_table_of_the_others(real_slurm, job):
    job.recipe["train"]["steps"] = 20
    job.write()
    lines = ["--set lora.r=2", "--set lora.r=4 --set train.learning_rate=0.01", "--set lora.r=0", "--set lora.r=8"]
    (job.folder / "sweep.txt").write_text("".join(f"{line}\n" for line in lines))
    size = ("--cpus-per-task=1", "--mem=2000")
    done = real_slurm.call(SWEEP, *size, "recipe.yaml", "sweep.txt", cwd=job.folder, QLORA_AT_ONCE="2")
    assert done.returncode == 0, done.stderr
    (folder,) = job.folder.glob("sweep-*")
    array, table = re.search(r"4 tasks are job (\d+), the table is job (\d+)", done.stderr).groups()
    running = set()

    def is_over():
        words = ("squeue", "--noheader", "--array", "--states=R", f"--jobs={array},{table}")
        running.add(len(real_slurm.asked(*words).splitlines()))
        return not real_slurm.queued()

    until(is_over, lambda: real_slurm.asked("squeue"))

    tasks = [real_slurm.job(f"{array}_{n}", job.folder) for n in range(1, 5)]
    states = [(task.about()["JobState"], task.exit_code()) for task in tasks]
    assert states == [("COMPLETED", 0), ("COMPLETED", 0), ("FAILED", 64), ("COMPLETED", 0)]
    assert max(running) <= 2
    assert len(job.runs()) == 3
    text = (folder / "table.txt").read_text()
    assert len(re.findall(r"<- best$", text, re.MULTILINE)) == 1
    assert "lora.r=4 train.learning_rate=0.01" in text
    assert "# task 3 (--set lora.r=0) began no run: exit code 64" in text
    assert real_slurm.job(table, job.folder).exit_code() == 66


def test_a_task_of_an_array_that_is_stopped_goes_on_alone(real_slurm, job, undisturbed):
    (job.folder / "sweep.txt").write_text(f"--set train.steps={STEPS}\n--set train.steps={STEPS + 1}\n")
    words = ("--array=1-2%1", ROOT / "slurm" / "sweep.sbatch", "recipe.yaml", "sweep.txt")
    array = real_slurm.submit(job.folder, *words, QLORA_HOME=str(ROOT), **frozen_once(job.folder))
    first = real_slurm.job(f"{array.number}_1", job.folder)
    frozen = first.until_frozen()
    real_slurm.asked("scancel", "--batch", "--signal=USR2", first.number)  # give the node back; go on later
    first.until_log("asked to stop (USR2)")
    os.kill(frozen, signal.SIGCONT)
    real_slurm.wait_for_all()

    second = real_slurm.job(f"{array.number}_2", job.folder)
    assert (first.about()["JobState"], first.restarts()) == ("COMPLETED", 1), first.log()
    assert (second.about()["JobState"], second.restarts()) == ("COMPLETED", 0), second.log()
    reports = [json.loads((run / "report.json").read_text()) for run in job.runs()]
    (stopped,) = [report for report in reports if len(report["attempts"]) == 2]
    assert result(stopped) == result(undisturbed)
