"""A run from its start to its committed report, in a process of its own."""

import hashlib
import json
import sys

import jsonschema
import pytest
from job_process import ROOT, objects, process
from run_material import SECRETS

from job.core.reports.report import Report


def test_a_good_run_ends_with_zero_and_says_only_json_lines_on_stdout(finished):
    _job, ended = finished
    assert ended.code == 0, ended.stdout + ended.stderr
    assert ended.stderr == ""
    for event in ended.events:
        assert list(event)[:3] == ["timestamp", "level", "event"]
    assert not [e for e in ended.events if e["level"] != "info"]


def test_each_step_and_each_phase_is_one_event(finished):
    _job, ended = finished
    steps = ended.named("step")
    assert [e["step"] for e in steps] == list(range(1, 31))
    assert all(e["of"] == 30 and {"loss", "tokens_per_second", "eta_seconds"} <= e.keys() for e in steps)
    assert steps[-1]["eta_seconds"] == 0
    assert [e["step"] for e in ended.named("evaluation")] == [0, 10, 20, 30]
    phases = [
        "identify",
        "try_output",
        "lock",
        "load_libraries",
        "preflight",
        "fetch_base",
        "fetch_base",
        "download",
        "encode",
        "fetch_weights",
        "load_model",
        "keep_copy",
        "self_test",
        "self_test",
        "resume",
    ]
    phases += ["ask_base", "train", "upload", "publish", "prove", "ask_tuned", "sum_up", "report"]
    assert [name for name in ended.phases() if name != "evaluate"] == phases


def test_the_outcome_file_tells_how_it_ended(finished):
    job, ended = finished
    assert ended.outcome["state"] == "ended"
    assert ended.outcome["code"] == 0
    assert ended.outcome["last_committed_step"] == 30
    assert ended.outcome["run_uri"] == f"file://{job.only_run()}"


def test_the_report_is_valid_against_its_own_schema_and_is_written_last(finished):
    job, _ended = finished
    report = job.report()
    jsonschema.validate(report, Report.model_json_schema())
    Report.model_validate(report)
    times = {path: path.stat().st_mtime_ns for path in job.only_run().rglob("*") if path.is_file()}
    after = {path.name for path, time in times.items() if time > times[job.only_run() / "report.json"]}
    # They tell of the commit, and that nobody works on it any more; the command `report` makes what people see anew.
    assert after - {"lengths.png", "loss.png", "report.html"} == {"01-end.json", "lock.json"}


def test_it_has_learned_and_the_report_says_from_what_to_what(finished):
    report = finished[0].report()
    spot = report["sweet_spot"]
    assert spot["loss"] < spot["base_loss"]
    assert len(report["curve"]["loss"]) == 30
    assert [e["step"] for e in report["evaluations"]] == [0, 10, 20, 30]
    assert report["answers"][0]["prompt"] == "12 red hats\n"
    assert report["exact_match"]["examples"] == 2


def test_the_report_says_how_long_the_first_step_was_waited_for_and_why(finished):
    job, ended = finished
    start = job.report()["start"]
    assert start["seconds"] == pytest.approx(sum(start["spent"].values()))
    spent_on = {"start", "load_libraries", "encode", "load_model", "self_test", "evaluate", "ask_base"}
    assert spent_on | {"first_step", "other"} <= start["spent"].keys()
    assert {"train", "publish", "prove"} & start["spent"].keys() == set()
    (told,) = ended.named("start")
    assert {"seconds": told["seconds"], "spent": told["spent"]} == start
    assert told["base_from"] == job.report()["model"]["loaded_from"] == "weights"
    # Nothing of the attempt is left out: its phases add up to more than the way to its first step.
    assert sum(job.report()["throughput"]["phase_seconds"].values()) > start["seconds"]


def test_the_report_says_what_of_a_known_gpu_was_used(job, monkeypatch):
    """The run is on the CPU, and the name alone is a GPU's."""
    from job.stages.finishing import report as stage

    monkeypatch.setattr(stage, "device_name", lambda _device: "NVIDIA L4")
    assert job.call("run").code == 0
    speed, model = job.report()["throughput"], job.report()["model"]
    assert (speed["ceiling_tflops"], speed["ceiling_from"]) == (pytest.approx(50.4), "derived")
    a_token = speed["ceiling_share"] * 50.4e12 / speed["tokens_per_second_a_rank"]
    weights = model["total_parameters"] - model["trainable_parameters"]
    assert 4 * model["trainable_parameters"] < a_token < 6 * model["trainable_parameters"] + 12 * weights


def test_of_a_cpu_no_share_is_said(finished):
    job, _ended = finished
    speed = job.report()["throughput"]
    assert (speed["ceiling_share"], speed["ceiling_tflops"], speed["ceiling_from"]) == (None, None, None)


def test_the_self_test_reads_the_examples_that_are_trained_on(job, monkeypatch):
    """On random tokens two right engines in bf16 differ, once the base has learned to read."""
    from job.stages import planning
    from job.stages.base import loading

    tried = []

    def watched(function, place):
        def call(*arguments, **named):
            tried.append(named["text"] if "text" in named else arguments[place])
            return function(*arguments, **named)

        return call

    for module, name, place in (
        (loading, "check_model", 1),
        (loading, "check_whole", 2),
        (planning, "choose_engine", 2),
    ):
        monkeypatch.setattr(module, name, watched(getattr(module, name), place))
    assert job.call("run").code == 0
    assert len(tried) == 3
    shown = {tuple(ids.tolist()) for ids in tried[0]}
    assert len(shown) > 5
    assert all({tuple(ids.tolist()) for ids in text} == shown for text in tried)


def test_nothing_temporary_is_left_in_store_or_work_folder(finished):
    job, _ended = finished
    run = job.only_run()
    steps = {key.split("/")[1] for key in objects(run) if key.startswith("checkpoints/")}
    assert "step-000030-a01" in steps
    fixed = ["adapter/README.md", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"]
    fixed += ["attempts/01-end.json", "attempts/01.json", "examples.jsonl", "latest.json", "lengths.png", "lock.json"]
    fixed += ["loss.png", "report.html", "report.json", "run.json"]
    assert [key for key in objects(run) if not key.startswith("checkpoints/")] == fixed
    assert all((run / "checkpoints" / step / "MANIFEST.json").exists() for step in steps)
    kept = [job.workdir / "models/quantised", job.workdir / "cache/encoded"]
    left = [p for p in job.workdir.rglob("*") if p.is_file() and not any(map(p.is_relative_to, kept))]
    assert left == []
    assert [p.name for folder in kept for p in folder.rglob(".*")] == []


def test_the_adapter_in_the_store_has_the_reported_hashes_and_no_base_weights(finished):
    job, _ended = finished
    adapter = job.report()["adapter"]
    for name, entry in adapter["files"].items():
        content = (job.only_run() / "adapter" / name).read_bytes()
        assert len(content) == entry["size"]
        assert hashlib.sha256(content).hexdigest() == entry["sha256"]
    from safetensors import safe_open

    with safe_open(job.only_run() / "adapter/adapter_model.safetensors", "pt") as file:
        assert all("lora_" in name for name in file.keys())  # noqa: SIM118 - no dict


def test_plain_peft_loads_the_adapter_and_gives_the_reported_loss(finished, base):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    job, _ended = finished
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[job.report()["plan"]["compute_dtype"]]
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    plain = AutoModelForCausalLM.from_pretrained(base, quantization_config=nf4, dtype=dtype, device_map="cpu")
    model = PeftModel.from_pretrained(plain, job.only_run() / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    total, count = 0.0, 0
    for line in (job.data / "validation.jsonl").read_text().splitlines():
        record = json.loads(line)
        prompt = tokenizer(record["question"] + "\n").input_ids
        ids = prompt + tokenizer(record["answer"], add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0].float()
        total += float(
            torch.nn.functional.cross_entropy(
                logits[len(prompt) - 1 : -1], torch.tensor(ids[len(prompt) :]), reduction="sum"
            )
        )
        count += len(ids) - len(prompt)
    assert total / count == pytest.approx(job.report()["sweet_spot"]["loss"], abs=2e-3)  # bf16, other kernels


def test_secrets_of_the_environment_are_nowhere(finished):
    job, ended = finished
    kept = [path.read_bytes().decode("utf-8", "replace") for path in job.store.rglob("*.json")]
    for text in [ended.stdout, ended.stderr, json.dumps(ended.outcome), *kept]:
        for secret in SECRETS.values():
            assert secret not in text


def test_a_second_start_is_a_no_op_that_loads_no_torch(finished, tmp_path):
    job, _ended = finished
    (tmp_path / "torch.py").write_text("raise ImportError('torch was loaded')")
    before = {path: path.stat().st_mtime_ns for path in job.store.rglob("*")}
    again = job.start("run", PYTHONPATH=str(tmp_path))
    assert again.code == 0, again.stdout + again.stderr
    assert [e["event"] for e in again.events] == ["phase", "already_done", "finished"]
    assert again.outcome["code"] == 0
    assert {path: path.stat().st_mtime_ns for path in job.store.rglob("*")} == before


def test_a_reader_who_goes_away_does_not_end_the_run(job):
    """As `run recipe.yaml | head -1` does: the pipe is closed, the work goes on."""
    job.recipe["evaluate"] = {"every_steps": 6}
    with job.begun("run") as running:
        running.until(lambda event: event["event"] == "phase")
        running.child.stdout.close()
        code = running.child.wait(240)
    assert code == 0
    assert job.report()["evaluations"][-1]["step"] == 6


def test_every_option_comes_from_the_environment_too(job, moto_place, tmp_path, warm):
    """And on an S3 server."""
    job.recipe["output"] = "s3://nowhere/at-all"
    settings = {
        "JOB_OUTPUT": moto_place.root,
        "JOB_RUN_ID": "from-the-environment",
        "JOB_SET": "train.steps=3\nlora.r=2\n\nevaluate.prompts=[]\n",
        "JOB_WORKDIR": str(tmp_path / "elsewhere"),
        "JOB_DEVICE": "cpu",
        "JOB_OUTCOME_FILE": str(tmp_path / "outcome-elsewhere.json"),
        "JOB_LOG_FORMAT": "console",
        **moto_place.server.environment(),
    }
    command = [sys.executable, str(ROOT / "entrypoint.py"), "run", str(job.write())]
    with process(command, cwd=tmp_path, environment=settings, image=warm) as running:
        running.outcome_file = tmp_path / "outcome-elsewhere.json"
        ended = running.end()
    assert ended.code == 0, ended.stdout + ended.stderr
    assert ended.outcome["run_uri"] == f"{moto_place.root}/runs/from-the-environment"
    assert "step 3/3" in ended.stdout
    assert "validation loss" in ended.stdout  # the report for people
    assert (tmp_path / "elsewhere" / "models").is_dir()
    prefix = moto_place.root.removeprefix(f"s3://{moto_place.bucket}/")
    client = moto_place.server.client()
    keys = [o["Key"] for o in client.list_objects_v2(Bucket=moto_place.bucket)["Contents"]]
    ours = tuple(f"{prefix}/{name}/" for name in ("runs/from-the-environment", "endings"))
    assert all(key.startswith(ours) for key in keys)
    assert len([key for key in keys if key.startswith(ours[1])]) == 1
    key = f"{prefix}/runs/from-the-environment/report.json"
    report = json.loads(client.get_object(Bucket=moto_place.bucket, Key=key)["Body"].read())
    assert report["recipe"]["lora"]["r"] == 2
    assert len(report["curve"]["loss"]) == 3
    assert moto_place.server.secret not in ended.stdout + json.dumps(report)


def test_overrides_of_the_environment_and_the_command_line_add_up_and_are_recorded(job):
    """Key by key: a site's own survive what one run sets besides, and give way where both name a key."""
    site = "train.steps=3\nlora.r=2\nevaluate.prompts=[]"
    ended = job.start(
        "run", "--set", "lora.r=8", "--set", "train.seed=1", "--output", f"file://{job.store}", JOB_SET=site
    )
    assert ended.code == 0, ended.stdout
    recipe = job.report()["recipe"]
    assert (recipe["train"]["steps"], recipe["lora"]["r"], recipe["evaluate"]["prompts"]) == (3, 8, [])
    assert recipe["train"]["seed"] == 1
    wanted = [
        {"key": "train.steps", "value": "3", "source": "JOB_SET"},
        {"key": "lora.r", "value": "2", "source": "JOB_SET", "overruled_by": "--set"},
        {"key": "evaluate.prompts", "value": "[]", "source": "JOB_SET"},
        {"key": "lora.r", "value": "8", "source": "--set"},
        {"key": "train.seed", "value": "1", "source": "--set"},
        {"key": "output", "value": f'"file://{job.store}"', "source": "--output"},
    ]
    facts = ("key", "value", "source", "overruled_by")
    assert [{f: e[f] for f in facts if f in e} for e in ended.named("override")] == wanted
    for record in ("run.json", "attempts/01.json"):
        assert json.loads((job.only_run() / record).read_text())["overrides"] == wanted


def test_where_an_override_came_from_is_no_part_of_what_the_run_is(job):
    """One that was begun with overrides is resumed by a recipe that says the same itself."""
    assert job.call("run", "--set", "lora.r=2", stop_in="train").code == 75
    job.recipe["lora"]["r"] = 2
    assert job.call("run").code == 0
    assert len(job.runs()) == 1
