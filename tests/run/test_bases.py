"""Bases as people bring them, through the whole job: trained as what they are, or refused by `check` and by `run`."""

import json
import shutil

import pytest
import torch
from job_process import write_lines
from layouts import bnb4_base, changed, config_with, in_fp8, prefixed, without
from transformers import CONFIG_MAPPING, AutoModelForCausalLM


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


_SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "head_dim": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}
_LENGTHS = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [6.0] * 8}
KINDS = {
    "a window in every layer": ("mistral", {"sliding_window": 3}),
    "soft caps, and a window in some layers": (
        "gemma2",
        {
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "sliding_window": 3,
            "tie_word_embeddings": True,
        },
    ),
    "a rotation by each document's length": (
        "phi3",
        {"rope_parameters": {**_LENGTHS, "original_max_position_embeddings": 8}, "original_max_position_embeddings": 8},
    ),
    "one document a row": ("lfm2", {"layer_types": ["conv", "full_attention"]}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_each_kind_goes_on_to_the_bit(job, base, kind):
    """Dense ones are in test_stop_and_resume, those that come in 4 bits above."""
    model_type, own = KINDS[kind]
    folder = shutil.copytree(base, job.folder / "own-base", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**{**_SIZES, **own})).save_pretrained(folder)
    job.recipe["model"]["base"], job.recipe["lora"]["targets"] = str(folder), "all-linear"

    checked = job.call("check")
    assert checked.code == 0
    assert f"a random {model_type} of 2 layers: loss its own, documents apart" in checked.stdout
    assert job.start("run", "--run-id", "whole").code == 0
    assert job.start("run", "--run-id", "cut", "--crash-at", "step.middle:6").code == -9
    assert job.start("run", "--run-id", "cut").code == 0
    whole, cut = (json.loads((job.store / f"runs/{name}/report.json").read_text()) for name in ("whole", "cut"))
    assert [attempt["from_step"] for attempt in cut["attempts"]][-1] > 0
    assert cut["model"]["loaded_from"] == "copy in 4 bits"
    assert cut["curve"] == whole["curve"]
    files = [report["adapter"]["files"]["adapter_model.safetensors"] for report in (whole, cut)]
    assert files[0] == files[1]
    for report in (whole, cut):
        assert report["adapter"]["proven_loss"] == report["adapter"]["reported_loss"]
