import sys
from pathlib import Path

import pytest


def pytest_collection_modifyitems(config, items):
    if "demo_base" in config.option.markexpr:
        return
    chosen = [item for item in items if item.get_closest_marker("demo_base") is None]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


@pytest.fixture(autouse=True, scope="session")
def _scripts_beside_the_recipes():
    """`python recipes/X.py` finds its neighbours, and so do the tests."""
    folder = str(Path(__file__).parents[2] / "recipes")
    sys.path.insert(0, folder)
    yield
    sys.path.remove(folder)
