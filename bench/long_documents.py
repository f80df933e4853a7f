"""Documents of many lengths, as in a mixed corpus: tokens log-normal with a mean of about 600, at most 4096."""

import json
from itertools import chain, cycle, islice

import numpy as np

COUNT = 4000
MEAN_LOG, SPREAD_LOG = np.log(600) - 0.5, 1.0
"""Mean and standard deviation of the natural logarithm of the tokens."""
SHORTEST, LONGEST = 16, 4090
"""Tokens; BOS and EOS come on top, and a text does not always become the tokens that it was made from."""


def lengths_of(count):
    """Tokens of each document."""
    drawn = np.exp(np.random.default_rng(0).normal(MEAN_LOG, SPREAD_LOG, count)).astype(int)
    return np.clip(drawn, SHORTEST, LONGEST).tolist()


def write(train, text, tokenizer, path, count=COUNT):
    """One record `{"text": ...}` a line, cut from the texts of `train` one after another, again and again."""
    texts = [text.format(**json.loads(line)) for line in train.read_text(encoding="utf-8").split("\n") if line.strip()]
    stream = cycle(chain.from_iterable(tokenizer(texts, add_special_tokens=False)["input_ids"]))
    with path.open("w", encoding="utf-8") as file:
        for length in lengths_of(count):
            file.write(json.dumps({"text": tokenizer.decode(list(islice(stream, length)))}) + "\n")
