"""Fields that evaluations go by stand beside the held-out examples, of templates and of chats, whoever encodes them."""

import json

import pytest
from chat_styles import chat_tokenizer
from test_encoder import HALF, encoded

from job.core.recipe.data_section import DataSection
from job.edge import workers
from job.tune.data.encoded import EncodedSet
from job.tune.data.encoder import Encoder, rules_of


def lines(count):
    for n in range(1, count + 1):
        record = {"q": "cd" * (1 + n % 3), "a": f"ef {n}", "n": n, "meta": {"lang": "de" if n % 2 else None}}
        yield "train.jsonl", n, b"\xef\xbb\xbf" * (n == 1) + json.dumps(record).encode()


def chats(count):
    for n in range(1, count + 1):
        turns = [{"role": "user", "content": f"q {n}"}, {"role": "assistant", "content": "cd"}]
        yield "chats.jsonl", n, json.dumps({"messages": turns, "n": n}).encode()


@pytest.mark.parametrize("processes", [1, 2])
def test_each_held_out_example_has_its_own_record_s_fields(tokenizer, tmp_path, monkeypatch, processes):
    monkeypatch.setattr(workers, "ALONE_BYTES", 1)
    encoded(Encoder(rules_of(tokenizer, HALF, kept=("n", "meta.lang"))), 3000, processes, tmp_path, lines)
    held_out, train = (EncodedSet(tmp_path / f"{side}-{processes}.arrow") for side in ("validation", "train"))

    assert len(held_out) > 1000
    for row in range(len(held_out)):
        n = int(held_out.where(row).removeprefix("train.jsonl:"))
        assert held_out.kept(row) == [str(n), "de" if n % 2 else None]
    assert train.kept(0) == ()


def test_chats_have_them_too(tmp_path):
    tokenizer = chat_tokenizer(tmp_path / "base", "chatml")
    data = DataSection(train=("chats.jsonl",), chat="messages", validation={"fraction": 0.5})
    with Encoder(rules_of(tokenizer, data, kept=("n",))) as encoder:
        encoded(encoder, 200, 1, tmp_path, chats)
    held_out = EncodedSet(tmp_path / "validation-1.arrow")

    assert len(held_out) > 50
    assert [held_out.kept(row) for row in range(len(held_out))] == [
        [held_out.where(row).removeprefix("chats.jsonl:")] for row in range(len(held_out))
    ]


def test_other_fields_are_another_encoding(tokenizer):
    names = [
        Encoder(rules_of(tokenizer, HALF, kept=kept)).fingerprint() for kept in ((), ("n",), ("n", "m"), ("m", "n"))
    ]

    assert len({*names}) == 4
