"""Pictures of examples: which are chosen, what their tokens read as, and what is learned of them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import documents_of_examples
from tokenizer_kinds import KINDS, LOSSLESS, tokenizer_of

from job.core.data.records import Example, Part
from job.tune.data.chats.picture import by_source, pictures, source_tokens
from job.tune.data.documents import select_documents

often = settings(deadline=None, derandomize=True, database=None, max_examples=40)
pieces = st.sampled_from(["the", "hat", " ", "\n", "é", "x", "</s>", "<|user|>"])
texts = st.lists(pieces, min_size=1, max_size=6).map("".join)


@pytest.fixture(scope="module")
def tokenizers():
    return {kind: tokenizer_of(kind) for kind in KINDS}


def pair(prompt, completion, *, line=1):
    parts = Part(text="<|user|>", learned=False, control=True), Part(text=prompt, learned=False)
    return Example(parts=(*parts, Part(text=completion, learned=True)), where=f"train.jsonl:{line}")


def shown(folder, tokenizer, examples, *, max_length=4000, **options):
    documents = documents_of_examples(folder, tokenizer, examples, max_length=max_length)
    [(name, rows)] = by_source(documents, ["notes"])
    return pictures(documents, tokenizer, source=name, rows=rows, **options)


@pytest.mark.parametrize("kind", [*LOSSLESS, "sentencepiece, space before the first"])
@often
@given(prompt=texts, completion=texts)
def test_the_pieces_read_as_the_record(tokenizers, tmp_path_factory, kind, prompt, completion):
    [picture] = shown(tmp_path_factory.mktemp("one"), tokenizers[kind], [pair(prompt, completion)])
    kinds = {
        (learned, control): "".join(p.text for p in picture.pieces if (p.learned, p.control) == (learned, control))
        for learned in (False, True)
        for control in (False, True)
    }
    assert kinds == {
        (False, True): "<s><|user|>",
        (False, False): prompt,
        (True, False): completion,
        (True, True): "</s>",
    }
    assert sum(len(piece.ids) for piece in picture.pieces) == picture.tokens
    assert sum(len(piece.ids) for piece in picture.pieces if piece.learned) == picture.learned


def test_each_token_can_be_shown_by_itself(tokenizers, tmp_path):
    [picture] = shown(tmp_path, tokenizers["llama-2"], [pair("the hat", " is é")], with_tokens=True)
    tokens = [token for piece in picture.pieces for token in piece.tokens]
    assert len(tokens) == picture.tokens
    assert tokens[:2] == ["<s>", "<|user|>"]
    assert tokens[-1] == "</s>"
    assert tokens[-3:-1] == ["<0xC3>", "é"]  # what is no character yet goes by the tokenizer's own name


def test_the_first_the_longest_the_shortest_and_some_others_are_shown_once(tokenizers, tmp_path):
    lengths = [3, 1, 9, 4, 5, 6, 7, 8]
    examples = [pair("x " * n, "hat", line=line) for line, n in enumerate(lengths, start=1)]
    found = shown(tmp_path, tokenizers["byte-level"], examples, random=2, seed=1)
    assert [each.shown for each in found] == ["first", "longest", "shortest", "random", "random"]
    assert [each.where for each in found[:3]] == ["train.jsonl:1", "train.jsonl:3", "train.jsonl:2"]
    assert len({each.where for each in found}) == 5
    assert found == shown(tmp_path, tokenizers["byte-level"], examples, random=2, seed=1)
    assert len(shown(tmp_path, tokenizers["byte-level"], examples, random=100)) == 8
    assert len(shown(tmp_path, tokenizers["byte-level"], examples[:1], random=5)) == 1


def test_a_cut_and_what_is_left_out_are_said(tokenizers, tmp_path):
    tokenizer, examples = tokenizers["byte-level"], [pair("x", "a" * 30), pair("b" * 30, "x"), pair("x", "y")]
    cut, lost, whole = shown(tmp_path, tokenizer, examples, max_length=8, random=3)
    assert (cut.cut, cut.left_out, cut.learned) == (cut.tokens - 8, None, 5)
    assert not any(piece.text == "</s>" for piece in cut.pieces)
    assert (lost.left_out, lost.learned) == ("nothing to learn from", 0)
    assert (whole.cut, whole.left_out) == (0, None)
    documents = documents_of_examples(tmp_path, tokenizer, examples)
    dropped = select_documents(documents.encoded, max_length=8, too_long="drop")
    found = pictures(dropped, tokenizer, source="notes", rows=np.arange(3))
    assert [each.left_out for each in found] == ["longer than max_length"] * 2 + [None]


def test_of_a_long_stretch_the_ends_are_shown_and_the_rest_is_counted(tokenizers, tmp_path):
    [picture] = shown(tmp_path, tokenizers["byte-level"], [pair("q" * 3000, "b" * 500)])
    assert [piece.omitted for piece in picture.pieces if piece.omitted] == [2840, 340]
    assert sum(len(piece.ids) + piece.omitted for piece in picture.pieces) == picture.tokens
    many = Example(parts=tuple(Part(text="x" * 50, learned=bool(n % 2)) for n in range(100)), where="train.jsonl:1")
    [picture] = shown(tmp_path, tokenizers["byte-level"], [many], max_length=6000)
    assert sum(len(piece.ids) for piece in picture.pieces) == 800
    assert sum(len(piece.ids) + piece.omitted for piece in picture.pieces) == picture.tokens


def test_lengths_are_counted_before_the_cut_and_tokens_after_it(tokenizers, tmp_path):
    examples = [pair("x", "a" * 30), pair("b" * 30, "x"), pair("x", "y")]
    documents = documents_of_examples(tmp_path, tokenizers["byte-level"], examples, max_length=8)
    counted = source_tokens(documents, source="notes", rows=np.arange(3))
    assert (counted.examples, counted.used, counted.truncated) == (3, 2, 1)
    assert (counted.tokens, counted.learned) == (8 + 5, 5 + 2)
    assert (counted.shortest, counted.longest) == (5, 34)
    assert source_tokens(documents, source="none", rows=np.arange(0)).examples == 0
