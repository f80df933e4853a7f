"""How many GPUs there are, without asking a driver."""

import pytest

from job.edge.host.gpu import visible_gpus


@pytest.mark.parametrize(
    ("chosen", "count"),
    [("0", 1), ("0,1", 2), ("GPU-aa, GPU-bb ,GPU-cc", 3), ("", 0), ("-1", 0), ("0,-1,2", 1), ("NoDevFiles", 1)],
)
def test_those_that_were_chosen_count(chosen, count, tmp_path):
    assert visible_gpus(chosen, root=tmp_path) == count


def test_without_a_choice_the_devices_count(tmp_path):
    (tmp_path / "dev").mkdir()
    for name in ("nvidia0", "nvidia1", "nvidia10", "nvidiactl", "nvidia-uvm", "nvidia-modeset", "null"):
        (tmp_path / "dev" / name).touch()

    assert visible_gpus(None, root=tmp_path) == 3
    assert visible_gpus(None, root=tmp_path / "elsewhere") == 0
