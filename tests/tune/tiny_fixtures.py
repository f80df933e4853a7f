"""Fixtures of the rooms that train tiny models: bases of five architectures, a readable tokenizer, once a session."""

import pytest
from tiny import (
    ARCHITECTURES,
    attempt,
    config_of,
    documents_of,
    random_text,
    targets_of,
    write_base,
    write_tokenizer,
)

from job.core.recipe.schema import LoraSection
from job.tune.model.config import load_tokenizer


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """Architecture -> folder."""
    root = tmp_path_factory.mktemp("bases")
    return {name: write_base(root / name, config_of(name)) for name in ARCHITECTURES}


@pytest.fixture(scope="session")
def tied_base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("tied") / "llama", config_of("llama", tied=True))


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """Puts <s> before a text, as Llama's does."""
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer"), puts_bos=True))


@pytest.fixture(scope="session")
def plain_tokenizer(tmp_path_factory):
    """Puts nothing before a text, as GPT-NeoX's does."""
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("plain"), puts_bos=False))


@pytest.fixture(scope="session")
def documents(tmp_path_factory, tokenizer):
    """Eight documents of 12 to 40 tokens; the targets are between a twentieth and nearly all of them."""
    sizes = [(9, 2), (3, 30), (20, 3), (2, 12), (14, 14), (4, 33), (30, 1), (6, 20)]
    pairs = [(random_text(p, seed=i), random_text(c, seed=100 + i)) for i, (p, c) in enumerate(sizes)]
    return documents_of(tmp_path_factory.mktemp("documents"), tokenizer, pairs)


@pytest.fixture
def start(bases, documents, tmp_path):
    """Prepare an attempt at training on the tiny documents."""

    def prepare(architecture="llama", *, lora=None, base=None, **options):
        lora = lora or LoraSection(r=8, alpha=16, targets=targets_of(architecture))
        return attempt(
            base or bases[architecture],
            options.pop("documents", documents),
            folder=tmp_path / "trackers",
            lora=lora,
            **options,
        )

    return prepare
