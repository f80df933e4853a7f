"""Beside an adapter stands what a server needs to ask and to stop as it was taught, and no file more."""

import json

import pytest
from chat_styles import STYLES, random_chat, template_of, write_chat_tokenizer
from transformers import AutoTokenizer

from job.core.data.chats import Chat, chat_of
from job.core.recipe.data_section import DataSection
from job.tune.data.chats.chat import ChatTemplates, chat_rules
from job.tune.data.frame import encode_given, token_rules
from job.tune.model.serving import write_serving_files
from job.tune.model.tokenizer import encodes_alike

CHATS = DataSection(train=("s3://a/b.jsonl",), chat="messages")
OTHER = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content + eos_token }}{% endfor %}[assistant]"


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Of each style a folder with its tokenizer and a config."""
    root = tmp_path_factory.mktemp("bases")
    for style in STYLES:
        write_chat_tokenizer(root / style, style)
        (root / style / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 2}))
    return root


@pytest.fixture
def adapter(tmp_path):
    """A folder as it is before: what PEFT reads of it names a base that is not here."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "owner/name", "peft_type": "LORA"})
    )
    return folder


def written(adapter, base, data, *, ends=()):
    return write_serving_files(adapter, base, AutoTokenizer.from_pretrained(base), data, ends=ends)


@pytest.mark.parametrize("style", STYLES)
def test_a_base_whose_own_template_taught_is_served_with_its_own_files(bases, adapter, style):
    assert written(adapter, bases / style, CHATS) == []
    own = CHATS.model_copy(update={"chat_template": template_of(style)})
    assert written(adapter, bases / style, own) == []
    texts = DataSection(train=("s3://a/b.jsonl",), text="{a}")
    assert written(adapter, bases / style, texts) == []


@pytest.mark.parametrize(
    ("style", "template"),
    [(style, name) for style in STYLES for name in ("chatml", "alpaca", "other") if not style == name == "chatml"],
)
def test_the_folder_asks_token_by_token_as_it_was_taught(bases, adapter, style, template):
    base = bases / style
    taught = CHATS.model_copy(update={"chat_template": OTHER if template == "other" else template})
    assert "chat_template.jinja" in written(adapter, base, taught)
    ours, served = AutoTokenizer.from_pretrained(base), AutoTokenizer.from_pretrained(adapter)
    record = {"messages": [{"role": "user", "content": "then one  <b>\n\nin the town"}]}
    with ChatTemplates(should_stop=lambda: False) as chats:
        asked = Chat(messages=record["messages"], tools=None, where="a:1")
        question = chats.of(chat_rules(ours, taught)).question(asked)
    ids = encode_given(question.parts, token_rules(ours, taught), is_chat=True)

    assert served.apply_chat_template(record["messages"], add_generation_prompt=True, return_dict=False) == ids
    ours.chat_template = served.chat_template
    assert encodes_alike(served, ours)
    # The class by which transformers 4, on which many servers run, reads tokenizer.json as well.
    settings = json.loads((adapter / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["model_input_names"] == ours.model_input_names
    assert "extra_special_tokens" not in settings


def test_a_conversation_with_a_template_of_its_own_reads_the_same_afterwards(bases, adapter):
    data = CHATS.model_copy(update={"chat_template": template_of("chatml") + "\n"})
    written(adapter, bases / "chatml", data)
    served, ours = AutoTokenizer.from_pretrained(adapter), AutoTokenizer.from_pretrained(bases / "chatml")
    for seed in range(20):
        record = random_chat("chatml", seed)
        chat = chat_of(record, field="messages", tools="tools", drop_reasoning=False, where="a:1")
        ours.chat_template = data.chat_template
        assert served.apply_chat_template(chat.messages, return_dict=False) == ours.apply_chat_template(
            chat.messages, return_dict=False
        )


@pytest.mark.parametrize(
    ("settings", "config", "ends", "stops"),
    [
        ({"eos_token_id": 2, "temperature": 0.6}, 2, {5}, [5, 2]),
        ({"eos_token_id": [2, 5]}, 2, {5}, None),
        (None, [2, 5], {5}, None),
        (None, 2, {5, 1}, [1, 5, 2]),
        (None, None, {5}, [5, 2]),
        (None, None, {2}, None),
        ({"eos_token_id": "nonsense"}, None, {5}, [5, 2]),
        ({"eos_token_id": 2}, 2, set(), None),
    ],
)
def test_settings_stop_where_the_examples_end_and_where_the_base_stopped(
    bases, adapter, tmp_path, settings, config, ends, stops
):
    """In llama3's tokenizer: 1 begins a text, 2 ends it, 5 ends a turn."""
    base = tmp_path / "base"
    write_chat_tokenizer(base, "llama3")
    (base / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": config}))
    if settings is not None:
        (base / "generation_config.json").write_text(json.dumps(settings))
    names = written(adapter, base, CHATS, ends=ends)

    assert names == ([] if stops is None else ["generation_config.json"])
    if stops is not None:
        found = json.loads((adapter / "generation_config.json").read_text())
        assert found == (settings or {}) | {"eos_token_id": stops}


def test_a_template_that_ends_turns_with_a_word_stops_at_no_word(bases, adapter):
    tokenizer = AutoTokenizer.from_pretrained(bases / "llama3")
    word = tokenizer("the", add_special_tokens=False).input_ids[-1]

    assert written(adapter, bases / "llama3", CHATS, ends={word}) == []
