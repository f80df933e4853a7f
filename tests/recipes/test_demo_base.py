"""The demo's base model: a few steps of the real build, then read as any model from the hub is read."""

import hashlib
import json
import random
import re
from pathlib import Path

import pytest

SHIPPED = Path(__file__).parents[2] / "recipes/demo-base"
SMALL = {"steps": 3, "warmup_steps": 2, "stories_per_step": 4, "layers": 1, "hidden": 64}


@pytest.fixture
def demo_base():
    import demo_base
    import torch

    threads = torch.get_num_threads()
    yield demo_base
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def stories():
    import demo_base

    chance = random.Random(3)
    return [demo_base.write_story(chance) for _ in range(3000)]


def weights_of(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_the_built_folder_loads_as_a_bf16_llama_with_a_head_of_its_own(demo_base, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    demo_base.ensure_base(tmp_path / "base", demo_base.Size(**SMALL))

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert isinstance(model, LlamaForCausalLM)
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is not model.model.embed_tokens.weight


def test_the_tokenizer_puts_bos_once_knows_eos_and_gives_back_each_text(demo_base, tmp_path):
    from transformers import AutoConfig, AutoTokenizer

    demo_base.ensure_base(tmp_path / "base", demo_base.Size(**SMALL))

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    text = "Mia wants three red lamps.\nAnswer: 3 | café, 東京"
    ids = tokenizer(text)["input_ids"]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert AutoConfig.from_pretrained(tmp_path / "base").eos_token_id == tokenizer.eos_token_id


def test_building_again_gives_the_same_weights(demo_base, tmp_path):
    for name in ("one", "two"):
        demo_base.ensure_base(tmp_path / name, demo_base.Size(**SMALL))

    assert weights_of(tmp_path / "one") == weights_of(tmp_path / "two")
    assert (tmp_path / "one/tokenizer.json").read_bytes() == (tmp_path / "two/tokenizer.json").read_bytes()


def test_a_complete_base_is_not_built_again(demo_base, tmp_path, capsys):
    demo_base.ensure_base(tmp_path / "base", demo_base.Size(**SMALL))
    before = (tmp_path / "base/model.safetensors").stat()
    demo_base.ensure_base(tmp_path / "base", demo_base.Size(**SMALL))

    after = (tmp_path / "base/model.safetensors").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert "nothing to build" in capsys.readouterr().out


def test_a_base_of_another_size_is_replaced_and_nothing_is_left_beside_it(demo_base, tmp_path):
    demo_base.ensure_base(tmp_path / "base", demo_base.Size(**SMALL))
    demo_base.ensure_base(tmp_path / "base", demo_base.Size(**SMALL | {"steps": 4}))

    assert json.loads((tmp_path / "base/built_by.json").read_text())["steps"] == 4
    assert [entry.name for entry in tmp_path.iterdir()] == ["base"]


def test_a_folder_that_is_no_demo_base_is_left_alone(demo_base, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")

    with pytest.raises(FileExistsError, match="is no demo base"):
        demo_base.ensure_base(tmp_path, demo_base.Size(**SMALL))

    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_training_lowers_the_loss(demo_base, stories):
    size = demo_base.Size(**SMALL | {"steps": 1})
    tokenizer = demo_base.train_tokenizer(stories, size.vocabulary)

    losses = []
    for steps in (1, 40):
        size = demo_base.Size(**SMALL | {"steps": steps})
        losses.append(demo_base.pretrain(demo_base.new_model(size, tokenizer=tokenizer), tokenizer, size))

    assert losses[1] < 0.7 * losses[0]


def test_no_story_holds_an_order_in_the_datasets_format(stories):
    order = re.compile(r"\|[^|\n]*\|[^|\n]*\|")

    assert not [story for story in stories if order.search(story)]


def test_stories_are_sentences_with_the_right_article(stories):
    for story in stories:
        assert not re.search(r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou]|  |[{}]", story), story
        assert all(re.fullmatch(r"[A-Z].*[.?]", line) for line in story.split("\n")), story


def test_each_word_of_an_order_is_one_token(demo_base, stories):
    tokenizer = demo_base.train_tokenizer(stories, demo_base.Size().vocabulary)

    pieces = tokenizer([*demo_base.FACTS, " |"], add_special_tokens=False)["input_ids"]
    assert [word for word, ids in zip([*demo_base.FACTS, " |"], pieces, strict=True) if len(ids) > 1] == []


def test_after_the_demos_cue_the_base_has_only_read_plain_sentences(stories):
    cued = [line for story in stories for line in story.split("\n") if line.startswith("Answer: ")]

    assert len(cued) > 100
    assert not [line for line in cued if "|" in line]


# --- the base that is shipped ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped():
    """What stands beside it: by what and on what it was built, and how far it learned."""
    return json.loads((SHIPPED / "built_by.json").read_text())


def test_the_shipped_base_is_of_this_script_and_none_of_its_bytes_is_another_one(demo_base, shipped):
    """After a change of a script beside the recipes: `python recipes/demo_base.py recipes/demo-base`."""
    assert shipped["fingerprint"] == demo_base.fingerprint(demo_base.Size())
    assert shipped["weights_sha256"] == hashlib.sha256(weights_of(SHIPPED)).hexdigest()
    assert len(weights_of(SHIPPED)) < 2e6


def test_its_tokenizer_is_the_one_that_the_script_trains(demo_base, tmp_path):
    chance = random.Random(demo_base.SEED + 1)
    stories = [demo_base.write_story(chance) for _ in range(demo_base.STORIES_FOR_THE_TOKENIZER)]
    demo_base.train_tokenizer(stories, demo_base.Size().vocabulary).save_pretrained(tmp_path)

    assert (tmp_path / "tokenizer.json").read_bytes() == (SHIPPED / "tokenizer.json").read_bytes()


def loss_on(folder, stories):
    """Nats a token, of stories that it has not read."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        AutoTokenizer.from_pretrained(folder),
    )
    losses = []
    with torch.no_grad():
        for story in stories:
            ids = tokenizer(story, return_tensors="pt").input_ids
            losses.append(model(input_ids=ids, labels=ids).loss.item())
    return sum(losses) / len(losses)


def test_it_knows_stories_that_it_has_not_read(stories):
    assert loss_on(SHIPPED, stories[:64]) < 1.2


@pytest.mark.demo_base
def test_built_anew_it_is_the_same_to_the_bit_on_the_same_kind_of_machine_and_learns_as_well_on_another(
    demo_base, shipped, stories, tmp_path
):
    demo_base.ensure_base(tmp_path / "base", demo_base.Size())

    built = json.loads((tmp_path / "base/built_by.json").read_text())
    if all(built[name] == shipped[name] for name in demo_base.machine()):
        assert built == shipped
        assert weights_of(tmp_path / "base") == weights_of(SHIPPED)
    else:
        assert loss_on(tmp_path / "base", stories[:256]) == pytest.approx(loss_on(SHIPPED, stories[:256]), rel=0.1)
