"""The tests of the stages use the tune room's tiny models."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tune"))

from tiny_fixtures import bases, documents, start, tokenizer  # noqa: F401 - fixtures
