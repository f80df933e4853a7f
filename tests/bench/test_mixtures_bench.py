from types import SimpleNamespace

import pytest

from bench import mixtures
from bench.flops import per_token
from bench.random_base import config_of
from bench.rivals.parametrized_experts import adapted, drawn_base
from job.tune.model.config import shape_of


@pytest.fixture(scope="module")
def results(tmp_path_factory, examples):
    """A mixture, ours and axolotl's way, on the CPU; Unsloth runs on GPUs alone."""
    folder = tmp_path_factory.mktemp("mixtures")
    options = ["--shape", "tiny-qwen3-moe", "--folder", str(folder / "scratch"), "--train", str(examples)]
    options += ["--text", "{t}", "--device", "cpu", "--results", str(folder / "R.md"), "--batch", "4"]
    options += ["--steps", "3", "--warm-up", "1", "--limit", "240", "--only", "ours", "--only", "parametrized"]
    mixtures.main(options)
    assert not (folder / "scratch/tiny-qwen3-moe").exists()
    return (folder / "R.md").read_text()


def row(results, name):
    line = next(line for line in results.splitlines() if line.startswith(f"| tiny-qwen3-moe | {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.bench
def test_ours_and_a_rival_train_the_same_modules_of_a_mixture(results):
    ours, theirs = row(results, "ours"), row(results, "parametrized")
    assert "no result" not in results, results
    assert [ours[3], ours[6], ours[8]] == ["1.00", "2", "100%"]
    assert theirs[6] == "2"
    assert float(theirs[3]) > 0
    assert float(ours[4]) > 0
    assert "- tiny-qwen3-moe, ours: `entrypoint.py run`: batch of 4 examples; generic engine" in results
    begins = [float(cells[-1].split(" to ")[0]) for cells in (ours, theirs)]
    assert begins[1] == pytest.approx(begins[0], rel=0.05)  # random weights of the same spread


@pytest.mark.parametrize("shape", ["qwen3-30b-a3b", "gpt-oss-20b"])
def test_unsloth_s_and_our_adapters_are_on_the_attention_of_a_mixture(shape):
    names, not_of_experts = mixtures.targets_of(shape)
    assert names == not_of_experts == ["k_proj", "o_proj", "q_proj", "v_proj"]


def test_a_shared_expert_is_none_of_the_modules_that_unsloth_is_asked_for():
    names, not_of_experts = mixtures.targets_of("tiny-qwen3.5-moe")
    assert {*names} - {*not_of_experts} == {"gate_proj", "up_proj", "down_proj"}
    assert "in_proj_qkv" in not_of_experts


def test_a_rival_s_experts_get_no_adapter_where_they_are_called_as_a_shared_one_is(tmp_path):
    """PEFT knows no stacks that are parametrized."""
    config_of("tiny-qwen3.5-moe").save_pretrained(tmp_path)
    names, _ = mixtures.targets_of("tiny-qwen3.5-moe")
    found = adapted(drawn_base(SimpleNamespace(base=tmp_path)), names)

    assert {name.rpartition(".")[2] for name in found} == {*names}
    assert "model.layers.0.mlp.shared_expert.down_proj" in found
    assert not [name for name in found if ".experts." in name]


def test_bases_are_written_directly_in_4_bits():
    assert mixtures.forms_of("gpt-oss-20b") == ("mxfp4", "unsloth")
    assert mixtures.forms_of("qwen3.5-35b-a3b") == ("bnb4", "unsloth")


def test_each_base_is_written_once_and_stands_beside_the_runs(tmp_path, monkeypatch):
    written, measured = [], []

    def write(shape, folder, tokenizer, *, form):
        folder.mkdir(parents=True)
        written.append(form)
        return 1

    monkeypatch.setattr(mixtures, "write_base", write)
    monkeypatch.setattr(mixtures, "measure", lambda each, *found: (None, measured.append((each.name, *found))))
    options = SimpleNamespace(folder=tmp_path, only=[], steps=12, warm_up=4, batch=128, free_gib=None)
    assert len([*mixtures.measure_shape("tiny-qwen3-moe", tmp_path, options)]) == 3

    assert written == ["bnb4", "unsloth"]
    names, bases, _, folders = zip(*measured, strict=True)
    assert names == ("ours", "unsloth", "parametrized")
    assert bases[0] == bases[2] != bases[1]
    assert len({*bases, *folders}) == 5


def test_a_contestant_without_a_result_is_a_row_with_its_reason():
    cells = mixtures.row_of("a", "b", None, "no result within 90 s", {}, None)
    assert cells[:3] == ("a", "b", "no result")
    assert len(cells) == len(mixtures._HEADER)
    (contestant,) = [each for each in mixtures.contestants_of("tiny-gpt-oss", _options()) if each.name == "unsloth"]
    assert mixtures.words_on("a", contestant, "why").endswith("No result: why")
    assert contestant.arguments[:2] == ("--rows", "32")


def test_ours_can_have_as_much_memory_as_a_smaller_gpu():
    (ours,) = [each for each in mixtures.contestants_of("tiny-gpt-oss", _options()) if each.name == "ours"]
    assert ours.free_gib == 78
    assert ours.about.endswith("batch of 128 examples, beside a process that leaves 78 GiB free")


def _options():
    class Options:
        steps, warm_up, batch, free_gib = 12, 4, 128, 78.0

    return Options


@pytest.mark.parametrize(
    ("shape", "billions"), [("qwen3-30b-a3b", 3.04), ("gpt-oss-20b", 3.61), ("qwen3.5-35b-a3b", 2.96)]
)
def test_a_token_meets_the_active_weights_alone(shape, billions):
    """With the head, without the embedding: their cards say 3.3, 3.6 and 3 billion, some with it."""
    found = per_token(shape_of(config_of(shape).get_text_config()), [1], 0) / 4e9
    assert found == pytest.approx(billions, rel=0.02)
