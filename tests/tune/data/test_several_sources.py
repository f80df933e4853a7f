"""Examples of several sources on one side: each framed by its own rules, and its documents stand in a row."""

from tiny import PAIR, example_of

from job.tune.data.documents import select_documents
from job.tune.data.encoded import STREAM_END, EncodedSet, stream_start
from job.tune.data.encoder import encoded_rows
from job.tune.data.frame import token_rules


def documents(folder, tokenizer, sources, rules):
    """(prompt, completion) pairs of each source, encoded as the stages do."""
    rows = b"".join(
        encoded_rows(
            [example_of((p, False), (c, True), line=n) for n, (p, c) in enumerate(pairs, start=1)], own, source=place
        )
        for place, (pairs, own) in enumerate(zip(sources, rules, strict=True))
    )
    (folder / "train.arrow").write_bytes(stream_start() + rows + STREAM_END)
    return select_documents(EncodedSet(folder / "train.arrow"), max_length=8, too_long="drop")


def test_each_source_is_framed_by_its_own_rules(tmp_path, tokenizer):
    answers, everything = (
        token_rules(tokenizer, PAIR.model_copy(update={"loss_on": on})) for on in ("completion", "all")
    )
    pairs = [("cde", "fg"), ("hi", "jk")]
    found = documents(tmp_path, tokenizer, [pairs, pairs, pairs], [answers, everything, answers])
    lengths = found.lengths.tolist()

    assert found.sources.tolist() == [0, 0, 1, 1, 2, 2]
    assert lengths[:2] == lengths[2:4] == lengths[4:]
    assert found.targets.tolist() == [3, 3, lengths[0] - 1, lengths[1] - 1, 3, 3]


def test_what_is_left_out_is_known_by_its_source(tmp_path, tokenizer):
    rules = token_rules(tokenizer, PAIR)
    found = documents(tmp_path, tokenizer, [[("c", "d"), ("c" * 20, "d")], [("e" * 20, "f"), ("e", "f")]], [rules] * 2)

    assert (found.sources.tolist(), found.dropped) == ([0, 1], 2)
    assert found.encoded.sources[found.dropped_rows].tolist() == [0, 1]
