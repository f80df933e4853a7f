"""Chat templates in the style of published ones, each with a small tokenizer that has its control tokens."""

import json
import random
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

TEMPLATES = Path(__file__).with_name("chat_templates")
_BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
_PRINTABLE = [*string.ascii_letters, *string.digits, *string.punctuation, "▁", "\n", "é", "ß"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Style:
    """A template and what its tokenizer is like."""

    bos: str
    eos: str
    control: tuple[str, ...]
    not_special: tuple[str, ...] = ()
    """Added tokens that are no control tokens."""
    is_sentencepiece: bool = False
    puts_bos: bool = False
    knows_system: bool = True
    knows_tools: bool = False


STYLES = {
    "chatml": Style(bos="<|endoftext|>", eos="<|im_end|>", control=("<|endoftext|>", "<|im_start|>", "<|im_end|>")),
    "llama3": Style(
        bos="<|begin_of_text|>",
        eos="<|end_of_text|>",  # as of the base: what ends a turn is another token
        control=("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        puts_bos=True,
        knows_tools=True,
    ),
    "gemma": Style(
        bos="<bos>",
        eos="<eos>",
        control=("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        is_sentencepiece=True,
        puts_bos=True,
        knows_system=False,
    ),
    "mistral": Style(
        bos="<s>",
        eos="</s>",
        control=(
            *("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]"),
            *("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
        ),
        is_sentencepiece=True,
        puts_bos=True,
        knows_system=False,  # it writes the system's message only before an answer, never into a whole conversation
        knows_tools=True,
    ),
    "reasoning": Style(
        bos="<|endoftext|>",
        eos="<|im_end|>",
        control=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        not_special=("<think>", "</think>", "<tool_call>", "</tool_call>"),
        knows_tools=True,
    ),
}


def template_of(style: str) -> str:
    """A style's template."""
    return (TEMPLATES / f"{style}.jinja").read_text(encoding="utf-8").removesuffix("\n")


def write_chat_tokenizer(folder: Path, style: str, *, template: str | None = None) -> Path:
    """A tokenizer of one letter a token (one byte in byte-level ones) and a few merges; ids stand in this order.

    Control tokens first, then the other added tokens, then the alphabet, then what is merged.
    """
    of = STYLES[style]
    added = [*of.control, *of.not_special]
    alphabet = _PRINTABLE if of.is_sentencepiece else _BYTES
    space = "▁" if of.is_sentencepiece else "Ġ"
    merges = [("t", "h"), ("th", "e"), (space, "t"), ("o", "n"), ("i", "n"), ("l", "l")]
    tokens = ["<unk>", *added, *alphabet, *("".join(pair) for pair in merges)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    if of.is_sentencepiece:
        prepends = "never" if style == "gemma" else "first"
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepends, split=False)
        tokenizer.decoder = decoders.Metaspace(prepend_scheme=prepends, split=False)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    if of.puts_bos:
        bos = (of.bos, vocabulary[of.bos])
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{of.bos} $A", special_tokens=[bos])
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in of.control])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in of.not_special])
    names = {"bos_token": of.bos, "eos_token": of.eos, "unk_token": "<unk>"}
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    made.chat_template = template_of(style) if template is None else template
    made.save_pretrained(folder)
    return folder


def chat_tokenizer(folder: Path, style: str, *, template: str | None = None) -> Any:
    """See `write_chat_tokenizer`."""
    return AutoTokenizer.from_pretrained(write_chat_tokenizer(folder, style, template=template))


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather in a town",
            "parameters": {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]},
        },
    }
]
_WORDS = (
    *("the", "one", "in", "all", "hello", "then", "town", "Rain?", "é", "ß", "12", "to,", "well:"),
    *("a+b", "<b>", "{x}", "[y]", "'z'", '"q"', "..."),
)


def random_chat(style: str, seed: int, *, reasoning: bool = False) -> dict[str, Any]:
    """A record: one to four exchanges, with a system message, tools and reasoning where the style knows them."""
    pick = random.Random(f"{style} {seed}")
    of = STYLES[style]
    messages = []
    if of.knows_system and pick.random() < 0.4:
        messages.append({"role": "system", "content": _text(pick)})
    with_tools = of.knows_tools and pick.random() < 0.4
    exchanges = 1 if with_tools and style == "mistral" else pick.randint(1, 4)
    for exchange in range(exchanges):
        messages.append({"role": "user", "content": _text(pick)})
        if with_tools and pick.random() < 0.7:
            call = {"name": "weather", "arguments": {"town": _text(pick)}}
            messages.append(
                {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}
            )
            messages.append({"role": "tool", "content": json.dumps({"sky": _text(pick)}, ensure_ascii=False)})
        thought = {"reasoning_content": _text(pick)} if reasoning and exchange == exchanges - 1 else {}
        messages.append({"role": "assistant", "content": _text(pick), **thought})
    return {"messages": messages, **({"tools": TOOLS} if with_tools else {})}


def _text(pick: random.Random) -> str:
    separators = (" ", " ", " ", "  ", "\n", "\n\n")
    words = pick.choices(_WORDS, k=pick.randint(1, 8))
    return words[0] + "".join(pick.choice(separators) + word for word in words[1:])
