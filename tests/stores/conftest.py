"""Tests against real stores run only where they are asked for: -m stores."""


def pytest_collection_modifyitems(config, items):
    if "stores" in config.option.markexpr:
        return
    chosen = [item for item in items if item.get_closest_marker("stores") is None]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen
