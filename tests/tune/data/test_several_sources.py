"""Examples of several sources on one side: each framed by its own rules, and its documents stand in a row."""

from tiny import PAIR, documents_of_sources

from job.tune.data.frame import token_rules


def test_each_source_is_framed_by_its_own_rules(tmp_path, tokenizer):
    answers, everything = (
        token_rules(tokenizer, PAIR.model_copy(update={"loss_on": on})) for on in ("completion", "all")
    )
    pairs = [("cde", "fg"), ("hi", "jk")]
    found = documents_of_sources(
        tmp_path, tokenizer, [pairs, pairs, pairs], [answers, everything, answers], max_length=8, too_long="drop"
    )
    lengths = found.lengths.tolist()

    assert found.sources.tolist() == [0, 0, 1, 1, 2, 2]
    assert lengths[:2] == lengths[2:4] == lengths[4:]
    assert found.targets.tolist() == [3, 3, lengths[0] - 1, lengths[1] - 1, 3, 3]


def test_what_is_left_out_is_known_by_its_source(tmp_path, tokenizer):
    pairs = [[("c", "d"), ("c" * 20, "d")], [("e" * 20, "f"), ("e", "f")]]
    found = documents_of_sources(tmp_path, tokenizer, pairs, max_length=8, too_long="drop")

    assert (found.sources.tolist(), found.dropped) == ([0, 1], 2)
    assert found.encoded.sources[found.dropped_rows].tolist() == [0, 1]
