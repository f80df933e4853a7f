"""Writes the sample dataset: notes as a shop gets them, and the order that each one means.

    python recipes/shop_orders.py FOLDER

writes train.jsonl and validation.jsonl. A fixed seed decides everything, so each run writes the same bytes. A record:

    {"note": "Mia wants three red lamps sent to Oslo by Friday.", "order": "3 | red | lamp | Oslo | Friday"}

About one note in four also names a day, a place or a colour that is not the order's, so that looking for any city in
the note is not enough.
"""

import json
import random
import sys
from collections.abc import Mapping
from pathlib import Path

SEED = 20240607
TRAIN_EXAMPLES = 1000
VALIDATION_EXAMPLES = 120

NAMES = (
    *("Mia", "Omar", "Lena", "Kofi", "Priya", "Hugo", "Nora", "Ivan", "Aisha", "Luca"),
    *("Sofia", "Jonas", "Mei", "Diego", "Clara", "Yuki", "Samir", "Greta", "Felix", "Amara"),
)
CITIES = (
    *("Oslo", "Lisbon", "Bergen", "Dublin", "Lyon", "Porto", "Vienna", "Madrid", "Athens", "Geneva"),
    *("Munich", "Riga", "Boston", "Denver", "Toronto", "Nairobi", "Cairo", "Lima", "Kyoto", "Delhi"),
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
COLOURS = ("red", "blue", "green", "yellow", "black", "white", "brown", "purple", "orange", "grey")
PLURALS: Mapping[str, str] = {
    **{word: f"{word}s" for word in ("lamp", "chair", "vase", "mirror", "kettle", "basket", "blanket", "clock")},
    **{word: f"{word}s" for word in ("mug", "bowl", "rug", "candle", "pillow", "jacket", "umbrella", "suitcase")},
    **{word: f"{word}es" for word in ("bench", "brush", "dish", "dress", "watch")},
    "shelf": "shelves",
    "scarf": "scarves",
    "knife": "knives",
}
"""Each item and its plural."""
NUMBERS: Mapping[int, str] = dict(
    enumerate(("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"), 1)
)

PLAIN_NOTES = (
    "{name} wants {goods} sent to {city} by {day}.",
    "{name} asked for {goods}, to arrive in {city} on {day}.",
    "{name} is moving to {city} and needs {goods} there by {day}.",
    "{name} from {city} rang and ordered {goods} for {day}.",
    "{name} has a party in {city} on {day} and still needs {goods}.",
    "{name} wrote: please bring {goods} to {city} this {day}.",
    "{name} chose {goods} and will collect {them} in {city} on {day}.",
    "{name} is opening a shop in {city} on {day} and would like {goods} for it.",
    "{name} paid for {goods} today. Deliver to {city}, {day} morning.",
    "Please send {goods} to {city}; {name} needs {them} by {day}.",
    "Please put {goods} aside for {name}, who is coming to the {city} shop on {day}.",
    "Can you get {goods} to {name} in {city} before {day}?",
    "Could we deliver {goods} to {city} by {day}? {name} is asking.",
    "By {day} {name} would like {goods} at the new flat in {city}.",
    "New order from {name}: {goods}, delivery to {city}, {day}.",
    "We promised {name} {goods} for {day}. The address is in {city}.",
    "Our shop in {city} has run out: {name} asks for {goods} by {day}.",
    "Hello, this is {name}. I would like {goods} sent to {city} on {day}, please.",
    "For {day}: {goods} to {city}, ordered by {name}.",
    "The hotel in {city} needs {goods} before the guests arrive on {day}.",
    "A customer in {city} bought {goods}. Deliver on {day}.",
    "On {day} our van drives to {city}. Load {goods} for {name}.",
    "Pack {goods} for {name} in {city}, to be there by {day} at the latest.",
    "The school in {city} is buying {goods}, and {name} expects {them} on {day}.",
    "It is urgent: {name} must have {goods} in {city} on {day}.",
    "The wedding in {city} is on {day}, and {name} would like {goods} as a present.",
)
TRICKY_NOTES = (
    "{name} called from {other_city}: send {goods} to {city} by {day}.",
    "{name} lives in {other_city}, but wants {goods} sent to {city} by {day}.",
    "{name} rang on {other_day} and would like {goods} delivered to {city} on {day}.",
    "{name} looked at {other_colour} first, then ordered {goods} for {city}, due on {day}.",
    "{name} cannot be home on {other_day}, so bring {goods} to {city} on {day}.",
    "Not {other_day} but {day}: {name} wants {goods} brought to {city}.",
    "Nothing goes to {other_city} this week. {name} now wants {goods} taken to {city} by {day}.",
    "Not {other_colour} this time: {name} in {city} can wait for {goods} until {day}.",
)
"""Each of these also names a city, a day or a colour that is not the order's."""
TRICKY_SHARE = 0.25


def with_article(words: str) -> str:
    """`a red lamp`, `an orange lamp`."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def goods_in_words(chance: random.Random, *, count: int, colour: str, item: str) -> str:
    """The goods as people write them: three red lamps, 3 red lamps, three lamps in red, a dozen red lamps."""
    if count == 1:
        return chance.choice((with_article(f"{colour} {item}"), f"one {colour} {item}", f"one {item} in {colour}"))
    items = PLURALS[item]
    forms = [f"{NUMBERS[count]} {colour} {items}"] * 4
    forms += [f"{count} {colour} {items}", f"{NUMBERS[count]} {items} in {colour}"]
    if count == 2:  # noqa: PLR2004 - a pair is two
        forms.append(f"a pair of {colour} {items}")
    if count == 12:  # noqa: PLR2004 - a dozen is twelve
        forms.append(f"a dozen {colour} {items}")
    return chance.choice(forms)


def make_record(chance: random.Random) -> dict[str, str]:
    """One note and the order it means."""
    city, other_city = chance.sample(CITIES, 2)
    day, other_day = chance.sample(DAYS, 2)
    colour, other_colour = chance.sample(COLOURS, 2)
    count, item = chance.choice(tuple(NUMBERS)), chance.choice(tuple(PLURALS))
    template = chance.choice(TRICKY_NOTES if chance.random() < TRICKY_SHARE else PLAIN_NOTES)
    note = template.format(
        name=chance.choice(NAMES),
        goods=goods_in_words(chance, count=count, colour=colour, item=item),
        them="it" if count == 1 else "them",
        city=city,
        other_city=other_city,
        day=day,
        other_day=other_day,
        other_colour=other_colour,
    )
    return {"note": note, "order": f"{count} | {colour} | {item} | {city} | {day}"}


def make_dataset() -> tuple[str, str]:
    """The text of train.jsonl and of validation.jsonl; no note stands twice, in one of them or in both."""
    chance = random.Random(SEED)
    records: dict[str, str] = {}
    while len(records) < TRAIN_EXAMPLES + VALIDATION_EXAMPLES:
        record = make_record(chance)
        records.setdefault(record["note"], json.dumps(record) + "\n")
    lines = list(records.values())
    return "".join(lines[:TRAIN_EXAMPLES]), "".join(lines[TRAIN_EXAMPLES:])


def main() -> None:
    """Write both files into the folder named on the command line."""
    if len(sys.argv) != 2:  # noqa: PLR2004 - the script and its one argument
        sys.exit("usage: python recipes/shop_orders.py FOLDER")
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in zip(("train.jsonl", "validation.jsonl"), make_dataset(), strict=True):
        (folder / name).write_bytes(text.encode())
        print(f"{folder / name}: {text.count(chr(10))} examples")


if __name__ == "__main__":
    main()
