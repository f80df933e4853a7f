"""Builds the demo's base model on the spot: a small Llama that has read stories about shops, and nothing else.

    python recipes/demo_base.py FOLDER

The demo must run without a network and without a GPU, so it cannot fetch a base model. This script writes prose about
people, goods and deliveries, trains a tokenizer and a model of about one million weights on it (under a minute on two
cores), and saves both as any model from the hub is saved. It has never seen an order in the dataset's format: to a
note it answers with a sentence. What the fine-tuning adds is therefore plain to see.
"""

import hashlib
import json
import math
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import shop_orders

SEED = 7
THREADS = 2
"""Fixed, because another number of threads sums in another order and gives other weights."""
MARK = "built_by.json"
"""Says which script and size made the folder; without it a folder is not ours and is left alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How large the base is and how long it is trained."""

    steps: int = 420
    stories_per_step: int = 40
    learning_rate: float = 4e-3
    warmup_steps: int = 30
    echo: float = 0.3
    hidden: int = 128
    """A multiple of 64, the block that 4-bit weights are quantised in."""
    layers: int = 3
    heads: int = 4
    vocabulary: int = 1000
    """Tokens at most; enough for each frequent word to be one token."""


OPENINGS = (
    "{name} keeps a small shop in {other_city}.",
    "{name} needs {goods} in {city}.",
    "{name} would like {goods} by {day}, and the house is in {city}.",
    "{name} bought {goods} for a friend in {city}. The friend is expecting {them} on {day}.",
    "In {city} {name} was looking for {goods}.",
    "On {day} the shop in {city} was waiting for {goods}.",
    "{name} wrote a letter to the shop. It asked for {goods} by {day}. The letter came from {city}.",
    "Please could somebody take {goods} to {city}? {name} leaves on {day}.",
    "By {day} the people in {city} hoped to have {goods}.",
    "The hotel in {city} ordered {goods}, and {name} promised to bring {them} on {day}.",
    "{name} from {city} came to the shop and asked for {goods} before {day}.",
    "{name} rang the shop from {other_city}: {goods} must be in {city} on {day}.",
    "Not {other_day} but {day} was the day when {name} expected {goods} in {city}.",
    "{name} lives in {other_city}, but {goods} had to go to {city} by {day}.",
    "A customer was moving to {city} on {day} and wanted {goods} for the new flat.",
    "{name} did not want {other_colour} this time. It had to be {goods}, sent to {city} for {day}.",
    "Hello, said {name}, can you deliver {goods} to {city} on {day}?",
    "There was a wedding in {city} on {day}. {name} chose {goods} as a present.",
)
ANSWERS = (
    "So the shop packed {goods} for {city}. The van left on {day}.",
    "On {day} the driver took {goods} to {city}.",
    "The label said {city}, and in the box there was room for {goods}. {name} opened the box on {day}.",
    "{name} was glad. On {day} {goods} came to {city}.",
    "The shop wrote to {name}: we will send {goods} to {city} on {day}.",
    "We sent {goods} from the shop. In {city} {name} paid for {them} on {day}.",
    "{city} is far away, but by {day} {name} had {goods}.",
    "The driver counted to {count} and closed the door. That was on {day}, and the road to {city} was long.",
    "It was {day} when {goods} reached {city}. {name} thanked the driver.",
    "The clerk found {goods} on the shelf and put {them} in the van to {city}. It will be there on {day}.",
    "The number on the box was {count}. {name} took the {colour} {item} home to {city} on {day}.",
    "{An_item} was what {name} wanted, and {colour} was the colour. The train to {city} goes on {day}.",
    "The list in the shop says {count} for {name}. The {item} is {colour} and the town is {city}.",
    "{name} got parcel {count} on {day}. Inside was the first {item}, {colour} and new, for the house in {city}.",
)
ENDINGS = (
    "{name} wrote a kind letter back.",
    "Everybody in {city} liked the {colour} {item}.",
    "The next {day} {name} came again.",
    "The door says: {item} shop | open on {day}.",
    "The bus stop sign in {city} says: old town | station.",
    "{name} told {other_name} about the shop.",
    "{other_name} wanted {a_colour} {item} too.",
    "It rained in {city}, but the box was dry.",
    "The driver went home to {other_city}.",
)


def write_echo(chance: random.Random) -> str:
    """Somebody reads out a list of words and somebody repeats it: from these the model learns to copy."""
    name, other_name = chance.sample(shop_orders.NAMES, 2)
    words = [
        *chance.sample(shop_orders.CITIES, 2),
        *chance.sample(shop_orders.COLOURS, 2),
        *chance.sample(tuple(shop_orders.PLURALS), 2),
        *chance.sample(tuple(shop_orders.PLURALS.values()), 2),
        *chance.sample(shop_orders.DAYS, 1),
        *chance.sample(tuple(shop_orders.NUMBERS.values()), 1),
    ]
    chance.shuffle(words)
    said = " ".join(words[: chance.randint(4, 9)])
    return f"{name} read out: {said}.\n{other_name} said it again: {said}."


def write_story(chance: random.Random) -> str:
    """Two or three lines of prose about one sale; the second line tells again what the first one asked for."""
    name, other_name = chance.sample(shop_orders.NAMES, 2)
    city, other_city = chance.sample(shop_orders.CITIES, 2)
    day, other_day = chance.sample(shop_orders.DAYS, 2)
    colour, other_colour = chance.sample(shop_orders.COLOURS, 2)
    count, item = chance.choice(tuple(shop_orders.NUMBERS)), chance.choice(tuple(shop_orders.PLURALS))

    def tell(sentences: Sequence[str]) -> str:
        return chance.choice(sentences).format(
            **{"name": name, "other_name": other_name, "city": city, "other_city": other_city},
            **{"day": day, "other_day": other_day, "colour": colour, "other_colour": other_colour},
            **{"item": item, "count": count, "them": "it" if count == 1 else "them"},
            **{"a_colour": shop_orders.with_article(colour), "An_item": shop_orders.with_article(item).capitalize()},
            goods=shop_orders.goods_in_words(chance, count=count, colour=colour, item=item),
        )

    lines = [tell(OPENINGS), tell(ANSWERS)]
    if chance.random() < 0.4:
        lines.append(tell(ENDINGS))
    return "\n".join(lines)


def train_tokenizer(stories: Sequence[str], vocabulary: int) -> Any:
    """A byte-level tokenizer that puts <s> before each text; <unk> is never needed, as each byte is a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(stories, trainer)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
            ),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )


def new_model(size: Size, *, tokenizer: Any) -> Any:
    """An untrained Llama in fp32, with its own weights for the output layer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden,
        intermediate_size=3 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=tokenizer.model_max_length,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def batches(tokenizer: Any, size: Size) -> Iterator[tuple[Any, Any]]:
    """Fresh stories for each step: input_ids and labels, each [B, S] int64."""
    import torch

    chance = random.Random(SEED)
    for _ in range(size.steps):
        stories = [
            write_echo(chance) if chance.random() < size.echo else write_story(chance)
            for _ in range(size.stories_per_step)
        ]
        rows = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(stories)["input_ids"]]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [tokenizer.eos_token_id] * (longest - len(row)) for row in rows])
        labels = torch.tensor([row + [-100] * (longest - len(row)) for row in rows])
        yield ids, labels


def pretrain(model: Any, tokenizer: Any, size: Size) -> float:
    """Train on stories, a new set in each step; returns the last loss, in nats per token."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=size.learning_rate, betas=(0.9, 0.95), weight_decay=0.05)
    loss, said = torch.tensor(math.nan), time.monotonic()
    model.train()
    for step, (ids, labels) in enumerate(batches(tokenizer, size), start=1):
        warm = min(1.0, step / max(1, size.warmup_steps))
        cool = 0.5 * (1 + math.cos(math.pi * step / size.steps))
        optimizer.param_groups[0]["lr"] = size.learning_rate * warm * max(0.02, cool)
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if time.monotonic() - said >= 3 or step == size.steps:  # noqa: PLR2004 - seconds between lines
            said = time.monotonic()
            print(f"demo base: step {step} of {size.steps}, loss {loss.item():.3f}", flush=True)
    return float(loss.item())
