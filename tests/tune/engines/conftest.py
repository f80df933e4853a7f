def pytest_collection_modifyitems(config, items):
    if "families" in config.option.markexpr:
        return
    left_out = {item for item in items if item.get_closest_marker("families") is not None}
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]
