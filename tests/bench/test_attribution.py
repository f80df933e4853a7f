import pytest
import torch

from bench import attribution
from bench.attribution import dequantise_by_bitsandbytes, main
from job.kernels import reference
from job.kernels.weights import Quantised
from job.tune.engines.families import linear_of
from job.tune.engines.handwritten import HandwrittenEngine


@pytest.mark.parametrize(("engine", "variations"), [("fast", 14), ("generic", 5)])
def test_each_part_is_done_otherwise_and_the_loss_stays(tmp_path, base, examples, engine, variations):
    results = tmp_path / "RESULTS.md"
    options = ["--base", base, "--train", examples, "--text", "{t}", "--results", results, "--engine", engine]
    main([*map(str, options), "--device", "cpu", "--batch", "4", "--steps", "3", "--warm-up", "1"])
    rows = [line.strip("| ").split(" | ") for line in results.read_text().splitlines() if line.startswith("| ")][2:]
    losses = [float(row[4]) for row in rows]

    assert len({row[0] for row in rows}) == variations
    assert losses == pytest.approx([losses[0]] * variations, rel=2e-3)


def test_what_changed_when_memory_ran_out_is_reported(tmp_path, base, examples, monkeypatch):
    results, accumulate, failed = tmp_path / "RESULTS.md", HandwrittenEngine.accumulate, []

    def once_too_much(self, batch, *, targets, seed):
        if self._model.training and not failed:  # not in the self-test
            failed.append(batch)
            raise torch.OutOfMemoryError
        return accumulate(self, batch, targets=targets, seed=seed)

    monkeypatch.setattr(HandwrittenEngine, "accumulate", once_too_much)
    monkeypatch.setattr(attribution, "variations_of", lambda *_: (attribution.Variation(name="as it is"),))
    options = ["--base", base, "--train", examples, "--text", "{t}", "--results", results, "--device", "cpu"]
    main([*map(str, options), "--batch", "4", "--tokens", "256", "--steps", "2", "--warm-up", "1"])
    assert "as it is (memory ran out, then micro_batch_tokens 128)" in results.read_text()


def test_bitsandbytes_dequantises_what_the_reference_does(base):
    from job.tune.model.base import load_base

    module = load_base(base, device=torch.device("cpu"), dtype=torch.bfloat16).model.layers[0].mlp.down_proj
    weight = linear_of(module).weight
    assert isinstance(weight, Quantised)
    found, expected = (torch.empty(weight.height, weight.width, dtype=torch.bfloat16) for _ in range(2))
    dequantise_by_bitsandbytes(weight, found)
    reference.dequantise(weight, expected)

    assert torch.equal(found, expected)
