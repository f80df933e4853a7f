"""What FSDP2 does with packed weights is looked at in two processes; a byte that another one has is seen."""

import pytest

from bench import fsdp_bytes


def rows(text):
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return {cells[0]: cells[1:] for cells in ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)}


@pytest.mark.bench
def test_uint8_is_left_whole_and_bf16_is_spread_with_the_same_bytes(base, tmp_path):
    """On the versions that these tests run on; where they do another thing, the docs say so no longer."""
    fsdp_bytes.main(["--base", str(base), "--results", str(tmp_path / "R.md")])
    found = rows((tmp_path / "R.md").read_text())

    whole, spread = found["uint8"], found["bfloat16"]
    assert whole[0] == "0"
    assert whole[2] == "1.00"
    assert spread[0] == spread[1] == whole[1]
    assert spread[2] == "0.50"
    assert whole[3:] == spread[3:] == ["0", "0", "0.000%", "yes"]


@pytest.mark.parametrize("failed", [None, "RuntimeError: no"])
def test_what_differs_is_counted(failed):
    found = {"weights": 2, "sharded": 1, "here": 600, "bytes": 1000, "gathered": {"a": 1}}
    found |= {"after": {"a": 1, "b": 9}, "same_logits": False} if failed is None else {"failed": failed}

    expected = ("1", "2", "1.000%") if failed is None else ("1", failed, "0.100%")
    assert tuple(map(str, fsdp_bytes.row_of("uint8", found)[4:])) == (*expected, "no")
    assert fsdp_bytes.row_of("uint8", "it failed")[1] == "no result: it failed"
