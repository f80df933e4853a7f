"""What `check` counts with before torch is there is what training encodes with, or it is known not to be."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from job.tune.model.tokenizer import encodes_alike, named_positions, named_tokenizer

TEXTS = ["Mia wants three red lamps sent to Oslo by Friday.", "  two  spaces\n", "3 | red | lamp", "naïve 漢字 🙂"]


def on_bytes():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return tokenizer, alphabet


def on_words():
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer, [chr(c) for c in range(32, 127)]


def base(folder, *, model_type, tokenizer_class, kind):
    tokenizer, alphabet = kind()
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    tokenizer.train_from_iterator(
        TEXTS * 9, trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    )
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings.pop("tokenizer_class", None)
    settings.pop("backend", None)
    path.write_text(json.dumps(settings | ({"tokenizer_class": tokenizer_class} if tokenizer_class else {})))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "max_position_embeddings": 64}))
    return folder


@pytest.mark.parametrize(
    ("model_type", "tokenizer_class", "kind"),
    [
        ("llama", "LlamaTokenizer", on_words),
        ("llama", "LlamaTokenizerFast", on_words),
        ("llama", "PreTrainedTokenizerFast", on_bytes),
        ("llama", "TokenizersBackend", on_words),
        ("llama", "GPT2Tokenizer", on_bytes),
        ("mistral", "TokenizersBackend", on_words),
        ("qwen2", "Qwen2Tokenizer", on_bytes),
        ("qwen3", "Qwen2Tokenizer", on_bytes),
        ("gemma", "GemmaTokenizer", on_words),
        ("gemma3_text", "GemmaTokenizerFast", on_words),
    ],
)
def test_the_class_that_the_files_name_is_the_one_that_training_takes(tmp_path, model_type, tokenizer_class, kind):
    folder = base(tmp_path, model_type=model_type, tokenizer_class=tokenizer_class, kind=kind)
    ours, theirs = named_tokenizer(folder), AutoTokenizer.from_pretrained(folder)

    assert encodes_alike(ours, theirs)
    assert ours(TEXTS).input_ids == theirs(TEXTS).input_ids


@pytest.mark.parametrize(
    ("model_type", "tokenizer_class", "kind"),
    [
        ("llama", "LlamaTokenizerFast", on_bytes),
        ("llama", None, on_words),
        ("llama", "OurOwnTokenizer", on_words),
        ("mistral", "LlamaTokenizer", on_words),
        ("phi3", "LlamaTokenizerFast", on_words),
    ],
)
def test_what_cannot_be_known_so_is_left_to_training_s_way(tmp_path, model_type, tokenizer_class, kind):
    assert named_tokenizer(base(tmp_path, model_type=model_type, tokenizer_class=tokenizer_class, kind=kind)) is None


def test_another_class_or_another_word_is_seen(tmp_path):
    one = base(tmp_path / "one", model_type="llama", tokenizer_class="PreTrainedTokenizerFast", kind=on_bytes)
    other = base(tmp_path / "other", model_type="llama", tokenizer_class="PreTrainedTokenizerFast", kind=on_bytes)
    changed = named_tokenizer(other)
    assert encodes_alike(named_tokenizer(one), changed)
    changed.add_tokens(["lamps"])
    assert not encodes_alike(named_tokenizer(one), changed)

    words = base(tmp_path / "words", model_type="llama", tokenizer_class="TokenizersBackend", kind=on_words)
    assert not encodes_alike(named_tokenizer(one), named_tokenizer(words))


@pytest.mark.parametrize("name", ["", "AutoModelForCausalLM", "../x", ["a"], 5, "BertTokenizerX"])
def test_no_name_but_a_tokenizer_s_is_looked_up(tmp_path, name):
    folder = base(tmp_path, model_type="llama", tokenizer_class="TokenizersBackend", kind=on_words)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": name}))

    assert named_tokenizer(folder) is None


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        ('{"max_position_embeddings": 64}', 64),
        ('{"text_config": {"max_position_embeddings": 32}, "max_position_embeddings": 64}', 32),
        ('{"max_position_embeddings": true}', None),
        ('{"max_position_embeddings": "64"}', None),
        ("{}", None),
        ("[]", None),
        ("no json", None),
    ],
)
def test_positions_are_a_number_of_the_config_or_not_known(tmp_path, config, positions):
    (tmp_path / "config.json").write_text(config)

    assert named_positions(tmp_path) == positions
