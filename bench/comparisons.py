"""Who is compared with whom, and how each is set up. The first of a comparison is what the others are set beside."""

from dataclasses import dataclass, field
from typing import Any

LONG = "{text}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ours:
    """The product, through its entry point."""

    name: str
    about: str
    engine: str = "auto"
    batch: int = 256
    """Examples of a step."""
    dropout: float = 0.0
    head: bool = True
    """Whether lm_head is adapted too."""
    targets: str | None = None
    """`lora.targets` of its recipe; None: Llama's seven projections, with the head or without."""
    free_gib: float | None = None
    """GiB of the GPU's memory that are free when it starts, where something else holds the rest; None: all of them."""
    training: dict[str, Any] = field(default_factory=dict)
    """Other keys of the recipe's train section."""
    steps: int = 10
    warm_up: int = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Rival:
    """Another tool, by a script of its own."""

    name: str
    about: str
    module: str
    arguments: tuple[str, ...] = ()
    steps: int = 25
    warm_up: int = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Contestants on one kind of data."""

    title: str
    contestants: tuple[Ours | Rival, ...]
    long_documents: bool = False
    max_length: int = 512
    """Tokens of an example."""


_OURS = Ours(name="ours", about="`entrypoint.py run`: batch of 256 examples, dropout 0, lm_head adapted too")
_TUTORIAL = Rival(
    name="tutorial",
    about="the tutorial as written: 2 examples padded to 512, recomputing, dropout 0.05, lm_head adapted too",
    module="bench.rivals.tutorial",
    steps=60,
    warm_up=15,
)
_HF = Rival(
    name="hf-tuned",
    about="transformers' Trainer: 32 examples of like length, nothing recomputed, Liger",
    module="bench.rivals.hf_tuned",
    arguments=("--batch", "32"),
)
_TRL = Rival(
    name="trl-best",
    about="TRL: packed 4 x 4096, flattened, torch's variable-length kernel through us, nothing recomputed, Liger",
    module="bench.rivals.trl_packed",
    steps=16,
)


def _unsloth(name, about, *arguments, steps=16, warm_up=6):
    return Rival(
        name=name,
        about=f"Unsloth: {about}",
        module="bench.rivals.unsloth_sft",
        arguments=arguments,
        steps=steps,
        warm_up=warm_up,
    )


def _unsloth_packed(rows=4):
    return _unsloth(
        "unsloth-best",
        f"packed {rows} x 4096, nothing recomputed, shown torch's variable-length kernel",
        *("--rows", str(rows), "--row-tokens", "4096", "--keep-activations", "--varlen"),
    )


COMPARISONS = {
    "all": Comparison(
        title="Everyone on Llama-2-7B's shape and GSM8K",
        contestants=(
            _OURS,
            Ours(name="ours-no-head", about="the same, lm_head not adapted, as with the rivals", head=False),
            _unsloth_packed(),
            _TRL,
            _HF,
            _unsloth("unsloth-as-it-is", "as it is installed, padding-free, 32 examples", "--rows", "32"),
            _TUTORIAL,
        ),
    ),
    "long": Comparison(
        title="Long documents",
        contestants=(
            Ours(
                name="ours",
                about="`entrypoint.py run`: batch of 128 documents, dropout 0, lm_head adapted too",
                batch=128,
            ),
            _unsloth_packed(),
        ),
        long_documents=True,
        max_length=4096,
    ),
    "batch16": Comparison(
        title="A batch of 16 examples",
        contestants=(
            Ours(name="ours", about="`entrypoint.py run`", batch=16, steps=60, warm_up=15),
            _unsloth(
                "unsloth-best",
                "padding-free, nothing recomputed, shown torch's variable-length kernel",
                *("--rows", "16", "--keep-activations", "--varlen"),
                steps=60,
                warm_up=15,
            ),
        ),
    ),
    "batch2": Comparison(
        title="The tutorial's batch of 2 examples",
        contestants=(
            Ours(
                name="ours",
                about="`entrypoint.py run`: the tutorial's recipe but for dropout, which is 0",
                batch=2,
                training={"learning_rate": 2.5e-5, "optimizer": "paged_adamw_8bit"},
                steps=200,
                warm_up=50,
            ),
            Ours(
                name="ours-dropout",
                about="`entrypoint.py run`: the tutorial's recipe",
                batch=2,
                dropout=0.05,
                training={"learning_rate": 2.5e-5, "optimizer": "paged_adamw_8bit"},
                steps=200,
                warm_up=50,
            ),
            _TUTORIAL,
        ),
    ),
    "dropout": Comparison(
        title="What dropout costs",
        contestants=(_OURS, Ours(name="ours-dropout", about="the same with dropout 0.05", dropout=0.05)),
    ),
    "memory40": Comparison(
        title="In 40 GiB",
        contestants=(
            _OURS,
            Ours(name="ours-40gib", about="the same beside a process that leaves 40 GiB free", free_gib=40),
        ),
    ),
    "mistral": Comparison(title="Mistral-7B's shape", contestants=(_OURS, _unsloth_packed())),
    # 36 layers and 152k words: a fourth row would not fit into 80 GB.
    "qwen3": Comparison(title="Qwen3-8B's shape", contestants=(_OURS, _unsloth_packed(rows=3))),
    "generic": Comparison(
        title="The generic engine",
        contestants=(_OURS, Ours(name="ours-generic", about="the same with `--engine generic`", engine="generic")),
    ),
}
