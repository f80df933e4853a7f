"""Which held-out documents ask the model, and what of each is the question and what the answer."""

from collections.abc import Sequence
from itertools import islice, zip_longest

import numpy as np

from job.tune.data.documents import Documents


def asked_documents(documents: Documents, *, most: int, sources: Sequence[int] = (0,)) -> list[int]:
    """The first documents that are whole, at most so many; sources are asked by turns.

    Args:
        documents: held out.
        most: documents, at most.
        sources: places of those whose documents have a prompt.
    """
    asked = [filter(documents.is_whole, np.flatnonzero(documents.sources == source).tolist()) for source in sources]
    by_turns = (each for turn in zip_longest(*asked) for each in turn if each is not None)
    return list(islice(by_turns, most))


def asked_and_learned(documents: Documents, document: int) -> tuple[list[int], list[int]]:
    """Ids of the question and of the answer: the last learned part, and all that stands before it."""
    ids, start = documents.token_ids(document).tolist(), documents.answer_from(document)
    return ids[:start], ids[start : int(documents.spans(document)[-1, 1])]
