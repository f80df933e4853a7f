"""A run on chats from end to end: learned, judged by held-out ones, and asked as the assistant that it is."""

import hashlib
import json

import pytest
from job_process import call, records, write_lines
from transformers import AutoTokenizer

TEMPLATE = "{% for m in messages %}{{ m.content + ('</s>' if m.role == 'assistant' else '\\n') }}{% endfor %}"


def chats(count, seed):
    """Two exchanges each, of the usual orders."""
    orders = records(2 * count, seed=seed)
    return [
        {
            "messages": [
                message
                for order in (orders[2 * n], orders[2 * n + 1])
                for message in (
                    {"from": "human", "value": order["question"]},
                    {"from": "gpt", "value": order["answer"]},
                )
            ]
        }
        for n in range(count)
    ]


@pytest.fixture
def chatting(job):
    """A job on chats, with a template of its own beside the recipe."""
    write_lines(job.data / "train.jsonl", chats(24, 0))
    write_lines(job.data / "validation.jsonl", chats(6, 1))
    (job.folder / "own.jinja").write_text(TEMPLATE, encoding="utf-8")
    job.recipe["data"] |= {"prompt": None, "completion": None, "chat": "messages", "chat_template": "own.jinja"}
    job.recipe["evaluate"]["prompts"] = ["12 red hats"]
    return job


def test_a_run_on_chats_is_asked_as_it_was_taught(chatting, tmp_path):
    ended = chatting.start("run")
    assert ended.code == 0, ended.stdout
    report = chatting.report()
    assert report["recipe"]["data"]["chat_template"] == TEMPLATE
    asked, *held_out = report["answers"]
    assert asked["prompt"] == "12 red hats"
    # A held-out conversation is asked up to its last answer, as the record has it.
    said = [message["value"] for message in chats(6, 1)[0]["messages"]]
    assert held_out[0]["expected"] == said.pop()
    assert held_out[0]["prompt"].split() == [word for text in said for word in text.split()]
    words = ["try", f"file://{chatting.only_run()}", "--workdir", str(tmp_path / "try"), "--max-new-tokens", "4"]
    tried = call(*words, "--prompt", "12 red hats")
    assert tried.stdout == f"prompt  12 red hats\nbase    {asked['base']}\ntuned   {asked['tuned']}\n\n"
    file = write_lines(tmp_path / "asked.jsonl", [{"messages": [{"role": "user", "content": "12 red hats"}]}])
    assert call(*words, "--record", str(file)).stdout == tried.stdout
    refused = call(*words, "--field", "question=a")
    assert refused.code == 64
    assert "trained on chats" in refused.named("ended")[0]["reason"]
    write_lines(file, [{"messages": [{"role": "usr", "content": "a"}]}])
    refused = call(*words, "--record", str(file))
    assert refused.code == 65
    assert 'asked.jsonl: messages[0].role is "usr"' in refused.named("ended")[0]["reason"]


def test_the_adapter_of_a_run_on_chats_is_served_with_the_template_that_taught(chatting):
    chatting.recipe["train"]["steps"] = 2
    assert chatting.start("run").code == 0
    adapter, named = chatting.only_run() / "adapter", chatting.report()["adapter"]["files"]

    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in adapter.iterdir()}
    assert found == {name: entry["sha256"] for name, entry in named.items()}
    assert {"README.md", "chat_template.jinja", "tokenizer.json", "adapter_model.safetensors"} <= set(found)
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "12 red hats"}], tokenize=False)
    assert asked == "12 red hats\n"
    card = (adapter / "README.md").read_text()
    assert "--chat-template path/to/adapter/chat_template.jinja" in card
    assert "/v1/chat/completions" in card
    assert json.loads((adapter / "adapter_config.json").read_text())["modules_to_save"] is None  # vLLM takes none


def test_another_template_is_another_run(chatting):
    def run_id():
        ended = chatting.call("check", "--quick")
        return next(line for line in ended.stdout.splitlines() if " is new" in line)

    before = run_id()
    (chatting.folder / "own.jinja").write_text("{{ bos_token }}" + TEMPLATE, encoding="utf-8")
    assert run_id() != before


def test_wrong_chats_are_named_line_by_line_and_a_prompt_that_the_template_refuses_too(chatting):
    right = json.loads((chatting.data / "train.jsonl").read_text().splitlines()[0])
    write_lines(chatting.data / "train.jsonl", [right, {"messages": right["messages"][:1]}, {"text": "a"}, right])
    ended = chatting.call("check", "--quick")
    assert ended.code == 65
    assert 'train.jsonl:2: "messages" has no turn of the assistant' in ended.stdout
    assert 'train.jsonl:3: "messages" is missing (the record has "text")' in ended.stdout
    assert "name in data.chat the fields that the records have" in ended.stdout
    write_lines(chatting.data / "train.jsonl", [right] * 4)
    strict = "{% if messages | length < 2 %}{{ raise_exception('too short') }}{% endif %}" + TEMPLATE
    (chatting.folder / "own.jinja").write_text(strict, encoding="utf-8")
    ended = chatting.call("check", "--quick")
    assert ended.code == 65
    assert "too short" in ended.stdout


def test_chats_are_encoded_once_and_by_another_template_anew(chatting):
    assert "encode" in chatting.call("run", stop_in="ask_base").phases()
    chatting.recipe["train"]["seed"] = 7
    assert not {"download", "encode"} & set(chatting.call("run", stop_in="ask_base").phases())
    (chatting.folder / "own.jinja").write_text("{{ bos_token }}" + TEMPLATE, encoding="utf-8")
    assert "encode" in chatting.call("run", stop_in="ask_base").phases()
