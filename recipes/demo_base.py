"""Builds the demo's base model: a small Llama that has read stories about shops, and nothing else.

    python recipes/demo_base.py recipes/demo-base

The demo must run without a network and without a GPU, so it cannot fetch a base model: what this script builds stands
beside it in `demo-base`. It writes prose about people, goods and deliveries, trains a tokenizer and a model of about
one million weights on it (a minute on two cores with AVX-512, several with AVX2), and saves both as a model from the
hub is saved. It has never seen an order in the dataset's format: to a note it answers with a sentence that tells the
note again. What the fine-tuning adds is therefore plain to see.
"""

import hashlib
import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import shop_orders

SEED = 7
THREADS = 2
"""Fixed: another number of threads sums in another order and gives other weights."""
SECONDS_BETWEEN_LINES = 3.0
STORIES_FOR_THE_TOKENIZER = 4000
EMBEDDING_SPREAD = 0.08
FACTS = [
    f" {word}"
    for words in (
        *(shop_orders.CITIES, shop_orders.DAYS, shop_orders.COLOURS, shop_orders.NAMES),
        *(shop_orders.PLURALS.keys(), shop_orders.PLURALS.values()),
        *(shop_orders.NUMBERS.keys(), shop_orders.NUMBERS.values()),
    )
    for word in words
]
"""The words that a story's second line takes from its first."""
WEIGHTS = "model.safetensors"
MARK = "built_by.json"
"""Says which script and size made the folder, on what, and how far it learned; without it a folder is not ours and is
left alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How large the base is and how long it is trained."""

    steps: int = 300
    stories_per_step: int = 24
    learning_rate: float = 4e-3
    """Peak, AdamW: embeddings, norms and output layer."""
    matrix_learning_rate: float = 2e-2
    """Peak, Muon: the matrices of the layers. It needs half of the steps that AdamW alone would need."""
    warmup_steps: int = 30
    fact_weight: float = 5.0
    """How much more than other words a fact that is told again counts in the loss: copying is what the base is for."""
    hidden: int = 128
    """A multiple of 64, the block that 4-bit weights are quantised in."""
    layers: int = 3
    heads: int = 4
    vocabulary: int = 1200
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
    "It was urgent. {name} still had to have {goods} for a party in {city}, and the party was on {day}.",
    "The school in {city} had run out. {name} is buying {goods} and expects {them} by {day} at the latest.",
    "{name} called on {other_day}: I cannot be home, so please put {goods} aside for {day}. I am coming to {city}.",
    "{name} looked at {other_colour} first, then paid for {goods}. The delivery to {city} is due on {day} morning.",
    "Nothing goes to {other_city} this week, but our van drives to {city} on {day} with {goods}.",
    "The guests arrive in {city} on {day}. {name} is opening a new shop there and is waiting for {goods}.",
    "We load {goods} and bring {them} to a new address in {city}. {name} can wait until {day}.",
    "{name} has a flat in {city}. Could the shop get {goods} there before {day}, and who will collect {them}?",
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
LABELS = (
    "{name} wrote on the box: {item} | {count} | {city}.",
    "The label on the box reads: {city} | {day} | {item}.",
    "The sign on the van says: {day} | {city}.",
    "The clerk put up a list: {count} | {item} | {colour}.",
    "The driver was looking at the label: {colour} | {item} | {day}.",
    "The parcel is ready. On it stands: {count} | {day} | {city}.",
    "Somebody wrote with chalk: {colour} | {count} | {item}.",
)
"""Short notes inside a sentence; none has the five facts of an order, nor their order."""
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


LABEL_SHARE, CUE_SHARE, ENDING_SHARE = 0.35, 0.5, 0.3
"""How often a story's second line is a label; else begins with the demo's cue `Answer:`; how often a third follows."""


def write_story(chance: random.Random) -> str:
    """Two or three lines of prose about one sale; the second line tells again what the first one asked for."""
    name, other_name = chance.sample(shop_orders.NAMES, 2)
    city, other_city = chance.sample(shop_orders.CITIES, 2)
    day, other_day = chance.sample(shop_orders.DAYS, 2)
    colour, other_colour = chance.sample(shop_orders.COLOURS, 2)
    count, item = chance.choice(tuple(shop_orders.NUMBERS)), chance.choice(tuple(shop_orders.PLURALS))

    def tell(sentences: Sequence[str]) -> str:
        return chance.choice(sentences).format(
            name=name,
            other_name=other_name,
            city=city,
            other_city=other_city,
            day=day,
            other_day=other_day,
            colour=colour,
            a_colour=shop_orders.with_article(colour),
            other_colour=other_colour,
            item=item,
            An_item=shop_orders.with_article(item).capitalize(),
            count=count,
            them="it" if count == 1 else "them",
            goods=shop_orders.goods_in_words(chance, count=count, colour=colour, item=item),
        )

    if chance.random() < LABEL_SHARE:
        again = tell(LABELS)
    else:
        again = ("Answer: " if chance.random() < CUE_SHARE else "") + tell(ANSWERS)
    lines = [tell(OPENINGS), again]
    if chance.random() < ENDING_SHARE:
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
        bos_token="<s>",  # noqa: S106 - a token of the vocabulary, no secret
        eos_token="</s>",  # noqa: S106 - same
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
    model = LlamaForCausalLM(config)
    # A start from which copying a word is near: words far apart, input and output words alike, and attention that
    # writes what it reads. From a plain start the time is over before the model has found out how to copy.
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(std=EMBEDDING_SPREAD)
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.add_(layer.self_attn.v_proj.weight.T)
    return model


def make_batches(tokenizer: Any, size: Size) -> Iterator[tuple[Any, Any]]:
    """Fresh stories for each step: input_ids [B, S] int64, and the weight of each token in the loss [B, S] float."""
    import torch

    chance = random.Random(SEED)
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"][0]
    facts = torch.zeros(len(tokenizer), dtype=torch.bool)
    facts[sorted({ids[0] for ids in tokenizer(FACTS, add_special_tokens=False)["input_ids"] if len(ids) == 1})] = True
    for _ in range(size.steps):
        stories = [write_story(chance) for _ in range(size.stories_per_step)]
        rows = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(stories)["input_ids"]]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [tokenizer.eos_token_id] * (longest - len(row)) for row in rows])
        weights = torch.tensor([[1.0] * len(row) + [0.0] * (longest - len(row)) for row in rows])
        told_again = facts[ids] & ((ids == newline).cumsum(dim=1) > 0)
        yield ids, weights + told_again * (size.fact_weight - 1)


def make_optimizers(model: Any, size: Size) -> list[Any]:
    """Muon for the matrices inside the layers, AdamW for the rest; each with its peak as its learning rate."""
    import torch

    matrices, rest = [], []
    for name, weight in model.named_parameters():
        (matrices if "layers" in name and weight.ndim > 1 else rest).append(weight)
    return [
        torch.optim.Muon(matrices, lr=size.matrix_learning_rate, weight_decay=0.0),
        torch.optim.AdamW(rest, lr=size.learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def make_schedule(size: Size) -> Callable[[int], float]:
    """Share of the peak by step (from 0): up over the warm-up, level, then down over the last two fifths."""

    def share(step: int) -> float:
        return min(1.0, (step + 1) / size.warmup_steps, (size.steps - step) / (0.4 * size.steps))

    return share


def pretrain(model: Any, tokenizer: Any, size: Size) -> float:
    """Train on stories, new ones in each step; returns the last step's loss in nats per (weighted) token."""
    import torch
    from torch.nn.functional import cross_entropy

    optimizers = make_optimizers(model, size)
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, make_schedule(size)) for optimizer in optimizers]
    loss, said = torch.tensor(math.nan), time.monotonic()
    model.train()
    for step, (ids, weights) in enumerate(make_batches(tokenizer, size), start=1):
        logits = model(input_ids=ids).logits[:, :-1]
        losses = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        loss = (losses * weights[:, 1:].flatten()).sum() / weights[:, 1:].sum()
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for part in (*optimizers, *schedules):
            part.step()
        if time.monotonic() - said >= SECONDS_BETWEEN_LINES or step == size.steps:
            said = time.monotonic()
            print(f"demo base: step {step} of {size.steps}, loss {loss.item():.3f}", flush=True)
    return float(loss.item())


def fingerprint(size: Size) -> str:
    """What decides the weights: the two scripts and the size."""
    digest = hashlib.sha256(json.dumps(asdict(size), sort_keys=True).encode())
    for script in (__file__, shop_orders.__file__):
        digest.update(Path(script).read_bytes())
    return digest.hexdigest()


def machine() -> dict[str, str]:
    """What the sums' order depends on besides: with the same of these the same weights come out, to the bit."""
    import torch

    return {
        "torch": torch.__version__.partition("+")[0],
        "processor": str(torch.cpu.get_capabilities().get("cpu_name", "unknown")),
        "vectors": torch.backends.cpu.get_cpu_capability(),
    }


def build(folder: Path, size: Size) -> None:
    """Build the base in memory and write it to `folder`: bf16 safetensors, configuration and tokenizer."""
    import torch
    from transformers.utils import logging

    torch.set_num_threads(THREADS)
    logging.disable_progress_bar()
    started = time.monotonic()
    chance = random.Random(SEED + 1)
    tokenizer = train_tokenizer([write_story(chance) for _ in range(STORIES_FOR_THE_TOKENIZER)], size.vocabulary)
    model = new_model(size, tokenizer=tokenizer)
    loss = pretrain(model, tokenizer, size)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / WEIGHTS).chmod(0o644)  # an image has it copied by root and reads it as another user
    facts = {
        "fingerprint": fingerprint(size),
        **asdict(size),
        **machine(),
        "loss": round(loss, 3),
        "weights_sha256": hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest(),
    }
    (folder / MARK).write_text(json.dumps(facts, indent=2) + "\n")
    weights = sum(weight.numel() for weight in model.parameters())
    print(
        f"demo base: built a Llama of {weights:,} weights, {size.layers} layers, {len(tokenizer)} tokens "
        f"in {time.monotonic() - started:.0f} s",
        flush=True,
    )


def ensure_base(folder: Path, size: Size) -> None:
    """See that `folder` holds the base that this script builds; it appears there whole or not at all.

    Raises:
        FileExistsError: something else stands at `folder`.
    """
    mark = folder / MARK
    if mark.is_file() and json.loads(mark.read_text())["fingerprint"] == fingerprint(size):
        print(f"demo base: {folder} is complete, nothing to build", flush=True)
        return
    if folder.exists() and not mark.is_file():
        raise FileExistsError(f"{folder}: exists and is no demo base; name another folder or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        build(Path(scratch, "base"), size)
        if folder.exists():
            folder.replace(Path(scratch, "outdated"))
        Path(scratch, "base").replace(folder)


def main() -> None:
    """Build the base in the folder named on the command line."""
    if len(sys.argv) != 2:  # noqa: PLR2004 - the script and its one argument
        sys.exit("usage: python recipes/demo_base.py FOLDER")
    try:
        ensure_base(Path(sys.argv[1]), Size())
    except FileExistsError as error:
        sys.exit(f"demo base: {error}")


if __name__ == "__main__":
    main()
