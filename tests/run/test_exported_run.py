"""`export`: a finished run as a model of its own, which nothing but transformers is needed to load."""

import json
import shutil
import sys

import pytest
import torch
from job_process import ROOT, Job, call, process, records, write_lines
from peft import PeftModel
from test_chat_run import chats
from tiny_wrappers import write_wrapper
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from job.core.reports import export as exports
from job.core.reports.export import Export
from job.tune.model.tokenizer import encodes_alike


def exported(job, to, *options, run=None):
    words = ("--workdir", str(job.workdir), "--device", "cpu", "--outcome-file", str(job.outcome_file))
    uri = f"file://{run or job.only_run()}"
    return call("export", uri, "--to", str(to), *words, *options, outcome_file=job.outcome_file)


@pytest.fixture(scope="module")
def done(tmp_path_factory, base, warm):
    """A finished run; look, do not touch."""
    job = Job(tmp_path_factory.mktemp("exported"), base, warm)
    assert job.start("run").code == 0
    return job


def loss_of(model, tokenizer, rows, recipe):
    """Held-out loss, by transformers alone."""
    total, count = 0.0, 0
    for row in rows:
        prompt = tokenizer(recipe["prompt"].format_map(row)).input_ids
        ids = torch.tensor([prompt + tokenizer(recipe["completion"].format_map(row)).input_ids[1:] + [2]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, len(prompt) :], reduction="sum"))
        count += ids.shape[1] - len(prompt)
    return total / count


@pytest.mark.parametrize("onto", ["weights", "quantised"])
def test_the_merged_model_is_loaded_by_transformers_alone_and_is_as_good_as_it_says(done, onto, tmp_path):
    ended = exported(done, tmp_path / "merged", "--onto", onto)
    assert ended.code == 0, ended.stdout
    found = Export.model_validate_json((tmp_path / "merged" / "export.json").read_text())
    report = done.report()
    assert (found.run_uri, found.step, found.onto) == (report["run_uri"], report["sweet_spot"]["step"], onto)
    assert found.losses.reported == report["sweet_spot"]["loss"]
    assert (found.losses.examples, found.losses.tokens) == (6, report["evaluations"][0]["tokens"])
    assert ended.named("exported")[0]["merged_loss"] == round(found.losses.merged, 6)
    assert ended.outcome["code"] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged"]

    merged, loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, output_loading_info=True
    )
    assert not any(loaded[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    settings = json.loads((tmp_path / "merged" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"  # the base's own is of transformers 5 alone
    assert encodes_alike(tokenizer, AutoTokenizer.from_pretrained(done.recipe["model"]["base"]))
    rows, data = records(6, seed=1), report["recipe"]["data"]
    assert loss_of(merged, tokenizer, rows, data) == pytest.approx(found.losses.merged, rel=5e-3)
    base = AutoModelForCausalLM.from_pretrained(report["model"]["base"], dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, done.only_run() / "adapter").eval()
    assert loss_of(adapted, tokenizer, rows, data) == pytest.approx(found.losses.unmerged, rel=5e-3)
    compared = found.losses.unmerged if onto == "weights" else found.losses.reported
    assert found.losses.merged == pytest.approx(compared, rel=5e-3)
    assert found.losses.merged < report["sweet_spot"]["base_loss"]


def test_its_last_lines_say_where_it_is_and_what_proves_it(done, tmp_path, monkeypatch):
    monkeypatch.setenv("JOB_LOG_FORMAT", "console")
    ended = exported(done, tmp_path / "merged", "--proof-examples", "3")
    assert ended.code == 0
    losses = Export.model_validate_json((tmp_path / "merged" / "export.json").read_text()).losses
    lines = ended.stdout.splitlines()
    assert f"merged model       file://{tmp_path}/merged" in lines
    assert "validation loss    on 3 of 6 held-out examples, nats a token" in lines
    assert f"  merged           {losses.merged:.4f}" in lines
    assert any(line.startswith(f"  adapter, 16 bits {losses.unmerged:.4f}") for line in lines)
    assert any(line.startswith(f"  adapter, 4 bits  {losses.reported:.4f}") for line in lines)
    assert losses.reported != done.report()["sweet_spot"]["loss"]  # of the same three examples
    assert losses.reported == pytest.approx(losses.unmerged, rel=0.02)


def test_a_second_time_nothing_is_done_and_another_model_is_not_written_over_it(done, tmp_path):
    assert exported(done, tmp_path / "merged").code == 0
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "merged").iterdir()}
    again = exported(done, tmp_path / "merged")
    assert again.code == 0
    assert again.named("already_there")
    refused = exported(done, tmp_path / "merged", "--onto", "quantised")
    assert refused.code == 64
    assert "onto weights; name another" in refused.outcome["reason"]
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "merged").iterdir()} == before
    (tmp_path / "merged" / "config.json").unlink()
    assert "not all of its files" in exported(done, tmp_path / "merged").outcome["reason"]


def test_a_place_that_is_taken_is_refused_before_anything_is_fetched(done, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("a")
    ended = exported(done, tmp_path / "thesis")
    assert ended.code == 64
    assert ended.phases() == ["load_libraries", "identify"]
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter.tex"]


def test_a_model_that_is_not_what_was_judged_is_refused_and_leaves_nothing(done, tmp_path, monkeypatch):
    monkeypatch.setattr(exports, "ROUNDING", 0.0)
    monkeypatch.setattr(exports, "ROUNDING_OF_GAIN", 0.0)
    ended = exported(done, tmp_path / "merged")
    assert ended.code == 64
    assert "serve it beside its base" in ended.outcome["reason"]
    assert [*tmp_path.iterdir()] == []


def test_a_run_that_is_not_finished_or_not_there_is_refused(job, tmp_path):
    assert exported(job, tmp_path / "merged", run=job.store / "runs" / "a").code == 66
    assert job.start("run", "--run-id", "a", "--crash-at", "report.before").code == -9
    ended = exported(job, tmp_path / "merged", run=job.store / "runs" / "a")
    assert ended.code == 66
    assert "not finished" in ended.outcome["reason"]


def test_data_that_has_gone_and_a_base_that_has_changed_are_refused(job, base, tmp_path):
    shutil.copytree(base, job.folder / "own-base")
    job.recipe["model"]["base"] = str(job.folder / "own-base")
    assert job.start("run").code == 0
    write_lines(job.data / "train-new.jsonl", records(4, seed=9))  # under the glob: the run is the run
    assert exported(job, tmp_path / "first").code == 0
    validation = job.data / "validation.jsonl"
    kept = validation.read_text()
    write_lines(validation, records(6, seed=2))
    ended = exported(job, tmp_path / "merged")
    assert ended.code == 66
    assert "held-out examples are needed" in ended.outcome["reason"]
    validation.write_text(kept)
    config = job.folder / "own-base" / "config.json"
    config.write_text(config.read_text() + "\n")
    ended = exported(job, tmp_path / "merged")
    assert ended.code == 66
    assert "another base stands there now" in ended.outcome["reason"]


def test_a_damaged_adapter_is_refused(job, tmp_path):
    assert job.start("run").code == 0
    weights = job.only_run() / "adapter" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert exported(job, tmp_path / "merged").code == 65
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("phase", ["merge", "prove"])
def test_killed_in_the_middle_nothing_looks_whole_and_the_next_one_does_it(done, phase, warm, tmp_path):
    command = [sys.executable, str(ROOT / "entrypoint.py"), "export", f"file://{done.only_run()}"]
    command += ["--to", str(tmp_path / "merged"), "--workdir", str(tmp_path / "work"), "--device", "cpu"]
    with process(command, cwd=tmp_path, environment={}, image=warm) as running:
        running.until(lambda event: event["event"] == "phase" and event["name"] == phase)
        running.child.kill()
        running.child.wait()
    assert not (tmp_path / "merged").exists()
    with process(command, cwd=tmp_path, environment={}, image=warm) as running:
        assert running.end().code == 0
    assert (tmp_path / "merged" / "export.json").is_file()
    assert not [path for path in tmp_path.iterdir() if "unfinished" in path.name]


def test_it_goes_into_a_bucket(done, moto_place, tmp_path):
    uri = f"{moto_place.root}/merged"
    assert exported(done, uri).code == 0
    client, prefix = moto_place.server.client(), "some where/runs/merged/"
    listed = client.list_objects_v2(Bucket=moto_place.bucket, Prefix=prefix)["Contents"]
    names = {entry["Key"].removeprefix(prefix) for entry in listed}
    assert names == {
        *("MANIFEST.json", "README.md", "config.json", "export.json", "generation_config.json"),
        *("model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    }
    (tmp_path / "back").mkdir()
    for name in names:
        client.download_file(moto_place.bucket, prefix + name, str(tmp_path / "back" / name))
    AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert exported(done, uri).named("already_there")


TEMPLATE = "{% for m in messages %}{{ m.content + ('hats' if m.role == 'assistant' else '\\n') }}{% endfor %}"


def test_template_and_stops_are_those_that_were_trained(job, base, tmp_path):
    """The base's own settings know neither the template nor the token that a turn ends with."""
    own = shutil.copytree(base, job.folder / "own-base")
    tokenizer = json.loads((own / "tokenizer.json").read_text())
    hats = {"id": 4, "content": "hats", "special": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    (own / "tokenizer.json").write_text(
        json.dumps(tokenizer | {"added_tokens": [*tokenizer["added_tokens"], hats | flags]})
    )
    settings = json.loads((own / "tokenizer_config.json").read_text())
    (own / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": "{{ messages[0].content }}"}))
    (own / "LICENSE").write_text("as you like")
    (own / "README.md").write_text("the base's own claims")
    write_lines(job.data / "train.jsonl", [{"messages": m["messages"]} for m in _without_hats(24, 0)])
    write_lines(job.data / "validation.jsonl", [{"messages": m["messages"]} for m in _without_hats(6, 1)])
    (job.folder / "own.jinja").write_text(TEMPLATE, encoding="utf-8")
    job.recipe["model"]["base"] = str(own)
    job.recipe["data"] |= {"prompt": None, "completion": None, "chat": "messages", "chat_template": "own.jinja"}
    job.recipe["evaluate"]["prompts"] = ["12 red"]
    ended = job.start("run")
    assert ended.code == 0, ended.stdout
    assert exported(job, tmp_path / "merged").code == 0

    merged = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert merged.chat_template == TEMPLATE
    (adapter,) = (job.store / "runs").glob("*/adapter")
    assert AutoTokenizer.from_pretrained(adapter).chat_template == TEMPLATE
    assert json.loads((adapter / "generation_config.json").read_text())["eos_token_id"] == [4, 2]
    assert json.loads((tmp_path / "merged" / "generation_config.json").read_text())["eos_token_id"] == [4, 2]
    assert (tmp_path / "merged" / "LICENSE").read_text() == "as you like"
    assert "claims" not in (tmp_path / "merged" / "README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert model.generation_config.eos_token_id == [4, 2]


def _without_hats(count, seed):
    def plain(message):
        return message | {"value": message["value"].removesuffix(" hats")}

    return [{"messages": [plain(message) for message in chat["messages"]]} for chat in chats(count, seed)]


def test_the_decoder_of_a_multimodal_base_and_a_mixture_are_exported(job, base, tmp_path):
    for name, auto in (("gemma3", AutoModelForImageTextToText), ("qwen3_vl_moe", AutoModelForImageTextToText)):
        own = job.folder / f"base-{name}"
        shutil.copytree(base, own, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
        write_wrapper(own, name, most_bytes="60KB")
        job.recipe["model"]["base"] = str(own)
        job.recipe["lora"]["targets"] = "all-linear"
        assert job.start("run", "--run-id", name).code == 0
        ended = exported(job, tmp_path / name, run=job.store / "runs" / name)
        assert ended.code == 0, ended.stdout
        _, loaded = auto.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not any(loaded[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert len(list((tmp_path / name).glob("*.safetensors"))) == len(list(own.glob("*.safetensors"))) > 1
