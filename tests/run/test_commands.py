"""check, report, try and fetch: what a person sees and what is left behind."""

import io
import json
import os
import shutil
import signal
import struct
import threading

import pytest
from job_process import ROOT, call, objects, process, records, write_lines

from job.commands import plan
from job.core.plan.plan_json import PlanJson
from job.edge.host.interrupt import Interrupt


def test_check_is_a_table_with_the_histogram_and_leaves_encoded_data_alone(job):
    ended = job.call("check")
    assert ended.code == 0
    assert ended.stderr == ""
    rows = [[line[:3].strip(), line[4:15].strip()] for line in ended.stdout.splitlines() if line[:2] in ("ok", "NO")]
    assert rows == [
        ["ok", name]
        for name in (
            *("recipe", "credentials", "output", "base model", "input"),
            *("data", "plan", "model", "weights", "self-test"),
        )
    ]
    assert "write and conditional write work" in ended.stdout
    assert "is new" in ended.stdout
    assert "24 training and 6 held-out examples" in ended.stdout
    assert "24 ####" in ended.stdout
    assert '"event"' not in ended.stdout
    assert "a random llama of 2 layers: loss its own, documents apart, every adapter learns" in ended.stdout
    assert objects(job.store) == []
    assert {name.split("/")[0] for name in objects(job.workdir)} == {"cache", "self-tests"}
    assert all(name.startswith(("cache/encoded/", "self-tests/")) for name in objects(job.workdir))
    assert ended.outcome["code"] == 0


def test_check_asks_the_self_test_once_and_not_at_all_when_it_shall_be_quick(job):
    job.call("check")
    (kept,) = (job.workdir / name for name in objects(job.workdir) if name.startswith("self-tests/"))
    kept.write_text(kept.read_text().replace("a random llama", "what was kept"))
    assert "what was kept of 2 layers" in job.call("check").stdout
    kept.write_text('{"answer": "this family is refused", "refused": true}')
    ended = job.call("check")
    assert ended.code == 64
    assert ended.outcome["reason"] == "this family is refused"
    kept.unlink()
    assert "self-test" not in job.call("check", "--quick").stdout
    assert not kept.exists()


def test_check_tells_every_failure_and_ends_with_the_code_of_the_first(job):
    job.recipe["model"]["base"] = "./not/here"
    (job.data / "train.jsonl").unlink()
    ended = job.call("check")
    assert ended.code == 66
    refused = [line for line in ended.stdout.splitlines() if line.startswith("NO")]
    assert [line[4:15].strip() for line in refused] == ["base model", "input", "data"]
    assert "no such folder" in refused[0]
    assert "matches no object" in refused[1]
    assert ended.outcome["reason"] in refused[0]


def test_check_names_the_wrong_lines(job):
    with (job.data / "train.jsonl").open("a") as file:
        file.write("oops\n")
    ended = job.call("check")
    assert ended.code == 65
    assert "train.jsonl:25: not JSON" in ended.stdout


def test_plan_tells_lengths_memory_and_time_and_leaves_encoded_data_alone(job, tmp_path):
    base = shutil.copytree(job.recipe["model"]["base"], tmp_path / "base")
    job.recipe["model"]["base"] = str(base)
    for path in base.glob("*.safetensors"):
        path.unlink()  # no weight is needed
    ended = job.call("plan", "--usd-per-hour", "4")
    assert ended.code == 0
    assert ended.stderr == ""
    for told in ("max_length", "<- chosen", "6 steps", "base in 4 bits", "at the peak of a step", "tokens/s", " $"):
        assert told in ended.stdout
    for gpu in ("h200", "h100", "a100", "l4"):
        assert f"\n{gpu} " in ended.stdout
    assert "memory: " in ended.stdout
    assert "--mem=" in ended.stdout
    assert objects(job.store) == []
    assert all(name.startswith("cache/encoded/") for name in objects(job.workdir))
    assert job.call("check").code == 66  # a run needs them


def test_plan_for_one_gpu_or_a_part_of_it(job):
    one = job.call("plan", "--gpu", "h200", "--gpu-memory", "10", "--engine", "fast")
    assert one.code == 0
    assert "fast engine" in one.stdout
    assert "of 10.0" in one.stdout
    unknown = job.call("plan", "--gpu-memory", "24")
    assert "\nyour GPU " in unknown.stdout
    assert "calibrated" not in unknown.stdout


def test_gpus_of_the_environment_and_the_command_line_add_up(job, monkeypatch):
    monkeypatch.setenv("JOB_GPU", "l4\nh100")
    told = job.call("plan", "--gpu", "a100", "--gpu", "h100").stdout
    assert [line.split()[0] for line in told.splitlines() if line.startswith(("l4 ", "h100 ", "a100 "))] == [
        "l4",
        "h100",
        "a100",
    ]


def test_check_tells_what_overrides_the_recipe_and_where_it_came_from(job, monkeypatch):
    monkeypatch.setenv("JOB_SET", "lora.r=2\ntrain.steps=3")
    told = job.call("check", "--set", "lora.r=8").stdout
    for line in ("lora.r = 2, by JOB_SET, overruled by --set", "train.steps = 3, by JOB_SET", "lora.r = 8, by --set"):
        assert f"                {line}\n" in told


def test_plan_knows_which_layers_are_compiled(job, tmp_path):
    compiled = job.call("plan", "--gpu", "h100", "--engine", "generic")
    assert "generic engine, layers compiled\n" in compiled.stdout
    base = shutil.copytree(job.recipe["model"]["base"], tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.1}))
    job.recipe["model"]["base"] = str(base)
    assert "generic engine, layers not compiled\n" in job.call("plan", "--gpu", "h100").stdout


def test_plan_as_json_is_one_object_with_the_numbers_of_the_text(job):
    ended = job.call("plan", "--json", "--gpu", "h100", "--usd-per-hour", "4")
    assert (ended.code, ended.stderr) == (0, "")
    found = PlanJson.model_validate_json(ended.stdout)
    assert [each.name for each in found.forecasts] == ["h100"]
    assert found.work.steps == 6
    text = job.call("plan", "--gpu", "h100", "--usd-per-hour", "4").stdout
    assert f"max_length {found.data.max_length_tokens}: {found.data.max_length_reason}\n" in text
    assert f"{found.work.parameters:,} parameters in the base, {found.work.trained_parameters:,} trained" in text
    assert f" {found.forecasts[0].usd:.2f} $\n" in text
    assert f"memory: {found.ask.host_memory_gib}Gi, ephemeral-storage: {found.ask.disk_gib}Gi" in text
    assert f"--mem={found.ask.host_memory_gib}G --tmp={found.ask.disk_gib}G\n" in text


def test_plan_for_several_gpus_takes_the_options_and_variables_of_run(job, monkeypatch):
    one = job.call("plan", "--gpu", "h100").stdout
    two = job.call("plan", "--gpu", "h100", "--gpus", "2", "--usd-per-hour", "4").stdout
    assert "2 GPUs of one node; memory is that of each GPU:" in two
    assert "GPUs of one node" not in one
    assert "nvidia.com/gpu: 2}" in two
    assert "--gpus-per-node=2 " in two
    monkeypatch.setenv("JOB_GPUS", "4")
    monkeypatch.setenv("JOB_NODES", "2")
    monkeypatch.setenv("JOB_NETWORK", "200")
    found = PlanJson.model_validate_json(job.call("plan", "--gpu", "h100", "--json").stdout)
    (h100,) = found.forecasts
    assert (h100.gpus, h100.network_gbit_per_second, found.ask.gpus, found.ask.nodes) == (8, 200, 4, 2)
    assert h100.busiest_share == 4  # two examples a step, and eight GPUs


def test_plan_as_json_leaves_stdout_empty_when_it_fails(job, monkeypatch):
    (job.data / "train.jsonl").unlink()
    monkeypatch.setenv("JOB_JSON", "1")
    ended = job.call("plan")
    assert (ended.code, ended.stdout) == (66, "")
    assert json.loads(ended.stderr)["event"] == "ended"


def test_plan_finds_the_templates_beside_entrypoint_and_nowhere_else(tmp_path, monkeypatch):
    assert plan.ask_templates() == [(ROOT / name / "ask.txt").read_text() for name in ("k8s", "slurm")]
    (tmp_path / "somebody_s").mkdir()
    (tmp_path / "somebody_s" / "ask.txt").write_text("no template")
    monkeypatch.setattr(plan, "_ROOT", tmp_path)
    assert plan.ask_templates() == []


@pytest.mark.parametrize(
    ("gpu", "code", "told"),
    [("v100", 81, "has no bf16"), ("h900", 64, "another one; did you mean h200?"), ("zzz", 64, "not known; one of")],
)
def test_plan_refuses_a_gpu_that_cannot(job, gpu, code, told):
    ended = job.call("plan", "--gpu", gpu)
    assert ended.code == code
    assert told in ended.outcome["reason"]


def test_report_shows_a_run_and_leaves_both_pictures_and_the_page(finished, tmp_path):
    job, _ended = finished
    run = shutil.copytree(job.only_run(), tmp_path / "runs" / "copy")
    pictures = ("lengths.png", "loss.png")
    for name in (*pictures, "report.html"):
        (run / name).unlink()
    ended = call("report", f"file://{run}")
    assert ended.code == 0
    assert ended.stderr == ""
    report = job.report()
    assert f"base {report['sweet_spot']['base_loss']:.4f} -> tuned {report['sweet_spot']['loss']:.4f}" in ended.stdout
    assert "<- chosen" in ended.stdout
    for name in pictures:
        assert f"file://{run}/{name}" in ended.stdout
        content = (run / name).read_bytes()
        assert content.startswith(b"\x89PNG")
        assert struct.unpack(">II", content[16:24]) == (1080, 600)
    assert f"page: file://{run}/report.html" in ended.stdout
    assert (run / "report.html").read_bytes() == (job.only_run() / "report.html").read_bytes()


@pytest.mark.parametrize("uri", ["file:///nowhere/runs/x", "file:///nowhere", "somewhere"])
def test_report_of_no_run_ends_66(uri):
    ended = call("report", uri)
    assert ended.code == 66
    assert uri in ended.named("ended")[0]["reason"]


def test_report_of_an_unfinished_run_says_that_it_is_not_finished(job):
    job.call("run", stop_in="ask_base")
    ended = call("report", f"file://{job.only_run()}")
    assert ended.code == 66
    assert "not finished yet" in ended.named("ended")[0]["reason"]


def test_try_answers_as_the_report_does(finished, tmp_path):
    """The prompt is taken as it is, its last line break included."""
    job, _ended = finished
    expected = job.report()["answers"][0]
    ended = call("try", f"file://{job.only_run()}", "--prompt", "12 red hats\n", "--workdir", str(tmp_path))
    assert ended.code == 0, ended.stdout
    assert ended.stdout == f"prompt  12 red hats\n\nbase    {expected['base']}\ntuned   {expected['tuned']}\n\n"


def test_try_asks_for_prompts_on_stdin(finished, tmp_path, monkeypatch):
    job, _ended = finished
    expected = job.report()["answers"][0]
    monkeypatch.setattr("sys.stdin", io.StringIO("12 red hats\\n\n\n30 blue hats\\n\n"))
    ended = call("try", f"file://{job.only_run()}", "--workdir", str(tmp_path), "--max-new-tokens", "4")
    assert ended.code == 0, ended.stdout
    assert ended.stdout.count("base    ") == 2
    assert f"base    {expected['base']}\n" in ended.stdout
    assert f"tuned   {expected['tuned']}\n" in ended.stdout


def test_try_reads_a_typed_line_break_alike_from_the_command_line_the_environment_and_stdin(
    finished, tmp_path, monkeypatch
):
    job, _ended = finished
    words = ["try", f"file://{job.only_run()}", "--workdir", str(tmp_path), "--max-new-tokens", "1"]
    monkeypatch.setattr("sys.stdin", io.StringIO("12 red hats\\n\n"))
    on_stdin = call(*words).stdout.removeprefix("prompt> ").removesuffix("prompt> \n")
    assert on_stdin.startswith("prompt  12 red hats\n\nbase ")
    assert call(*words, "--prompt", "12 red hats\\n").stdout == on_stdin
    monkeypatch.setenv("JOB_PROMPT", "12 red hats\\n")
    assert call(*words).stdout == on_stdin
    both = call(*words, "--prompt", "30 blue hats").stdout
    assert both.startswith(on_stdin + "prompt  30 blue hats\n")  # they add up


def test_try_makes_the_prompt_of_fields_and_records_by_the_run_s_template(finished, tmp_path):
    job, _ended = finished
    words = ["try", f"file://{job.only_run()}", "--workdir", str(tmp_path), "--max-new-tokens", "1"]
    as_prompt = call(*words, "--prompt", "12 red hats\n", "--prompt", "30 blue hats\n").stdout
    assert as_prompt.count("tuned ") == 2
    file = write_lines(
        tmp_path / "records.jsonl",
        [{"question": "12 red hats", "answer": "red 12"}, {"question": "30 blue hats", "more": 5}],
    )
    assert call(*words, "--record", str(file)).stdout == as_prompt
    (tmp_path / "one.json").write_text(json.dumps({"question": "30 blue hats"}, indent=2))
    asked = ("--field", "question=12 red hats", "--record", str(tmp_path / "one.json"))
    assert call(*words, *asked).stdout == as_prompt


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["--field", "questoin=x"], 64, "--field questoin: the prompt of this run is made of question; did you mean"),
        (["--field", "question"], 64, "--field question: write name=value"),
        (["--record", "no.jsonl"], 64, "where the job was started): cannot be read"),
        (["--record", "wrong.jsonl"], 65, 'wrong.jsonl:2: "question" is missing (the record has "questoin"; did'),
    ],
)
def test_try_refuses_a_wrong_field_or_record_before_it_loads_the_base(
    finished, tmp_path, monkeypatch, words, code, told
):
    job, _ended = finished
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "wrong.jsonl", [{"question": "a"}, {"questoin": "b"}])
    ended = call("try", f"file://{job.only_run()}", "--workdir", str(tmp_path / "work"), *words)
    assert ended.code == code
    assert told in ended.named("ended")[0]["reason"]
    assert not (tmp_path / "work").exists()


def test_try_ends_at_ctrl_c_on_a_terminal(finished, tmp_path, monkeypatch):
    """The signal only sets a flag: nobody types, and the prompt must not wait for ever."""
    job, _ended = finished
    ours, theirs = os.openpty()
    interrupt = Interrupt()
    with os.fdopen(theirs) as terminal:
        monkeypatch.setattr("sys.stdin", terminal)
        threading.Timer(0.5, interrupt._remember, (signal.SIGINT, None)).start()
        ended = call("try", f"file://{job.only_run()}", "--workdir", str(tmp_path), interrupt=interrupt)
    os.close(ours)
    assert ended.code in (0, 75)  # at the prompt, or on the way to it


def test_what_was_fetched_runs_without_the_original_data_and_without_a_hub(job, warm):
    write_lines(job.data / "train-2.jsonl", records(3, seed=4))
    folder = job.folder / "fetched"
    ended = job.call("fetch", "--to", str(folder))
    assert ended.code == 0, ended.stdout
    assert str(folder / "recipe.yaml") in ended.stdout
    assert objects(job.folder / "store") == []
    for path in job.data.iterdir():
        path.unlink()
    command = job.command("run", "--set", "train.steps=1")
    command[command.index(str(job.recipe_path))] = str(folder / "recipe.yaml")
    with process(command, cwd=job.folder, environment={"HF_HUB_OFFLINE": "1"}, image=warm) as running:
        ran = running.end()
    assert ran.code == 0, ran.stdout
    assert job.report()["data"]["train"]["rows"] == 27


def test_fetch_into_the_folder_of_the_data_harms_nothing(job):
    """A `data/train` of the user's own is where fetch writes too."""
    own = write_lines(job.folder / "data" / "train" / "mine.jsonl", records(5))
    job.recipe["data"]["train"] = f"file://{own.parent}/*.jsonl"
    assert job.call("fetch", "--to", str(job.folder)).code == 0
    assert own.exists()


def test_fetch_of_a_base_beside_us_names_it_by_its_whole_path(job, monkeypatch):
    """`./base/tiny` as it stands would read as a hub's owner/name."""
    import yaml

    shutil.copytree(job.recipe["model"]["base"], job.folder / "base" / "tiny")
    monkeypatch.chdir(job.folder)
    job.recipe["model"]["base"] = "./base/tiny"
    assert job.call("fetch", "--to", "fetched").code == 0
    fetched = yaml.safe_load((job.folder / "fetched" / "recipe.yaml").read_text())
    assert fetched["model"]["base"] == str(job.folder / "base" / "tiny")
