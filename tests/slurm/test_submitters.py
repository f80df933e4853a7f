"""nightly.sh and sweep.sh: small, on the login node, and never the training itself."""

import pytest
from stand_ins import ROOT, Desk

SUBMITTED = ["--parsable", "--job-name", "--dependency=singleton"]


@pytest.fixture
def desk(tmp_path):
    desk = Desk(tmp_path)
    (tmp_path / "sweep.txt").write_text("# two ranks\n--set lora.r=8\n\n--set lora.r=16 --set 'data.prompt={a} b'\n")
    return desk


# --- nightly.sh ------------------------------------------------------------------------------------------------------


def name_of(call):
    return next(word.split("=", 1)[1] for word in call.split("|") if word.startswith("--job-name="))


def test_when_nothing_changed_nothing_is_submitted_and_it_says_so(desk):
    desk.behave("exit 0")
    done = desk.submitter("nightly.sh", "recipe.yaml", "--set", "lora.r=8")

    assert done.code == 0
    assert done.calls == []
    assert "nothing changed, the run is finished; nothing submitted" in done.said
    asked = (desk.folder / "arguments").read_text().splitlines()
    assert asked[1:] == ["report", "recipe.yaml", "--set", "lora.r=8"]


def test_a_file_that_is_left_out_is_named_also_where_nothing_is_submitted(desk):
    desk.behave('echo \'{"event": "late_file", "file": "s3://d/day-4.jsonl"}\' >&2; echo a report; exit 0')
    done = desk.submitter("nightly.sh", "recipe.yaml")

    assert done.calls == []
    assert "s3://d/day-4.jsonl" in done.said
    assert "a report" not in done.said


@pytest.mark.parametrize("code", [66, 69, 77, 70])
def test_a_run_that_is_not_finished_or_cannot_be_looked_up_here_is_submitted(desk, code):
    """The job finds out which run to go on with, or to judge again, and says what is the matter."""
    desk.behave(f"exit {code}")
    done = desk.submitter("nightly.sh", "--partition=gpu", "--time=02:00:00", "recipe.yaml", "--set", "lora.r=8")

    assert done.code == 0
    (call,) = done.calls
    words = call.split("|")
    assert words[0] == "--parsable"
    assert words[1].startswith("--job-name=nightly-recipe-")
    assert words[2:5] == ["--dependency=singleton", "--partition=gpu", "--time=02:00:00"]
    assert words[5:] == [str(ROOT / "slurm" / "train.sbatch"), "recipe.yaml", "--set", "lora.r=8"]
    assert "submitted as job 12" in done.said


def test_a_job_that_is_still_there_is_left_alone(desk):
    (desk.folder / "queue").write_text("11 RUNNING\n")
    done = desk.submitter("nightly.sh", "recipe.yaml")

    assert (done.code, done.calls) == (0, [])
    assert "is still there (11 RUNNING); nothing submitted" in done.said


def test_a_recipe_that_is_wrong_is_told_on_the_login_node(desk):
    desk.behave("echo 'recipe.yaml:1: unknown key'; exit 64")
    done = desk.submitter("nightly.sh", "recipe.yaml")

    assert (done.code, done.calls) == (64, [])
    assert "unknown key" in done.said


@pytest.mark.parametrize("command", ["sbatch", "squeue"])
def test_when_slurm_does_not_take_it_cron_is_told(desk, command):
    desk.behave("exit 66")
    desk.refuse(command)
    done = desk.submitter("nightly.sh", "recipe.yaml")

    assert done.code == 69
    assert "submitted as" not in done.said


def test_the_same_recipe_and_arguments_have_the_same_name_and_others_another(desk):
    desk.behave("exit 66")
    calls = [["recipe.yaml"], ["./recipe.yaml"], ["recipe.yaml", "--set", "a.b=1"], ["recipe.yaml", "--set", "a.b=2"]]
    one, same, *others = [name_of(desk.submitter("nightly.sh", *words).calls[0]) for words in calls]

    assert one == same
    assert len({one, *others}) == 3


def test_what_runs_in_a_small_job_itself_hands_nothing_of_that_job_on(desk):
    """As scrontab does: its size would become that of the training."""
    desk.behave("exit 66")
    desk.submitter("nightly.sh", "recipe.yaml", SLURM_JOB_ID="3", SLURM_MEM_PER_NODE="50", SLURM_CONF="/etc/slurm.conf")
    passed = {line.split("=")[0] for line in (desk.folder / "submitted-with").read_text().splitlines()}

    assert {name for name in passed if name.startswith("SLURM")} == {"SLURM_CONF"}


def test_apptainer_is_asked_on_the_login_node_without_srun(desk):
    desk.behave("exit 0")
    image = {"QLORA_RUNTIME": "apptainer", "QLORA_IMAGE": "/images/qlora-job.sif", "HF_TOKEN": "hf_x"}
    done = desk.submitter("nightly.sh", "recipe.yaml", "--set", "lora.r=8", **image)

    assert (done.code, done.calls) == (0, [])
    assert "nothing changed" in done.said
    words = (desk.folder / "arguments").read_text().splitlines()
    inside = ["/opt/venv/bin/python", "/app/entrypoint.py", "report", "recipe.yaml", "--set", "lora.r=8"]
    assert words[words.index("/images/qlora-job.sif") + 1 :] == inside
    assert "hf_x" not in words
    assert desk.seen()["APPTAINERENV_HF_TOKEN"] == "hf_x"


def test_pyxis_cannot_be_asked_without_a_job_so_the_job_is_submitted(desk):
    desk.behave("exit 0")

    assert len(desk.submitter("nightly.sh", "recipe.yaml", QLORA_RUNTIME="pyxis", QLORA_IMAGE="x").calls) == 1


def test_nightly_without_a_recipe_says_how_it_is_used(desk):
    done = desk.submitter("nightly.sh", "--partition=gpu")

    assert done.code == 64
    assert "usage: slurm/nightly.sh" in done.said


# --- sweep.sh --------------------------------------------------------------------------------------------------------


def test_a_sweep_is_an_array_of_its_lines_and_a_table_after_it(desk):
    done = desk.submitter(
        "sweep.sh", "--partition=gpu", "recipe.yaml", "sweep.txt", "--output", "s3://a/b", QLORA_AT_ONCE="2"
    )

    assert done.code == 0, done.said
    (folder,) = desk.folder.glob("sweep-*")
    script = str(ROOT / "slurm" / "sweep.sbatch")
    array, table = (call.split("|") for call in done.calls)
    assert array == [
        *("--parsable", "--array=1-2%2", f"--output={folder}/task-%a.out", "--partition=gpu"),
        *(script, f"{folder}/recipe.yaml", f"{folder}/sweep.txt", "--output", "s3://a/b"),
    ]
    assert table == [
        *("--parsable", "--partition=gpu", "--dependency=afterany:12", "--job-name=qlora-sweep-table"),
        *("--time=00:15:00", "--open-mode=truncate", f"--output={folder}/table.txt", script, "--table", str(folder)),
    ]
    assert (folder / "sweep.txt").read_text() == "--set lora.r=8\n--set lora.r=16 --set 'data.prompt={a} b'\n"


def test_a_line_twice_would_be_one_run_twice_at_once(desk):
    (desk.folder / "sweep.txt").write_text("--set lora.r=8\n--set lora.r=16\n--set lora.r=8\n")
    done = desk.submitter("sweep.sh", "recipe.yaml", "sweep.txt")

    assert (done.code, done.calls) == (64, [])
    assert "holds this line twice, which would be one run: --set lora.r=8" in done.said


@pytest.mark.parametrize("words", [("recipe.yaml",), ("recipe.yaml", "nowhere.txt"), ("nowhere.yaml", "sweep.txt")])
def test_a_sweep_without_its_files_is_refused(desk, words):
    done = desk.submitter("sweep.sh", *words)

    assert (done.code, done.calls) == (64, [])


def test_a_file_without_a_line_is_refused(desk):
    (desk.folder / "sweep.txt").write_text("# nothing\n")

    assert desk.submitter("sweep.sh", "recipe.yaml", "sweep.txt").code == 64


def test_a_task_gives_the_words_of_its_line_to_the_job(desk):
    task = {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "2", "SLURM_JOB_ID": "7", "QLORA_HOME": str(ROOT)}
    done = desk.submitter("sweep.sbatch", "recipe.yaml", "sweep.txt", "--output", "s3://a/b", **task)

    assert done.code == 0, done.said
    given = (desk.folder / "arguments").read_text().splitlines()
    assert given[3:] == ["--set", "lora.r=16", "--set", "data.prompt={a} b", "--output", "s3://a/b"]


@pytest.mark.parametrize("task", [{}, {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_JOB_ID": "5", "SLURM_JOB_ID": "7"}])
def test_a_task_without_a_line_does_nothing(desk, task):
    done = desk.submitter("sweep.sbatch", "recipe.yaml", "sweep.txt", **task, QLORA_HOME=str(ROOT))

    assert done.code == 64
    assert not (desk.folder / "arguments").exists()


def test_the_table_is_asked_for_each_task_s_run_and_tells_those_that_began_none(desk):
    folder = desk.folder / "sweep"
    for number, outcome in enumerate(['{"state": "running"}', '{"run_uri": "s3://a/runs/x"}'], start=1):
        (folder / f"task-{number}").mkdir(parents=True)
        (folder / f"task-{number}" / "outcome.json").write_text(outcome)
    (folder / "task-3").mkdir()
    (folder / "task-3" / "outcome.json").write_text('{"state": "ended", "code": 64, "reason": "lora.r: too small"}')
    (folder / "sweep.txt").write_text("--set lora.r=8\n--set lora.r=16\n--set lora.r=0\n")
    desk.behave('grep -v "^#" "${@: -1}"; exit 0')
    done = desk.submitter("sweep.sh", "--table", str(folder))

    lines = done.said.splitlines()
    assert lines[0] == "s3://a/runs/x"
    assert lines[1] == "# task 1 (--set lora.r=8) began no run"
    assert lines[2].startswith("# task 3 (--set lora.r=0) began no run: exit code 64")
    assert "lora.r: too small" in lines[2]
    assert done.code == 66
