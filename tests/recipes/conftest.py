import sys
from pathlib import Path

import pytest


@pytest.fixture(autouse=True, scope="session")
def _scripts_beside_the_recipes():
    """`python recipes/X.py` finds its neighbours, and so do the tests."""
    folder = str(Path(__file__).parents[2] / "recipes")
    sys.path.insert(0, folder)
    yield
    sys.path.remove(folder)
