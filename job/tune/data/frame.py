"""TODO job.tune.data.frame."""

from collections.abc import Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any

from job.core.errors import UsageError
from job.core.recipe import DataSection
from job.core.records import Example


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRules:
    """How this tokenizer and this recipe frame an example."""

    bos: int | None
    """Token before each example; None for tokenizers that put none."""
    eos: int
    literal_special: bool
    """Whether special tokens written in a template are meant as such. Otherwise text such as `</s>` in a record is
    encoded letter by letter: data must not end an example early."""
    loss_on_prompt: bool


def token_rules(tokenizer: Any, data: DataSection) -> TokenRules:
    """Find out how the tokenizer frames a text.

    Raises:
        UsageError: it has no end-of-sequence token, so the model could never learn to stop.
    """
    if tokenizer.eos_token_id is None:
        msg = (
            "the base model's tokenizer names no end-of-sequence token (eos_token in tokenizer_config.json), "
            "so the model could not learn to stop; add it to the model folder"
        )
        raise UsageError(msg)
    framed = tokenizer("a").input_ids
    puts_bos = tokenizer.bos_token_id is not None and framed[:1] == [tokenizer.bos_token_id]
    templates = [t for t in (data.text, data.prompt, data.completion) if t is not None]
    literals = "".join(literal for t in templates for literal, *_ in Formatter().parse(t))
    return TokenRules(
        bos=tokenizer.bos_token_id if puts_bos else None,
        eos=tokenizer.eos_token_id,
        literal_special=any(token in literals for token in tokenizer.all_special_tokens),
        loss_on_prompt=data.loss_on == "all",
    )


def encode_texts(texts: Sequence[str], tokenizer: Any, rules: TokenRules) -> list[list[int]]:
    """Token ids without frame."""
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        split_special_tokens=not rules.literal_special,
        return_attention_mask=False,
        verbose=False,  # length is judged later, on purpose
    )
    return [list(ids) for ids in encoded.input_ids]


def encode_prompt(text: str, tokenizer: Any, rules: TokenRules) -> list[int]:
    """Token ids of a prompt as the model saw it in training: BOS where the tokenizer puts one, and no EOS."""
    return _framed_start(encode_texts([text], tokenizer, rules)[0], rules)


@dataclass(frozen=True, slots=True, kw_only=True)
class Framed:
    """One example as token ids, with BOS and EOS."""

    ids: list[int]
    target_from: int
    """Position of the first target."""
    answer_from: int
    """Position where the prompt ends: the first target, unless the loss is over the prompt too."""


def encode_examples(batch: Sequence[Example], tokenizer: Any, rules: TokenRules) -> list[Framed]:
    """Each example's token ids, framed.

    A prompt keeps the ids it has when it stands alone, as it will at inference. Where prompt and completion share no
    token they are encoded as one text; where the tokenizer would merge across the border, each is encoded by itself.
    """
    prompts = encode_texts([e.prompt for e in batch], tokenizer, rules)
    whole = encode_texts([e.prompt + e.completion for e in batch], tokenizer, rules)
    split = [i for i, ids in enumerate(prompts) if whole[i][: len(ids)] != ids]
    alone = encode_texts([batch[i].completion for i in split], tokenizer, rules) if split else []
    for i, completion in zip(split, alone, strict=True):
        whole[i] = prompts[i] + completion
    return [_frame(ids, len(prompt), rules) for ids, prompt in zip(whole, prompts, strict=True)]


def _framed_start(ids: list[int], rules: TokenRules) -> list[int]:
    return ids if rules.bos is None or ids[:1] == [rules.bos] else [rules.bos, *ids]


def _frame(ids: list[int], prompt_tokens: int, rules: TokenRules) -> Framed:
    framed = _framed_start(ids, rules)
    prompt_end = prompt_tokens + len(framed) - len(ids)
    if framed[-1:] != [rules.eos] or len(framed) == prompt_end:
        framed = [*framed, rules.eos]
    # The first token follows nothing, so it is never a target.
    answer_from = max(prompt_end, 1) if prompt_tokens else 1
    return Framed(ids=framed, target_from=1 if rules.loss_on_prompt else answer_from, answer_from=answer_from)
