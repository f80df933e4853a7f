"""How long answers take that a metric judges: of base and tuned model, beside transformers' own `generate`.

    python -m bench.answers --base FOLDER --train TRAIN.jsonl [--questions 500] [--longest 256] [--beside 64]
        [--results bench/RESULTS.md]

The first questions of the file are answered by the base and by an adapter of rank 32 on all projections, greedily, and
never end before --longest tokens: what a base of random weights writes does not end, and it is the worst case. The
first --beside of them are answered by `generate` too, in groups of 32, as families are that are not packed.
"""

import json
import time
from contextlib import nullcontext

import torch

from bench.options import parser_of
from bench.results import device_and_versions, table, write_section
from bench.training import PROJECTIONS, RANK
from job.core.recipe.schema import LoraSection
from job.tune.device.compute_dtype import compute_dtype
from job.tune.device.device import choose_device, peak_memory_bytes
from job.tune.engines.packed_model import PackedModel
from job.tune.loop.answers.greedy import greedy_tokens
from job.tune.loop.evaluate import Question, generated_tokens
from job.tune.model.adapter import attach_lora, trainable
from job.tune.model.base import load_base
from job.tune.model.config import load_tokenizer

PROMPT = "### Question: {question}\n ### Answer:"
NO_END = 10**9
"""No token has this id."""


def prompts_of(train, template, tokenizer, count):
    """Token ids of the first questions."""
    lines = train.read_text(encoding="utf-8").split("\n")
    records = [json.loads(line) for line in lines if line.strip()][:count]
    return [tokenizer(template.format(**record))["input_ids"] for record in records]


def model_of(base, device):
    """The base with an adapter that changes what it says."""
    lora = LoraSection(r=RANK, alpha=2 * RANK, targets=PROJECTIONS)
    loaded = load_base(base, device=device, dtype=compute_dtype(device))
    model = PackedModel(attach_lora(loaded, lora, source=str(base), revision=None, seed=0)).eval()
    torch.manual_seed(1)
    for parameter in trainable(model):
        parameter.data.add_(torch.randn_like(parameter) * 0.01)
    return model


def never():
    """Nobody asks to stop."""
    return False


def ours(model, prompts, *, longest):
    """Answers, and the seconds that they took."""
    ends = [frozenset({NO_END})] * len(prompts)
    return _timed(model, lambda: greedy_tokens(model, prompts, ends, max_new_tokens=longest, should_stop=never))


def theirs(model, prompts, tokenizer, *, longest):
    """The same by `generate`."""
    questions = [Question(ids=tuple(prompt), prompt="", expected=None) for prompt in prompts]
    ends = [frozenset({NO_END})] * len(prompts)
    return _timed(
        model,
        lambda: generated_tokens(model, questions, ends, tokenizer, max_new_tokens=longest, seed=0, should_stop=never),
    )


def _timed(model, answers):
    on_gpu = next(model.parameters()).is_cuda
    began = time.perf_counter()
    found = answers()
    if on_gpu:
        torch.cuda.synchronize()
    return found, time.perf_counter() - began


def same_share(found, others):
    """Share of the tokens that are the same up to the first one that is not."""
    same = 0
    for mine, other in zip(found, others, strict=True):
        same += next((n for n, (a, b) in enumerate(zip(mine, other, strict=True)) if a != b), len(mine))
    return same / sum(map(len, found))


def measure(options):
    """A row for each model, and the seconds of all answers of both."""
    device = choose_device(options.device)
    tokenizer = load_tokenizer(options.base)
    prompts = prompts_of(options.train, options.prompt, tokenizer, options.questions)
    model, rows, total = model_of(options.base, device), [], 0.0
    ours(model, prompts[:2], longest=2)  # libraries set themselves up
    for name in ("base", "tuned"):
        with model.model.disable_adapter() if name == "base" else nullcontext():
            found, seconds = ours(model, prompts, longest=options.longest)
            few = prompts[: options.beside]
            others, slow = theirs(model, few, tokenizer, longest=options.longest)
            alike = same_share(ours(model, few, longest=options.longest)[0], others)
        total += seconds
        tokens, their_tokens = sum(map(len, found)), sum(map(len, others))
        rows.append(
            (
                name,
                f"{len(prompts):,}",
                f"{seconds:.1f}",
                f"{tokens / seconds:,.0f}",
                f"{their_tokens / slow:,.0f}",
                f"{tokens / seconds / (their_tokens / slow):.1f}",
                f"{alike:.1%}",
            )
        )
        print(*rows[-1], flush=True)
    return rows, total, peak_memory_bytes(device)


def main(arguments=None):
    parser = parser_of(__doc__)
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--longest", type=int, default=256, help="tokens of an answer")
    parser.add_argument("--beside", type=int, default=64, help="questions that `generate` answers too")
    parser.add_argument("--prompt", default=PROMPT, help="template of a question over the fields of a record")
    options = parser.parse_args(arguments)
    rows, total, peak = measure(options)
    header = ("model", "answers", "seconds", "tok/s", "generate, tok/s", "times as fast", "same tokens as generate")
    command = (
        f"    python -m bench.answers --base FOLDER --train TRAIN.jsonl --questions {options.questions} "
        f"--longest {options.longest} --beside {options.beside}"
    )
    text = (
        f"{device_and_versions()}\n\n{options.base.name}, {options.longest} tokens an answer, none ends before.\n\n"
        f"{table(header, rows)}\n\nBoth in {total:.1f} s; peak memory {peak / 2**30:.1f} GiB. Tokens are counted up to "
        "the first difference from generate: in bf16 another size of group rounds otherwise, and where two tokens are "
        "nearly as likely the answers part."
    )
    print(text)
    write_section(options.results, "answers", f"## Answers\n\n{command}\n\n{text}")


if __name__ == "__main__":
    main()
