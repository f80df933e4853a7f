"""Bases as people bring them, through the whole job: trained as what they are, or refused by `check` and by `run`."""

import json

import pytest
import torch
from job_process import write_lines
from layouts import bnb4_base, changed, config_with, in_fp8, prefixed, without


def objects(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def refused(job, code, *words):
    """By check and by run with the same words, before anything was written."""
    for command in ("check", "run"):
        ended = job.call(command)
        assert ended.code == code, ended.stdout
        assert all(word in ended.outcome["reason"] for word in words), ended.outcome["reason"]
        assert objects(job.store / "runs") == []
    assert not list(job.workdir.rglob("*.safetensors"))
    assert "encode" not in ended.phases()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            without("layers.1.mlp"),
            ["3 tensors of the model are not in the files (model.layers.1.mlp.down_proj.weight, "],
        ),
        (prefixed("_orig_mod."), ["not of the model (_orig_mod.lm_head.weight, ", "which a wrapper left there"]),
        (in_fp8(128), ["stored as F8_E4M3", "scales are left over"]),
    ],
    ids=["a layer's MLP", "a wrapper's prefix", "fp8"],
)
def test_a_base_that_is_not_what_its_config_promises_is_refused_before_anything_moves(job, base, change, words):
    job.recipe["model"]["base"] = str(changed(base, job.folder / "own-base", change, sharded=True))

    refused(job, 65, "the weights are not what config.json promises", *words)


def test_a_base_that_is_quantised_in_another_way_is_refused_by_name(job, base):
    folder = config_with(
        changed(base, job.folder / "own-base", dict), quantization_config={"quant_method": "awq", "bits": 4}
    )
    (folder / "README.md").write_text("---\nbase_model: someone/whole\n---\n")
    job.recipe["model"]["base"] = str(folder)

    refused(job, 64, "quantised already, by AWQ (4 bits)", "someone/whole may be the model")
    assert job.call("check", "--quick").code == 64


def test_a_number_that_is_not_finite_is_named_and_no_copy_is_made_of_it(job, base):
    name = "model.layers.0.mlp.up_proj.weight"
    folder = changed(base, job.folder / "own-base", lambda t: t | {name: torch.full_like(t[name], float("nan"))})
    job.recipe["model"]["base"] = str(folder)

    ended = job.call("run")
    assert ended.code == 65
    assert f"NaN or infinity in {name}, in 1 of all tensors" in ended.outcome["reason"]
    assert not list(job.workdir.rglob("*.safetensors"))


def test_a_token_that_the_embeddings_have_no_row_for_is_refused_with_its_number(job, base):
    folder = changed(base, job.folder / "own-base", dict)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    first = tokenizer["added_tokens"][0]
    tokenizer["added_tokens"] += [
        first | {"id": number, "content": f"<|{number}|>", "special": False}
        for number in range(len(tokenizer["model"]["vocab"]), 129)
    ]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    job.recipe["model"]["base"] = str(folder)
    rows = [{"question": "12 red hats", "answer": "red 12"}] * 30
    write_lines(job.data / "train.jsonl", [*rows, {"question": "12 red <|128|> hats", "answer": "red 12"}])

    for command, options in (("check", ["--quick"]), ("plan", []), ("run", [])):
        ended = job.call(command, *options)
        assert ended.code == 65, ended.stdout
        assert (
            "train.jsonl:31: token '<|128|>' has the id 128, but the base's embeddings have 128 rows"
            in (ended.outcome["reason"])
        )
    write_lines(job.data / "train.jsonl", rows)
    job.recipe["evaluate"]["prompts"] = ["12 red <|128|>"]
    ended = job.call("check", "--quick")
    assert ended.code == 65
    assert "evaluate.prompts: 12 red <|128|>: token '<|128|>' has the id 128" in ended.outcome["reason"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float16},
            "NF4, single quantisation; 14 linear layers in 4 bits, 1 not (lm_head)",
        ),
        (
            {"llm_int8_skip_modules": ["lm_head", "model.layers.0.self_attn"]},
            "FP4, single quantisation; 10 linear layers in 4 bits, 5 not (q_proj, k_proj, v_proj, o_proj, lm_head)",
        ),
    ],
    ids=["nf4", "fp4"],
)
def test_a_base_in_4_bits_is_trained_as_it_is_resumed_to_the_bit_and_never_quantised_again(job, base, options, said):
    job.recipe["model"]["base"] = str(bnb4_base(base, job.folder / "own-base", **options))

    checked, planned = job.call("check"), job.call("plan")
    assert checked.code == planned.code == 0
    assert f"on this machine; {said}" in checked.stdout
    assert f"on this machine; {said}" in planned.stdout
    assert job.start("run", "--run-id", "whole").code == 0
    assert job.start("run", "--run-id", "cut", "--crash-at", "step.middle:6").code == -9
    assert job.start("run", "--run-id", "cut").code == 0

    whole, cut = (json.loads((job.store / f"runs/{name}/report.json").read_text()) for name in ("whole", "cut"))
    assert [attempt["from_step"] for attempt in cut["attempts"]][-1] > 0
    for report in (whole, cut):
        assert report["model"]["quantisation"].startswith(f"{said}; ")
        assert report["model"]["loaded_from"] == "weights"
        assert report["adapter"]["proven_loss"] == report["adapter"]["reported_loss"]
    assert cut["curve"] == whole["curve"]
    assert (
        cut["adapter"]["files"]["adapter_model.safetensors"] == whole["adapter"]["files"]["adapter_model.safetensors"]
    )
    assert not list(job.workdir.rglob("*.safetensors"))  # no copy of what is in 4 bits already
    assert said in (job.store / "runs/whole/adapter/README.md").read_text()
