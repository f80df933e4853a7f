"""A base whose small files promise, or are, far more than its weights hold."""

import json
import shutil

import pytest


@pytest.fixture
def own_base(job):
    base = shutil.copytree(job.recipe["model"]["base"], job.folder / "own-base")
    job.recipe["model"]["base"] = str(base)
    return base


def change_config(base, **values):
    path = base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


NO_MODEL = {
    "a million layers": ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1,000,000"),
    "a billion words": ({"vocab_size": 10**9}, "vocab_size is 1,000,000,000"),
    "a billion layers that are listed as they are read": (
        {"model_type": "qwen3", "num_hidden_layers": 10**9},
        "num_hidden_layers is 1,000,000,000",
    ),
    "a width of a billion inside": ({"text_config": {"hidden_size": 10**9}}, "hidden_size is 1,000,000,000"),
}


@pytest.mark.parametrize("kind", NO_MODEL)
def test_a_config_of_no_model_there_is_ends_65_before_it_is_built(job, own_base, kind):
    values, words = NO_MODEL[kind]
    change_config(own_base, **values)
    ended = job.attacked(mib=1024)
    assert ended.code == ended.outcome["code"] == 65, ended.stdout
    assert words in ended.outcome["reason"]


OTHER_SIZES = {
    "an embedding of gigabytes": ({"vocab_size": 8 * 10**6}, "x 64 in the files, 8,000,000 x 64 in the model"),
    "hundreds of layers": ({"num_hidden_layers": 900}, "8,082 tensors of the model are not in the files"),
}


@pytest.mark.parametrize("kind", OTHER_SIZES)
def test_a_config_that_its_weights_are_too_small_for_ends_65(job, own_base, kind):
    """Left alone, transformers makes up what is missing."""
    values, words = OTHER_SIZES[kind]
    change_config(own_base, **values)
    ended = job.attacked(mib=1024)
    assert ended.code == ended.outcome["code"] == 65, ended.stdout
    assert words in ended.outcome["reason"]


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_small_file_that_is_large_ends_65_unread(job, own_base, name):
    with (own_base / name).open("r+b") as file:
        file.truncate(2**28)
    ended = job.attacked("check", mib=1024)
    assert ended.code == ended.outcome["code"] == 65, ended.stdout
    assert f"{name} has 268,435,456 bytes" in ended.outcome["reason"]


def test_a_header_of_weights_that_is_no_header_ends_65_unread(job, own_base):
    length = 90 * 10**6
    (own_base / "model.safetensors").write_bytes(length.to_bytes(8, "little") + b'{"a":[' + b"[]," * (length // 3))
    ended = job.attacked(mib=1024)
    assert ended.code == ended.outcome["code"] == 65, ended.stdout
    assert "no safetensors header" in ended.outcome["reason"]
