"""One run on each base, on tiny ones."""

import re

import pytest

from bench import bases
from bench.random_base import write_base


@pytest.fixture(scope="module")
def results(tmp_path_factory, base, examples, tokenizer_folder):
    folder = tmp_path_factory.mktemp("bases")
    write_base("tiny-qwen3", folder / "in-four-bits", tokenizer_folder, form="bnb4")
    (folder / "broken").mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / "broken" / name).write_bytes((base / name).read_bytes())
    options = ["--train", str(examples), "--text", "{t}", "--device", "cpu", "--steps", "3", "--warm-up", "1"]
    for each in (base, folder / "in-four-bits", folder / "broken"):
        options += ["--base", str(each)]
    bases.main([*options, "--results", str(folder / "R.md")])
    return (folder / "R.md").read_text()


def row(results, name):
    line = next(line for line in results.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize("name", ["tiny-llama", "in-four-bits"])
def test_each_base_has_its_row(results, name):
    cells = row(results, name)

    assert cells[1] == "generic"
    assert float(cells[2].replace(",", "")) > 0
    assert 0 < float(cells[3]) < 2
    assert "to" in cells[-1]
    assert re.search(rf"^- {name}: generic engine, .* on the CPU; layers not compiled", results, re.MULTILINE)


def test_a_base_without_weights_is_a_row_with_its_reason(results):
    assert row(results, "broken")[1].startswith("no result: ended with 6")
