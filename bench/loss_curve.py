"""The product's loss, step by step, beside that of a plain transformers + peft loop on the same batches.

    python -m bench.loss_curve --base FOLDER --train TRAIN.jsonl [--engine fast] [--steps 200] [--batch 16]
        [--learning-rate 2e-3] [--seeds 3] [--curves FILE] [--plot bench/loss-curve.png] [--results bench/RESULTS.md]

The curves: the product's own steps; the plain loop (`bench.plain`) from the same first values of the adapter; the plain
loop from those of other seeds. The batches are the same for all, so that nothing but what is asked about differs. The
product is right where it is no farther from the plain loop than two seeds of the plain loop are from each other, all
smoothed; several seeds, for two of them may happen to lie near each other. Curves that --curves has already are taken
from there, so that an interrupted measurement is resumed.
"""

import gc
import itertools
import json
import tempfile
from functools import partial
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch

from bench import plain
from bench.options import parser_of
from bench.results import device_and_versions, table, write_section
from bench.training import load, recipe_of
from job.core.plan.course import plan_course
from job.tune.device.device import choose_device
from job.tune.model.adapter import attach_lora
from job.tune.model.config import load_tokenizer, read_config

PRODUCT, PLAIN = "the product", "plain loop"
WINDOW = 20
"""Steps that a smoothed value is the mean of."""
WARM_UP = 10
"""Steps in which the learning rate rises."""


def product_curve(recipe, engine, device):
    """Loss of each of the product's own steps."""
    with tempfile.TemporaryDirectory(prefix="loss-curve-") as folder:
        loaded = load(recipe, engine, device, Path(folder))
        return [record.loss for record in loaded.steps(loaded.state(loaded.planned), loaded.course)]


def plain_curve(recipe, device, *, seed):
    """Loss of each step of the plain loop; the adapter's first values are those that the product draws by this seed."""
    base, train = Path(recipe.model.base), recipe.train
    examples = encode(recipe, base)
    course = plan_course(
        examples=len(examples), batch_size=train.batch_size, steps=train.steps, epochs=None, seed=train.seed
    )
    model = plain.load_base(base, device)
    model = attach_lora(model, recipe.lora, source=str(base), revision=None, seed=seed)
    batches = ([examples[i] for i in course.batch(step)] for step in range(1, train.steps + 1))
    settings = {"steps": train.steps, "learning_rate": train.learning_rate, "warmup_steps": train.warmup_steps}
    return list(plain.train(model, batches, max_grad_norm=train.max_grad_norm, **settings))


def encode(recipe, base):
    """(token ids, place of the first target) of each example, by nothing but the tokenizer."""
    tokenizer, data = load_tokenizer(base), recipe.data
    limit = min(data.max_length, read_config(base).max_position_embeddings)
    lines = [line for path in data.train for line in Path(path).read_text(encoding="utf-8").split("\n") if line.strip()]
    texts = [data.text.format(**json.loads(line)) for line in lines]
    return [([*ids, tokenizer.eos_token_id][:limit], 1) for ids in tokenizer(texts).input_ids]


def other_seed(number):
    """What the plain loop's curve from another seed is called."""
    return f"plain loop, seed + {number}"


def smooth(curve):
    """Means of WINDOW steps, or of all where there are fewer."""
    window = min(WINDOW, len(curve))
    return np.convolve(curve, np.ones(window) / window, mode="valid")


def apart(one, other):
    """Mean absolute difference of two smoothed curves, in nats a target."""
    return float(np.abs(smooth(one) - smooth(other)).mean())


def draw(curves, path):
    """Smoothed curves above, their distance from the plain loop below."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 7), sharex=True, height_ratios=(2, 1), layout="constrained")
    styles = {PRODUCT: ("-", 3.0), PLAIN: ("--", 1.5)}
    steps = np.arange(len(smooth(curves[PLAIN]))) + len(curves[PLAIN]) - len(smooth(curves[PLAIN])) + 1
    for name in curves:
        line, width = styles.get(name, (":", 1.5))
        above.plot(steps, smooth(curves[name]), line, linewidth=width, label=name)
        below.plot(steps, smooth(curves[name]) - smooth(curves[PLAIN]), line, linewidth=width)
    above.set_ylabel("loss, nats a target")
    above.legend()
    below.set_ylabel("minus the plain loop's")
    below.set_xlabel(f"step (mean of the {WINDOW} up to it)")
    for axes in (above, below):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def summary(curves):
    """The table and the verdict."""
    rows = [
        (name, *(f"{curve[step - 1]:.4f}" for step in _shown(curve)), f"{apart(curve, curves[PLAIN]):.5f}")
        for name, curve in curves.items()
    ]
    steps = [f"step {step}" for step in _shown(curves[PLAIN])]
    product = apart(curves[PRODUCT], curves[PLAIN])
    seeds = [apart(*pair) for pair in itertools.combinations([c for name, c in curves.items() if name != PRODUCT], 2)]
    verdict = "within" if product <= max(seeds) else "NOT within"
    return (
        table(("loss, nats a target", *steps, "from the plain loop, smoothed"), rows)
        + f"\n\nThe product is {product:.5f} from the plain loop, two seeds of it {min(seeds):.5f} to {max(seeds):.5f} "
        f"from each other: {verdict} it."
    )


def _shown(curve):
    """Five steps from the first to the last."""
    return sorted({1 + round(part * (len(curve) - 1)) for part in (0, 0.25, 0.5, 0.75, 1)})


def measure(recipe, engine, device, kept, *, seeds):
    """All curves, the plain loop's also for `seeds` other seeds; `kept` is a file that has some of them, or None."""
    curves = json.loads(kept.read_text()) if kept is not None and kept.exists() else {}
    seed = recipe.train.seed
    makers = {
        PRODUCT: lambda: product_curve(recipe, engine, device),
        PLAIN: lambda: plain_curve(recipe, device, seed=seed),
    }
    for number in range(1, seeds + 1):
        makers[other_seed(number)] = partial(plain_curve, recipe, device, seed=seed + number)
    for name in [name for name in makers if name not in curves]:
        curves[name] = makers[name]()
        print(f"{name}: {curves[name][0]:.4f} to {curves[name][-1]:.4f}", flush=True)
        if kept is not None:
            kept.write_text(json.dumps(curves))
        gc.collect()  # a model holds itself in circles; the next one needs its room
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return {name: curves[name] for name in makers}


def main(arguments=None):
    parser = parser_of(__doc__)
    parser.add_argument("--max-length", type=int, default=512, help="tokens of an example")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=16, help="examples of a step")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seeds", type=int, default=3, help="other seeds of the plain loop")
    parser.add_argument("--engine", choices=["auto", "fast", "generic"], default="auto")
    parser.add_argument("--curves", type=Path, metavar="FILE", help="JSON: what is there is not measured again")
    parser.add_argument("--plot", type=Path, help="PNG; beside the results without it")
    options = parser.parse_args(arguments)
    recipe = recipe_of(
        options.base,
        options.train,
        text=options.text,
        max_length=options.max_length,
        head=False,
        batch_size=options.batch,
        learning_rate=options.learning_rate,
        steps=options.steps,
        warmup_steps=min(WARM_UP, options.steps - 1),
        optimizer="adamw_torch",
    )
    curves = measure(recipe, options.engine, choose_device(options.device), options.curves, seeds=options.seeds)
    name = f"loss-curve-{options.base.name}-{options.engine}"
    plot = options.plot or options.results.parent / f"{name}.png"
    draw(curves, plot)
    about = (
        f"{options.base.name}, NF4, LoRA r {recipe.lora.r} on the seven projections, {options.steps} steps of "
        f"{options.batch} examples, AdamW at {options.learning_rate:g}, the product by `--engine {options.engine}`."
    )
    heading = f"## The loss, step by step, beside the plain loop's: {options.base.name}, `{options.engine}`"
    command = (
        f"    python -m bench.loss_curve --base FOLDER --train TRAIN.jsonl --engine {options.engine} "
        f"--batch {options.batch} --steps {options.steps} --learning-rate {options.learning_rate:g} "
        f"--seeds {options.seeds}"
    )
    text = f"{device_and_versions()}\n\n{about}\n\n{summary(curves)}\n\n![losses]({plot.name})"
    print(text)
    write_section(options.results, name, f"{heading}\n\n{command}\n\n{text}")


if __name__ == "__main__":
    main()
