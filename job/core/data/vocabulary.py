"""Whether a model has a row in its embeddings for a token of the data."""

from job.core.errors import DataError


def refuse_beyond(token_id: int, token: str | None, *, rows: int, where: str) -> None:
    """Refuse the largest token id of something, where the model has no row for it.

    Args:
        token_id: counted from 0.
        token: its text; None: the tokenizer does not know it either.
        rows: of the model's embeddings.
        where: the place it stands at.

    Raises:
        DataError: there is none.
    """
    if token_id >= rows:
        raise DataError(
            f"{where}: token {token!r} has the id {token_id:,}, but the base's embeddings have {rows:,} rows (0 to "
            f"{rows - 1:,}): the tokenizer knows more than the model; write the text without this token, or choose a "
            "model.base whose vocab_size has room for it"
        )
