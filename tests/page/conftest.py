"""Tests of the page in a browser run only where they are asked for: -m page."""


def pytest_collection_modifyitems(config, items):
    if "page" in config.option.markexpr:
        return
    chosen = [item for item in items if item.get_closest_marker("page") is None]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen
