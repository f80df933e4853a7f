"""A person at a terminal: nothing wraps, one line stays in place, and everything that counts has a line."""

import json
import re
import shutil

import pytest
from job_process import Job, environment_without_job
from run_material import long_recipe
from terminals import lines_seen, terminal, too_wide, written_lines


def on_terminal(image, arguments, *, cwd, columns, **environment):
    """Exit code, and what a process writes to its terminal."""
    with terminal(columns) as shown:
        child = image.begin(
            arguments,
            environment=environment_without_job({"TERM": "xterm", **environment}),
            cwd=cwd,
            stdout=shown.writer,
            stderr=shown.writer,
        )
        code = child.wait()
        return code, shown.text()


@pytest.fixture(scope="module", params=[80, 200])
def run(request, tmp_path_factory, base, warm):
    """A run at a terminal, and what it wrote."""
    folder = tmp_path_factory.mktemp("at-a-terminal")
    job = long_recipe(Job(folder, base, warm))
    code, text = on_terminal(warm, job.command("run")[2:], cwd=folder, columns=request.param)
    assert code == 0, text
    return job, text, request.param


def test_no_line_of_a_run_is_wider_than_the_terminal(run):
    _, text, columns = run

    assert too_wide(text, columns) == []
    assert "{'" not in text


def test_steps_stay_on_one_line_and_what_counts_has_its_own(run):
    _, text, _ = run
    seen = lines_seen(text)

    assert any(re.search(r"step  ?\d+/30", line) for line in written_lines(text))
    assert [line for line in seen if re.search(r"step +\d+/30", line)] == []
    evaluated = [re.search(r"  evaluation  step=(\d+) ", line) for line in seen]
    assert [each[1] for each in evaluated if each] == ["0", "10", "20", "30"]
    committed = {match[1] for line in seen if (match := re.search(r"  checkpoint  step=(\d+) ", line))}
    assert committed == {"0", "4", "8", "10", "12", "16", "20", "24", "28", "30"}


def test_phases_of_next_to_no_time_are_added_up(run):
    job, text, _ = run
    named = re.search(r"time: (.*?)(?=start:)", " ".join(text.split()))[1]
    seconds = job.report()["throughput"]["phase_seconds"]
    small = [name for name, each in seconds.items() if each < 0.01 * sum(seconds.values()) and name != "other"]

    assert small
    assert [name for name in small if f" {name} " in named] == []


@pytest.mark.parametrize("columns", [80, 200])
@pytest.mark.parametrize("command", ["check", "plan", "report"])
def test_no_line_of_what_is_asked_for_is_wider_than_the_terminal(finished, warm, tmp_path, columns, command):
    job, _ended = finished
    words = {"report": ["report", f"file://{job.only_run()}"]}.get(command) or job.command(command)[2:]
    code, text = on_terminal(warm, words, cwd=tmp_path, columns=columns)

    assert code == 0, text
    assert too_wide(text, columns) == []


@pytest.mark.parametrize("columns", [80, 200])
def test_no_line_of_the_runs_is_wider_than_the_terminal(finished, warm, tmp_path, columns):
    job, _ended = finished
    runs = tmp_path / "store" / "runs"
    for name, rank in (("a29da3443a-1f4d73a06a", 4), ("b29da3443a-1f4d73a06a", 8)):
        run = shutil.copytree(job.only_run(), runs / name)
        record = json.loads((run / "run.json").read_text())
        record["recipe"]["lora"] |= {"r": rank, "targets": ["q_proj"] * rank}
        (run / "run.json").write_text(json.dumps(record))
    code, text = on_terminal(warm, ["report", f"file://{runs}"], cwd=tmp_path, columns=columns)

    assert code == 0, text
    assert too_wide(text, columns) == []
    assert "24+6 examples" in text
    assert "lora.r=8" in text


def test_a_mistake_of_the_recipe_is_read_without_wrapping(job, warm):
    job.recipe["train"]["learning_rat"] = 1
    code, text = on_terminal(warm, job.command("run")[2:], cwd=job.folder, columns=80)

    assert code == 64
    assert too_wide(text, 80) == []
    assert "did you mean train.learning_rate?" in " ".join(text.split())


@pytest.mark.parametrize(
    ("environment", "painted"),
    [
        ({}, True),
        ({"NO_COLOR": "1"}, False),
        ({"TERM": "dumb"}, False),
        ({"NO_COLOR": "1", "CLICOLOR_FORCE": "1"}, False),
    ],
)
def test_colours_on_a_terminal_are_as_the_environment_wants_them(job, warm, environment, painted):
    job.recipe["train"]["learning_rat"] = 1
    _, text = on_terminal(warm, job.command("run")[2:], cwd=job.folder, columns=80, **environment)

    assert ("\x1b[" in text) is painted


def test_colours_can_be_forced_where_there_is_no_terminal(job):
    job.recipe["train"]["learning_rat"] = 1
    job.recipe_path.parent.mkdir(exist_ok=True)
    for force, painted in (("1", True), ("0", False)):
        ended = job.start("run", JOB_LOG_FORMAT="console", CLICOLOR_FORCE=force)
        assert ("\x1b[" in ended.stdout) is painted
