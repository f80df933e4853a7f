"""Mixtures of experts and hybrids: ours beside the rivals that train them in 4 bits, shape by shape, in one run.

    python -m bench.mixtures --shape SHAPE [--shape SHAPE]... --folder SCRATCH --train TRAIN.jsonl [--only NAME]...

Of each shape of `bench.random_base` a random base is written below SCRATCH, directly in 4 bits (gpt-oss in MXFP4), and
once more as Unsloth's uploads hold it; both are removed when it is measured. Ours runs by `entrypoint.py run`, rivals
by `bench.rivals`, each in a process of its own that is killed after --limit seconds. All have an adapter of rank 32 on
what `lora.targets: all-linear` means. The tokenizer is made from the text itself, of bytes, as those of these families
are. A shape's table is printed and written after each contestant: rates are medians over the steps after the warm-up
and count real tokens, a share of the ceiling is the rate times `bench.flops` of the weights that a token meets, by what
large products sustain, measured first.
"""

import argparse
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from bench import flops, ours, rival
from bench.compare import data_of
from bench.comparisons import Comparison, Ours, Rival
from bench.measured import Measured
from bench.options import GSM8K
from bench.processes import NoResultError, run
from bench.random_base import SHAPES, config_of, write_base
from bench.results import RESULTS, table, write_section
from job.core.plan.memory import GIB
from job.core.recipe.schema import ALL_LINEAR
from job.tune.model.adapter import chosen_by_all_linear
from job.tune.model.config import empty_model
from job.tune.model.mixtures import experts_in

_HEADER = (
    *("shape", "", "real tok/s", "ours / this", "of the ceiling", "slowest to fastest", "steps", "tokens a step"),
    *("real", "planned GiB", "peak GiB", "planned / peak", "loss"),
)
_VOCABULARY = 32000
_COMPARISON = Comparison(title="Mixtures of experts and hybrids in 4 bits", contestants=())
_PACKED_BY_UNSLOTH = {"qwen3_moe"}
"""Whose attention it packs; documents of the others are padded, as their layers hand something on or have sinks."""


_OF_EXPERTS = {"gate_proj", "up_proj", "down_proj"}
"""Modules of a shared expert, which Unsloth takes for the experts themselves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Options:
    """What `data_of` takes of one base."""

    base: Path
    train: Path
    text: str


def tokenizer_of(train, text, folder):
    """A tokenizer of bytes, made from the examples, with the ids that `bench.random_base` gives its configs."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    lines = train.read_text(encoding="utf-8").split("\n")
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.train_from_iterator(
        (text.format(**json.loads(line)) for line in lines if line.strip()),
        trainers.BpeTrainer(
            vocab_size=_VOCABULARY,
            special_tokens=["<unk>", "<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=made, **names).save_pretrained(folder)
    return folder


def targets_of(shape):
    """Names of the modules that `all-linear` adapts, and of those the ones that no mixture calls its experts by."""
    model = empty_model(config_of(shape).get_text_config())
    linear = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    names = chosen_by_all_linear(model) or sorted({name.rpartition(".")[2] for name in linear} - {"lm_head"})
    return names, [name for name in names if not (experts_in(model) and name in _OF_EXPERTS)]


def contestants_of(shape, options):
    """Ours, Unsloth and axolotl's way, all on the same modules, but for those that Unsloth takes for the experts."""
    names, not_of_experts = map(",".join, targets_of(shape))
    packed = SHAPES[shape]["model_type"] in _PACKED_BY_UNSLOTH
    rows = ("--rows", "4", "--row-tokens", "4096") if packed else ("--rows", "32")
    steps = {"steps": options.steps, "warm_up": options.warm_up}
    left = "" if options.free_gib is None else f", beside a process that leaves {options.free_gib:g} GiB free"
    return (
        Ours(
            name="ours",
            about=f"`entrypoint.py run`: batch of {options.batch} examples{left}",
            targets=ALL_LINEAR,
            batch=options.batch,
            free_gib=options.free_gib,
            **steps,
        ),
        Rival(
            name="unsloth",
            about=f"Unsloth: {'packed 4 x 4096' if packed else '32 examples'}, layers recomputed as it does by itself",
            module="bench.rivals.unsloth_sft",
            arguments=(*rows, "--targets", not_of_experts),
            **steps,
        ),
        Rival(
            name="parametrized",
            about="transformers' Trainer, experts by bitsandbytes' parametrization (axolotl's way): 32 examples of "
            "like length, layers recomputed, Liger",
            module="bench.rivals.parametrized_experts",
            arguments=("--targets", names, "--batch", "32"),
            **steps,
        ),
    )


def measure(contestant, base, options, folder):
    """Its data, and what was measured; or why nothing was, in words."""
    data = data_of(_COMPARISON, _Options(base=base, train=options.train, text=options.text), folder)
    own = {"data": data, "limit_seconds": options.limit, "folder": folder / "run"}
    try:
        if isinstance(contestant, Ours):
            return data, ours.measure(contestant, device=options.device, **own)
        return data, rival.measure(contestant, python=options.rivals_python, **own)
    except NoResultError as error:
        return data, str(error)


def row_of(shape, name, data, result, rates, first):
    """A row of the table; `first` is what was measured of ours, if anything was."""
    if not isinstance(result, Measured):
        return (shape, name, "no result", *[""] * (len(_HEADER) - 3))
    # By our base's sizes, whoever it is: what a token meets is the same.
    work = flops.per_token(data.shape, data.lengths, result.adapter_parameters)
    peak, planned = result.peak_bytes, result.plan.get("predicted_peak_bytes")
    return (
        shape,
        name,
        f"{result.rate:,.0f}",
        f"{first.rate / result.rate:.2f}" if isinstance(first, Measured) else "",
        f"{result.rate * work / rates['gemm_flops']:.3f}",
        f"{min(result.rates):,.0f} to {max(result.rates):,.0f}",
        result.steps,
        f"{result.tokens_per_step:,.0f}",
        f"{result.real_share:.0%}",
        f"{planned / GIB:.1f}" if planned else "",
        f"{peak / GIB:.1f}" if peak else "",
        f"{planned / peak - 1:+.1%}" if planned and peak else "",
        f"{result.losses[0]:.3f} to {result.losses[1]:.3f}",
    )


def words_on(shape, contestant, result):
    """How it was set up, and what it chose."""
    words = f"- {shape}, {contestant.name}: {contestant.about}"
    if not isinstance(result, Measured):
        return f"{words}. No result: {result}"
    versions = ", ".join(f"{name} {version}" for name, version in sorted(result.versions.items()))
    chosen = f"; {result.about}; {result.plan['engine_reason']}" if result.plan else ""
    return f"{words}{chosen}; {versions}."


def forms_of(shape):
    """In which form ours and Unsloth's base are written."""
    return ("mxfp4" if SHAPES[shape]["model_type"] == "gpt_oss" else "bnb4"), "unsloth"


def measure_shape(shape, tokenizer, options):
    """Contestant, its data and its result, one after another; bases are written when they are wanted."""
    own, theirs = forms_of(shape)
    place, first = options.folder / shape, None
    wanted = [each for each in contestants_of(shape, options) if not options.only or each.name in options.only]
    for contestant in wanted:
        form = theirs if contestant.name == "unsloth" else own
        if not (base := place / f"base-{form}").exists():
            size = write_base(shape, base, tokenizer, form=form)
            print(f"{shape}: {size / 1e9:.1f} GB as {form}", file=sys.stderr, flush=True)
        folder = place / contestant.name
        folder.mkdir()
        print(f"{shape}, {contestant.name} ...", file=sys.stderr, flush=True)
        data, result = measure(contestant, base, options, folder)
        first = result if contestant.name == "ours" else first
        yield contestant, data, result, first
    shutil.rmtree(place)


def main(arguments_given=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", action="append", required=True, choices=SHAPES)
    parser.add_argument("--folder", type=Path, required=True, help="for bases and runs; a shape of it is removed")
    parser.add_argument("--train", type=Path, required=True, metavar="FILE")
    parser.add_argument("--text", default=GSM8K, help="template over the fields of a record")
    parser.add_argument("--only", action="append", metavar="NAME", help="of the contestants; may be repeated")
    parser.add_argument("--batch", type=int, default=128, help="examples of a step of ours")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warm-up", type=int, default=4)
    parser.add_argument("--limit", type=float, default=300, metavar="SECONDS", help="of each contestant")
    parser.add_argument("--free-gib", type=float, metavar="GIB", help="leave ours no more than so much of the GPU")
    parser.add_argument("--rivals-python", default=sys.executable, metavar="FILE")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="of ours")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments_given)
    options.folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizer_of(options.train, options.text, options.folder / "tokenizer")
    rates = json.loads(run([sys.executable, "-m", "bench.ceiling"], limit_seconds=120, log=options.folder / "ceiling"))
    ceiling = f"{rates['gemm_flops'] / 1e12:.1f} TFLOP/s, bf16 products of {rates['product']}"
    for shape in options.shape:
        rows, words = [], []
        for contestant, data, result, first in measure_shape(shape, tokenizer, options):
            rows.append(row_of(shape, contestant.name, data, result, rates, first))
            words.append(words_on(shape, contestant, result))
            about = f"{rates['about']} Ceiling, measured in the same run: {ceiling}."
            command = f"    python -m bench.mixtures --shape {shape} --folder SCRATCH --train TRAIN.jsonl"
            command += "" if options.free_gib is None else f" --free-gib {options.free_gib:g}"
            text = "\n\n".join([about, table(_HEADER, rows), "\n".join(words)])
            write_section(
                options.results, f"mixtures-{shape}", f"## {_COMPARISON.title}: {shape}\n\n{command}\n\n{text}"
            )
            print(text, flush=True)


if __name__ == "__main__":
    main()
