import json

import numpy as np

from bench import long_documents


def test_lengths_are_log_normal_with_a_mean_of_about_600():
    lengths = np.array(long_documents.lengths_of(4000))

    assert 550 < lengths.mean() < 600
    assert (lengths.min(), lengths.max()) == (long_documents.SHORTEST, long_documents.LONGEST)


def test_documents_have_the_tokens_they_should(tmp_path, base, examples):
    from job.tune.model.config import load_tokenizer

    tokenizer = load_tokenizer(base)
    long_documents.write(examples, "{t}", tokenizer, tmp_path / "long.jsonl", count=5)
    texts = [json.loads(line)["text"] for line in (tmp_path / "long.jsonl").read_text().splitlines()]

    assert [len(tokenizer(text, add_special_tokens=False).input_ids) for text in texts] == long_documents.lengths_of(5)
