"""What is computed says so, and is what `plan` computes."""

import json

import pytest

from bench import scaling_on_paper
from bench.workload import workload_of
from job.core.plan.forecast import forecast
from job.core.plan.gpus import gpu_named
from job.core.plan.scaling import cluster_of


@pytest.fixture
def without_weights(base, tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    for path in base.glob("*.json"):
        if "safetensors" not in path.name:
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_each_number_of_gpus_has_its_row_and_is_marked_as_computed(without_weights, examples, tmp_path, capsys):
    options = ["--base", str(without_weights), "--train", str(examples), "--text", "{t}"]
    scaling_on_paper.main([*options, "--gpu", "h200", "--results", str(tmp_path / "R.md")])
    text = (tmp_path / "R.md").read_text()

    assert "**Computed, not measured**" in text
    assert "NVLink 4 450 GB/s a GPU, 80% of it; Ethernet 12.5 GB/s a" in text
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:3] > "| 0"]
    rows = [row for row in rows if row[0].isdigit()]
    assert [row[0] for row in rows] == ["1", "4", "8", "64", "4", "8", "64", "64"] * 2

    given = {"text": "{t}", "batch": 16, "steps": 1024, "max_length": 512}
    work = workload_of(without_weights, examples, tmp_path / "lengths", **given)
    found = forecast(work, gpu_named("h200"), cluster_of(gpus=1, nodes=8, gigabits=100))
    assert rows[13][2] == f"{found.tokens_per_second:,.0f}"
    assert json.loads((without_weights / "config.json").read_text())["hidden_size"] == work.shape.hidden
