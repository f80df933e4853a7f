"""The table of links in the pages is the one that is counted with."""

import re
from pathlib import Path

import pytest

from job.core.plan.gpus import GPUS
from job.core.plan.links import network

PAGE = (Path(__file__).parents[3] / "docs" / "many-gpus.md").read_text(encoding="utf-8")
LINKS = {link.name: link for link in (*(gpu.link for gpu in GPUS), network(100), network(200), network(400))}


@pytest.mark.parametrize("name", LINKS)
def test_each_link_has_its_row(name):
    link = LINKS[name]

    assert f"| {name} | {link.rate / 1e9:g} | {link.bytes_per_second / 1e9:.0f} |" in PAGE


def test_no_other_link_has_one():
    assert set(re.findall(r"^\| ((?:NVLink|PCIe|a network)[^|]*?) \|", PAGE, re.MULTILINE)) == set(LINKS)


def test_each_kind_of_gpu_stands_in_the_row_of_its_link():
    for gpu in GPUS:
        row = next(line for line in PAGE.splitlines() if line.startswith(f"| {gpu.link.name} |"))
        name = gpu.name.removesuffix("-40").replace("-", " ").replace("rtx", "rtx ")
        assert name in row.lower(), gpu.name
