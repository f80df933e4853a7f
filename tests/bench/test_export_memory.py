import re

import pytest

from bench import export_memory


@pytest.mark.bench
def test_an_export_is_measured_part_by_part_in_a_process_of_its_own(tmp_path, tokenizer_folder):
    results = tmp_path / "R.md"
    options = ["--steps", "2", "--folder", str(tmp_path), "--results", str(results)]
    export_memory.main(["tiny-llama", "--tokenizer", str(tokenizer_folder), *options])

    text = results.read_text()
    assert "## Memory of an export: tiny-llama, onto weights" in text
    parts = dict(re.findall(r"^\| ([a-z ]+) \| [\d.]+ \| ([\d.]+) \|$", text, re.MULTILINE))
    assert {"merge", "prove", "load libraries", "fetch weights", "commit"} <= {*parts}
    # Of the largest part, and no sum: nothing of this process counts, which holds as much by its libraries alone.
    assert re.search(rf"the process held {max(parts.values(), key=float)} GiB", text)
    assert 0.1 < float(parts["merge"]) < 4
    assert not [path for path in tmp_path.iterdir() if path != results], "nothing of it stays"


def test_the_most_memory_is_that_of_a_part_and_not_of_those_before(tmp_path):
    from job.edge.host.outcome import Outcome

    phases = export_memory.PhasesWithPeaks(Outcome(None), began=0.0)
    with phases.phase("large"):
        held = bytearray(1)
        held *= 300 * 2**20
        del held
    with phases.phase("small"):
        pass

    assert phases.peaks["large"] > phases.peaks["small"] + 250 * 2**20
