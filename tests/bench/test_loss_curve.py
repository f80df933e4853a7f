import pytest

from bench import loss_curve


def test_the_product_is_within_two_seeds_of_the_plain_loop(tmp_path, base, examples):
    options = ["--base", str(base), "--train", str(examples), "--text", "{t}", "--max-length", "32", "--steps", "3"]
    options += ["--batch", "2", "--device", "cpu", "--engine", "generic", "--results", str(tmp_path / "R.md")]
    options += ["--seeds", "2"]
    loss_curve.main(options)

    results = (tmp_path / "R.md").read_text()
    assert ": within it." in results
    assert results.count("| plain loop, seed + ") == 2
    assert (tmp_path / "loss-curve-tiny-llama-generic.png").read_bytes().startswith(b"\x89PNG")
    assert "![losses](loss-curve-tiny-llama-generic.png)" in results


def test_smoothed_curves_are_compared_step_by_step():
    assert loss_curve.apart([1.0] * 40, [1.5] * 40) == pytest.approx(0.5)
    assert len(loss_curve.smooth([1.0] * 40)) == 40 - loss_curve.WINDOW + 1
