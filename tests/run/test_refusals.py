"""Broken input: the code of the table, one message that says where and what to do, and nothing in the store."""

import gzip
import importlib.util
import json
import os
import shutil
import sys

import pytest
import zstandard
from disks import largest_file
from job_process import ROOT, call, objects, process, records, write_lines
from run_material import SECRETS, make_base

from job.core.errors import ending

GOOD = b'{"question": "12 red hats", "answer": "red 12"}\n'


def refused(job, ended, code, *words, counted=False):
    """One message, with these words; no traceback; the same in the outcome file; in the store its ending alone.

    `counted`: it may be tried again, so the store keeps that it was there.
    """
    assert ended.code == code, ended.stdout + ended.stderr
    assert "Traceback" not in ended.stdout + ended.stderr
    assert ended.stderr == ""
    (event,) = ended.named("ended")
    assert ended.events[-1] == event
    assert event["exit_code"] == code
    assert event["action"] == ending(code).action
    for word in words:
        assert word in event["reason"]
    assert ended.outcome["state"] == "ended"
    assert ended.outcome["code"] == code
    assert ended.outcome["reason"] == event["reason"]
    if job.store.is_dir():
        endings = [key for key in objects(job.store) if key.startswith("endings/")]
        assert {key.split("-")[1] for key in endings} <= {str(code)}
        left = [key for key in objects(job.store) if key not in endings]
        assert [key.partition("/")[2].partition("/")[2] for key in left] == (COUNTED if counted else [])


COUNTED = ["attempts/01-end.json", "attempts/01.json", "lock.json"]


WRONG_LINES = {
    "not JSON": (b"{oops}\n", ["train.jsonl:25: not JSON"]),
    "no object": (b"[1, 2]\n", ["train.jsonl:25: not a JSON object but a list"]),
    "missing field": (
        b'{"question": "12 red hats"}\n',
        ['train.jsonl:25: "answer" is missing (the record has "question")'],
    ),
    "empty field": (b'{"question": " ", "answer": "red"}\n', ['train.jsonl:25: "question" is empty']),
    "an object for a string": (
        b'{"question": "a", "answer": {"is": 7}}\n',
        ['train.jsonl:25: "answer" is an object, not a string'],
    ),
    "not UTF-8": (b'{"question": "a\xff", "answer": "b"}\n', ["train.jsonl:25: not UTF-8"]),
    "a NUL byte": (b'{"question": "a\0", "answer": "b"}\n', ["train.jsonl:25: holds a NUL byte"]),
    "thirty wrong lines": (b"oops\n" * 30, ["30 wrong lines of 60", "train.jsonl:44: not JSON", "and 10 more"]),
}


@pytest.mark.parametrize("kind", WRONG_LINES)
def test_a_wrong_line_is_named_with_its_file_and_number(job, kind):
    line, words = WRONG_LINES[kind]
    with (job.data / "train.jsonl").open("ab") as file:
        file.write(line)
    refused(job, job.call("run"), 65, *words, "\ncorrect them")


def test_leaving_wrong_lines_out_is_advised_only_where_it_can_help(job):
    """Nor does the word for the exit code advise it."""
    with (job.data / "train.jsonl").open("a") as file:
        file.write("oops\n")
    ended = job.call("run")
    assert "skip" not in ended.outcome["reason"] + ended.outcome["action"]
    job.recipe["data"]["bad_record_limit"] = 0.04
    assert "correct them, or set data.on_bad_record: skip" in job.call("run").outcome["reason"]


def test_a_reason_that_all_lines_share_is_told_in_one_line(job):
    job.recipe["data"]["prompt"] = "{questoin}\n"
    ended = job.call("run")
    assert ended.outcome["reason"].splitlines() == [
        "30 wrong lines of 30",
        '  in all 30 lines: "questoin" is missing (the record has "question", "answer"; did you mean "question"?)',
        "correct them, or name in data.prompt and data.completion the fields that the records have",
    ]


@pytest.mark.parametrize("key", ["model.base", "data.train", "data.validation"])
@pytest.mark.parametrize("path", ["./not/here", "nowhere/", "no/*.jsonl"])
def test_a_relative_path_that_names_nothing_is_told_with_the_folder_it_counts_from(job, monkeypatch, key, path):
    monkeypatch.chdir(job.folder)
    reason = job.call("run", "--set", f"{key}={path}").outcome["reason"]
    assert f"(relative to {job.folder}, where the job was started)" in reason
    assert path in reason or f"{job.folder}/{path.removeprefix('./')}" in reason
    assert "relative to" not in job.call("run", "--set", f"{key}={job.folder}/{path}").outcome["reason"]


def test_a_recipe_or_run_at_a_relative_path_is_told_so_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command in (["run", "no.yaml"], ["report", "runs.txt"], ["report", "out/runs/x"], ["report", "out/runs"]):
        (ended,) = call(*command).named("ended")
        assert f"(relative to {tmp_path}, where the job was started)" in ended["reason"], command


def test_wrong_data_is_refused_before_the_weights_are_fetched(job):
    (job.data / "train.jsonl").write_bytes(b"oops\n")
    ended = job.call("run")
    refused(job, ended, 65, "train.jsonl:1: not JSON")
    assert "fetch_base" in ended.phases()
    assert "fetch_weights" not in ended.phases()


def test_a_wrong_line_is_told_from_one_in_a_file_of_the_same_name(job):
    """train/part.jsonl and validation/part.jsonl: the short name alone would send a person to the wrong file."""
    for side in ("train", "validation"):
        write_lines(job.data / side / "part.jsonl", records(4))
        job.recipe["data"][side] = f"file://{job.data}/{side}/part.jsonl"
    with (job.data / "validation" / "part.jsonl").open("a") as file:
        file.write("oops\n")
    refused(job, job.call("run"), 65, f"file://{job.data}/validation/part.jsonl:5: not JSON")


def truncated_gzip(job):
    (job.data / "train.jsonl").write_bytes(gzip.compress(GOOD * 2000)[:-20])
    return 65, ["train.jsonl:", "damaged", "write it again"]


def damaged_gzip(job):
    content = bytearray(gzip.compress(GOOD * 2000))
    content[-6] ^= 0xFF  # the checksum
    (job.data / "train.jsonl").write_bytes(content)
    return 65, ["train.jsonl:", "damaged"]


def truncated_zstd(job):
    (job.data / "train.jsonl").write_bytes(zstandard.compress(os.urandom(3000).hex().encode())[:-9])
    return 65, ["train.jsonl:1: the compressed file is damaged", "write it again"]


def empty_file(job):
    (job.data / "train.jsonl").write_bytes(b"")
    return 65, ["data.train: no example is left", "train.jsonl", "give more examples"]


def too_many_skipped(job):
    (job.data / "train.jsonl").write_bytes(b"oops\n" * 9 + GOOD)
    job.recipe["data"] |= {"on_bad_record": "skip", "bad_record_limit": 0.5}
    return 65, ["train.jsonl:1: not JSON", "90.00%", "bad_record_limit"]


def too_long(job):
    write_lines(job.data / "train.jsonl", [*records(4), {"question": "12 " * 30, "answer": "red"}])
    job.recipe["data"] |= {"max_length": 16, "too_long": "fail"}
    return 65, ["train.jsonl:5: 34 tokens", "max_length 16", "too_long: truncate or drop"]


def beyond_the_positions(job):
    job.recipe["data"]["max_length"] = 65
    return 64, ["data.max_length is 65", "64 positions", "lower it"]


def nothing_under_the_glob(job):
    (job.data / "train.jsonl").unlink()
    return 66, [f"file://{job.data}/train*.jsonl", "matches no object"]


def no_validation_file(job):
    (job.data / "validation.jsonl").unlink()
    return 66, [f"file://{job.data}/validation.jsonl", "correct the URI"]


def unknown_target(job):
    job.recipe["lora"]["targets"] = ["q_proj", "c_attn"]
    return 64, ["lora.targets: c_attn", "it has", "q_proj"]


def no_base(job):
    job.recipe["model"]["base"] = "./not/here"
    return 66, ["./not/here: no such folder", "correct model.base"]


def pickles_only(job):
    base = copied_base(job)
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    return 64, ["pickles only (pytorch_model.bin)", "convert them to safetensors"]


def remote_code(job):
    change_config(copied_base(job), model_type="my_own", auto_map={"AutoModelForCausalLM": "modeling.My"})
    return 64, ["'my_own' needs code from its own repository", "never runs downloaded code"]


def no_language_model(job):
    change_config(copied_base(job), model_type="t5")
    return 64, ["t5", "choose another"]


def cut_weights(job):
    weights = copied_base(job) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return 65, ["model.safetensors", "fetch the model again"]


def no_tokenizer(job):
    (copied_base(job) / "tokenizer.json").unlink()
    return 64, ["no usable tokenizer", "tokenizer.json"]


def output_under_a_file(job):
    (job.folder / "file").write_text("")
    job.recipe["output"] = f"file://{job.folder}/file/store"
    return 66, [f"file://{job.folder}/file/store", "Not a directory"]


def a_work_folder_that_cannot_be_made(job):
    (job.folder / "file").write_text("")
    job.workdir = job.folder / "file" / "work"
    return 74, [f"{job.workdir}", "name another work folder with --workdir"]


def unknown_scheme(job):
    job.recipe["output"] = "gs://bucket/prefix"
    return 64, ["gs://", "s3://bucket/key"]


def one_unknown_key(job):
    job.recipe["train"]["learningrate"] = 1
    return 64, [f"{job.recipe_path}:", "train.learningrate: unknown key"]


def several_mistakes(job):
    job.recipe["train"] |= {"batch_size": 0, "optimizer": "adam"}
    del job.recipe["output"]
    return 64, ["3 mistakes", "train.batch_size", "train.optimizer", "output: missing"]


BROKEN = [
    *(truncated_gzip, damaged_gzip, truncated_zstd, empty_file, too_many_skipped, too_long, beyond_the_positions),
    *(nothing_under_the_glob, no_validation_file, unknown_target, no_base, pickles_only, remote_code),
    *(no_language_model, cut_weights, no_tokenizer, output_under_a_file, a_work_folder_that_cannot_be_made),
    *(unknown_scheme, one_unknown_key, several_mistakes),
]


def copied_base(job):
    base = shutil.copytree(job.recipe["model"]["base"], job.folder / "own-base")
    job.recipe["model"]["base"] = str(base)
    return base


def change_config(base, **values):
    path = base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.__name__)
def test_broken_input_is_refused_with_one_message_and_leaves_nothing(job, broken):
    code, words = broken(job)
    refused(job, job.call("run"), code, *words)


@pytest.mark.parametrize("broken", [unknown_target, beyond_the_positions, too_long, output_under_a_file])
def test_check_refuses_the_same_with_the_same_code(job, broken):
    code, words = broken(job)
    ended = job.call("check")
    assert ended.code == code
    assert len([line for line in ended.stdout.splitlines() if line.startswith("NO ")]) == 1
    assert all(word in ended.stdout for word in words)
    assert ended.outcome["code"] == code
    assert ended.outcome["reason"] in ended.stdout
    assert objects(job.folder / "store") == []


def test_an_adapter_on_a_tied_head_is_refused_before_anything_is_written(job):
    job.recipe["model"]["base"] = str(make_base(job.folder / "tied", tied=True))
    refused(job, job.call("run"), 64, "lm_head", "tied", "leave lm_head out")


def test_a_gpu_that_is_asked_for_and_not_there_ends_82(job):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one here")
    refused(job, job.call("run", "--device", "cuda"), 82, "no GPU is visible", "another node")


def test_a_recipe_that_is_not_there_is_a_mistake_of_the_command_line(job):
    ended = call("run", "nowhere.yaml", "--outcome-file", str(job.outcome_file), outcome_file=job.outcome_file)
    refused(job, ended, 64, "nowhere.yaml", "cannot be read")


@pytest.mark.parametrize(
    "mistake", [["--device", "tpu"], ["--bogus"], ["--set"]], ids=["value", "option", "value missing"]
)
def test_a_wrong_option_is_told_once_on_stderr_and_in_the_outcome_file(job, monkeypatch, mistake):
    monkeypatch.setenv("JOB_OUTCOME_FILE", str(job.outcome_file))
    ended = call("run", str(job.write()), *mistake, outcome_file=job.outcome_file)
    assert ended.code == ended.outcome["code"] == 64
    assert ended.stdout == ""
    assert ended.stderr.count("Error:") == 1
    assert ended.outcome["reason"] in ended.stderr


def test_a_bucket_that_does_not_exist_ends_66(job, moto_http, s3_environment):
    s3_environment(moto_http)
    job.recipe["output"] = "s3://no-such-bucket-here/prefix"
    refused(job, job.call("run"), 66, "s3://no-such-bucket-here", "NoSuchBucket", "correct the URI")


def test_data_that_does_not_exist_in_the_bucket_ends_66(job, moto_place):
    job.recipe["data"]["train"] = f"s3://{moto_place.bucket}/train.jsonl"
    refused(job, job.call("run"), 66, f"s3://{moto_place.bucket}/train.jsonl", "correct the URI")


def test_a_store_that_knows_no_such_credentials_ends_77(job, faulty_place, proxy):
    from faults import Fault

    proxy.rule = lambda _request: Fault(status=403, code="InvalidAccessKeyId")
    job.recipe["output"] = faulty_place.root
    refused(job, job.call("run"), 77, "InvalidAccessKeyId", "correct AWS_ACCESS_KEY_ID")


def test_an_output_that_may_only_be_read_is_refused_before_the_data_moves(job, faulty_place, proxy):
    from faults import NO_FAULT, Fault

    proxy.rule = lambda request: Fault(status=403, code="AccessDenied") if request.method == "PUT" else NO_FAULT
    job.recipe["output"] = faulty_place.root
    ended = job.call("run")
    refused(job, ended, 77, faulty_place.root, "AccessDenied")
    assert ended.phases() == ["identify", "try_output"]


def test_no_credentials_at_all_ends_77_and_says_where_they_come_from(job, moto_http, s3_environment, monkeypatch):
    s3_environment(moto_http)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    job.recipe["output"] = "s3://some-bucket/prefix"
    refused(job, job.call("run"), 77, "no usable credentials", "AWS_PROFILE")


def test_a_disk_that_is_full_while_encoding_ends_74(job):
    with gzip.open(job.data / "train.jsonl", "wt") as file:  # small as it is fetched, large as it is encoded
        file.writelines(json.dumps(record) + "\n" for record in records(5000))
    with largest_file(60_000):
        ended = job.call("run")
    refused(job, ended, 74, "--workdir", counted=True)
    assert ended.phases()[-1] == "encode"


def test_a_disk_that_is_full_while_a_checkpoint_is_saved_ends_74_and_resumes_when_it_has_room(job):
    job.recipe["train"]["steps"] = 2
    with largest_file(9_000):
        ended = job.call("run")
    assert ended.code == 74, ended.stdout
    assert "Traceback" not in ended.stdout
    (event,) = ended.named("ended")
    assert "checkpoint" in event["reason"]
    assert "--workdir" in event["reason"]
    assert not list(job.only_run().glob("checkpoints/*/MANIFEST.json"))
    assert job.call("run").code == 0
    assert [a["exit_code"] for a in job.report()["attempts"]] == [74, 0]


def test_a_loss_that_is_not_finite_ends_80_with_the_step_and_its_examples(job):
    job.recipe["train"] |= {"learning_rate": 1e30, "optimizer": "sgd", "max_grad_norm": 1e9}
    ended = job.call("run")
    assert ended.code == 80, ended.stdout
    (event,) = ended.named("ended")
    assert "step 2" in event["reason"]
    assert "lower" in event["reason"].lower()
    assert event["reason"].count("train.jsonl:") == job.recipe["train"]["batch_size"]
    assert "the last good checkpoint is that of step 0" in event["reason"]
    assert event["last_committed_step"] == 0
    assert ended.outcome["code"] == 80
    assert not (job.only_run() / "report.json").exists()
    assert job.call("run").code == 80  # it diverges again, from its checkpoint


def test_a_validation_loss_that_is_not_finite_ends_80_too(job):
    """Here one word of the base makes numbers beyond fp32 of finite weights; only the third held-out example has it."""
    from safetensors.torch import load_file, save_file

    base = copied_base(job)
    weights, words = base / "model.safetensors", json.loads((base / "tokenizer.json").read_text())["model"]["vocab"]
    tensors = load_file(weights)
    channel = 5
    tensors["model.embed_tokens.weight"][:, channel] = 0
    tensors["model.layers.0.self_attn.o_proj.weight"][channel] = 0
    tensors["model.embed_tokens.weight"][words["60"], channel] = 1
    for name in ("gate_proj", "up_proj"):
        tensors[f"model.layers.0.mlp.{name}.weight"][:, channel] = 1e30
    save_file(tensors, weights, metadata={"format": "pt"})
    rows = [{"question": f"{n} red hats", "answer": f"red {n}"} for n in (20, 21, 60, 22)]
    write_lines(job.data / "validation.jsonl", rows)
    write_lines(job.data / "train.jsonl", rows[:2])
    ended = job.call("run")
    assert ended.code == 80, ended.stdout
    (event,) = ended.named("ended")
    assert "step 0: the validation loss is nan" in event["reason"]
    assert "validation.jsonl:3 (1 in all)" in event["reason"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_store_that_may_not_be_written_ends_77(job):
    job.store.mkdir()
    job.store.chmod(0o500)
    refused(job, job.call("run"), 77, str(job.store), "access")


def test_a_secret_that_an_error_would_carry_is_hidden_everywhere(job, monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    secret = SECRETS["MY_API_KEY"]
    job.recipe["data"]["train"] = f"file://{job.data}/{secret}/train.jsonl"
    for command in ("run", "check"):
        ended = job.call(command)
        assert ended.code == 66
        assert "[hidden]" in ended.stdout
        assert "[hidden]" in ended.outcome["reason"]
        assert secret not in ended.stdout + ended.stderr + json.dumps(ended.outcome)


def test_a_secret_in_the_reason_of_an_attempt_is_hidden_in_the_store(job, monkeypatch):
    secret = SECRETS["MY_API_KEY"]
    monkeypatch.setenv("MY_API_KEY", secret)
    job.workdir = job.folder / secret
    with largest_file(9_000):
        assert job.call("run").code == 74
    kept = [path.read_text() for path in job.only_run().rglob("*.json")]
    assert any("[hidden]" in text for text in kept)
    assert not any(secret in text for text in kept)


def test_an_answer_to_a_bug_is_70_with_its_traceback_in_one_event(job, tmp_path, warm):
    """A library that fails in a way nobody foresaw, an end of file at that: click takes those for its own."""
    (tmp_path / "pyarrow.py").write_text("raise EOFError('odd')\n")
    command = [sys.executable, str(ROOT / "entrypoint.py"), "run", str(job.write()), "--workdir", str(job.workdir)]
    planted = {"environment": {"PYTHONPATH": str(tmp_path)}, "forget": ("pyarrow", "job")}
    with process(command, cwd=job.folder, image=warm, **planted) as running:
        ended = running.end()
    assert ended.code == 70, ended.stdout
    (event,) = ended.named("ended")
    assert event["reason"] == "odd"
    assert "pyarrow.py" in event["traceback"]
    assert [path.name for path in sorted(job.only_run().rglob("*.json"))] == ["01-end.json", "01.json", "lock.json"]


def test_wrong_lines_of_both_sides_are_told_at_once(job):
    for side in ("train", "validation"):
        with (job.data / f"{side}.jsonl").open("a") as file:
            file.write("oops\n")
    refused(job, job.call("run"), 65, "2 wrong lines", "train.jsonl:25: not JSON", "validation.jsonl:")


def test_a_tracker_without_its_package_is_refused_before_anything_is_begun(job):
    absent = next((name for name in ("wandb", "mlflow") if importlib.util.find_spec(name) is None), None)
    if absent is None:
        pytest.skip("every tracker's package is installed here")
    job.recipe["track"] = {"trackers": [absent]}
    refused(job, job.call("run"), 64, f"{absent} is not installed here")
    assert job.call("check").code == 64


def test_no_folder_is_left_in_the_work_folder_by_a_run_that_nobody_goes_on_with(job):
    with (job.data / "train.jsonl").open("a") as file:
        file.write("oops\n")
    assert job.call("run").code == 65
    assert list((job.folder / "work" / "runs").iterdir()) == []


def test_check_looks_at_the_lines_also_when_the_base_is_not_there(job):
    with (job.data / "train.jsonl").open("a") as file:
        file.write("oops\n")
    job.recipe["model"]["base"] = str(job.folder / "nowhere")
    ended = job.call("check")
    assert ended.code == 66
    assert "NO  data" in ended.stdout
    assert "train.jsonl:25: not JSON" in ended.stdout
    assert "ok  credentials none needed" in ended.stdout
