"""A tiny base of random weights, written by the command under test, and examples that it can read."""

import json

import pytest


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *(str(number) for number in range(100))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def base(tmp_path_factory, tokenizer_folder):
    from bench.random_base import write_base

    folder = tmp_path_factory.mktemp("bases") / "tiny-llama"
    write_base("tiny-llama", folder, tokenizer_folder)
    return folder


@pytest.fixture(scope="session")
def examples(tmp_path_factory):
    path = tmp_path_factory.mktemp("examples") / "train.jsonl"
    numbers = [(n % 97, n * 7 % 89, n * 5 % 83) for n in range(40)]
    path.write_text("".join(json.dumps({"t": " ".join(map(str, row))}) + "\n" for row in numbers))
    return path


@pytest.fixture
def calls(tmp_path, base, examples):
    """The main of a command of bench/ -> what calls it here, and returns its exit code and what it has written."""

    def of(main):
        def call(*options):
            given = ["--base", str(base), "--train", str(examples), "--text", "{t}", "--device", "cpu"]
            with pytest.raises(SystemExit) as ended:
                main([*given, *options, "--results", str(tmp_path / "R.md")])
            return ended.value.code, (tmp_path / "R.md").read_text()

        return call

    return of
