"""The sample dataset that ships with the project, and the script that wrote it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[2] / "recipes"
SHIPPED = RECIPES / "shop-orders"


def records_of(name):
    return [json.loads(line) for line in (SHIPPED / name).read_text(encoding="utf-8").splitlines()]


ALL = [*records_of("train.jsonl"), *records_of("validation.jsonl")]


def test_the_generator_writes_the_shipped_files_to_the_byte(tmp_path):
    subprocess.run([sys.executable, RECIPES / "shop_orders.py", tmp_path], check=True, capture_output=True)

    for name in ("train.jsonl", "validation.jsonl"):
        assert (tmp_path / name).read_bytes() == (SHIPPED / name).read_bytes()


def test_without_a_folder_the_generator_says_how_it_is_called():
    result = subprocess.run([sys.executable, RECIPES / "shop_orders.py"], capture_output=True, text=True, check=False)

    assert result.returncode == 1
    assert "usage: python recipes/shop_orders.py FOLDER" in result.stderr


def test_there_are_a_thousand_examples_to_learn_from_and_120_to_judge_by():
    assert len(records_of("train.jsonl")) == 1000
    assert len(records_of("validation.jsonl")) == 120


def test_no_note_stands_twice_in_a_file_or_in_both():
    assert len({record["note"] for record in ALL}) == len(ALL)


def test_each_record_is_a_note_and_an_order_of_five_facts():
    import shop_orders

    for record in ALL:
        assert set(record) == {"note", "order"}
        count, colour, item, city, day = record["order"].split(" | ")
        assert int(count) in shop_orders.NUMBERS
        assert colour in shop_orders.COLOURS
        assert item in shop_orders.PLURALS
        assert city in shop_orders.CITIES
        assert day in shop_orders.DAYS


def test_each_fact_of_an_order_can_be_read_in_its_note():
    import shop_orders

    for record in ALL:
        words = re.findall(r"\w+", record["note"])
        count, colour, item, city, day = record["order"].split(" | ")
        number = {"1": {"a", "an"}, "2": {"pair"}, "12": {"dozen"}}.get(count, set())
        assert {*number, count, shop_orders.NUMBERS[int(count)]} & set(words), record
        assert (item if count == "1" else shop_orders.PLURALS[item]) in words, record
        assert {colour, city, day} <= set(words), record


def test_notes_are_sentences_with_the_right_article():
    for record in ALL:
        assert re.fullmatch(r"[A-Z].*[.?]", record["note"]), record
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]|  |[{}|]", record["note"]), record


@pytest.mark.parametrize("vocabulary", ["COLOURS", "CITIES", "DAYS", "PLURALS", "NUMBERS"])
def test_each_word_that_is_judged_was_there_to_be_learned(vocabulary):
    import shop_orders

    place = ("NUMBERS", "COLOURS", "PLURALS", "CITIES", "DAYS").index(vocabulary)
    learned = {record["order"].split(" | ")[place] for record in records_of("train.jsonl")}

    assert learned == {str(word) for word in getattr(shop_orders, vocabulary)}


def test_some_notes_also_name_a_city_a_day_or_a_colour_that_is_not_the_orders():
    import shop_orders

    misleading = 0
    for record in ALL:
        words = set(re.findall(r"\w+", record["note"]))
        others = {*shop_orders.CITIES, *shop_orders.DAYS, *shop_orders.COLOURS} - set(record["order"].split(" | "))
        misleading += bool(words & others)

    assert 0.2 < misleading / len(ALL) < 0.3


def test_the_demos_recipe_reads_these_files_and_asks_nothing_that_was_learned():
    from job.core.recipe.text import load_recipe

    recipe = load_recipe((RECIPES / "demo.yaml").read_text(encoding="utf-8"), source="demo.yaml")

    assert (*recipe.data.train, *recipe.data.validation) == tuple(
        f"recipes/shop-orders/{name}.jsonl" for name in ("train", "validation")
    )
    assert set(recipe.data.fields) == {"note", "order"}
    learned = {f"{record['note']}\nAnswer:" for record in records_of("train.jsonl")}
    assert not learned & set(recipe.evaluate.prompts)
