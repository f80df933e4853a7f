"""Writes docs/models.md: every family that the tests train and how, and every layout of a base and what becomes of it.

python tests/tune/models_page.py
"""

import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "models.md"
if __name__ == "__main__":
    os.environ["TQDM_DISABLE"] = "1"
    sys.path[:0] = [str(ROOT), str(Path(__file__).parent), str(ROOT / "tests" / "run")]

from layout_table import LAYOUTS, ROWS, outcome_of, token_beyond  # noqa: E402 - found where the lines above look
from tiny_families import FAMILIES, config_of  # noqa: E402 - found where the lines above look
from tiny_wrappers import WRAPPED, whole_class_of, whole_config_of  # noqa: E402 - as above
from transformers import CONFIG_MAPPING  # noqa: E402 - as above

from job.tune.engines import families  # noqa: E402 - as above
from job.tune.model.adapter import chosen_by_all_linear  # noqa: E402 - as above
from job.tune.model.config import empty_model  # noqa: E402 - as above
from job.tune.model.mixtures import experts_in, experts_in_four_bits  # noqa: E402 - as above
from job.tune.model.wrappers import Wrapper, text_config_of  # noqa: E402 - as above

_HEAD = """\
<!-- Written by `make docs` from tests/tune/tiny_families.py and tests/run/layout_table.py; change it there. -->

# The models

Each row is a family of decoders, by transformers' `model_type`, that the tests build tiny and random and train beside
plain transformers, bitsandbytes and PEFT, which get one document at a time: the loss of every token is the same to 1e-4
and every gradient of the adapter to 1e-3, in fp32 on the CPU. Documents are longer than every window, chunk and
original length in their configs, others beside them are shorter; whatever stands beside a document, its losses are the
same to the bit: packed, whatever the length of the others, else in rows of the same length. What the base is in 4 bits
is read again from its copy to the bit. `make test-families` runs them all.

*Hand-written*: on a GPU the fast engine trains it; elsewhere, and where that does not fit, it is packed. *Packed*:
documents stand in one row without padding, and none sees another; on a GPU layers are compiled where attention is
neither capped nor dropped, and there are no experts. *One document a row*: documents of like lengths, each with a row
to itself, are padded behind their ends, by an eighth at most, and go through the decoder together; attention is
transformers' own, but ours in the families that can be packed with kernels, and nothing is compiled. Other tokens
beside a document change no bit of its losses; another length of the rows may round them otherwise. *One at a time*: the
decoder gets one such row after another, as padding would change something: a rotation that depends on the length, or
products of experts that are not ours. *Packed with* some packages: one document a row without them; with them packed,
if the checks at the start of a run find documents apart. Of the packages the image has fla alone
([hybrids.md](hybrids.md)). The tests have transformers' own code in the place of those kernels. A family that is not in
this table trains one document a row, if `check` on a small random copy of its config, and the checks at the start of a
run, find its loss right; where they find that rows change each other, one at a time. The adapter opens with
`PeftModel.from_pretrained` on the class that is named: each run ends by proving that.

Layers' linear modules are in 4 bits, to the bit as plain transformers with `BitsAndBytesConfig` has them, but for
those whose weight its code multiplies past the module; embeddings, head, norms and the other small tensors never are.
*Experts* of a mixture are in 4 bits too: each expert's two matrices are quantised by themselves, to the bit as
bitsandbytes quantises them in a linear layer, and plain transformers and PEFT, which keep experts in 16 bits, get the
values that those stand for. `lora.targets: [all-linear, experts]` gives each expert factors of its own, under the
names that PEFT's `target_parameters` opens; routers get none, and no load-balancing loss is added. gpt-oss as it is
published, its experts in MXFP4, gives to the bit what its decoded base in bf16 gives. Where experts stay *in 16 bits*,
a mixture with more than 8 GiB of them is refused by `check`, with its size. A Llama 4 mixture that is published in 4
bits is refused: transformers makes other experts of such files than of those in 16 bits. Dense and shared MLPs of a
mixture get an adapter from `all-linear` but in families where PEFT takes the names of their modules for the experts:
the row shows it.

"""
_COLUMNS = (
    *("family", "model_type", "how it trains", "as plain PEFT", "documents apart", "experts"),
    *("`all-linear` adapts", "adapter opens on"),
)
_LAYOUTS = """\

## The layouts of a base

What is trained, and what is refused, with the exit code and the sentence: by `check` from the configuration and the
headers of the files, before anything is fetched whole; NaN and infinity when the weights are loaded. Each row is
written by the tests from one tiny Llama, or a tiny gpt-oss, called BASE here. What is trained is the plain model's to
the bit where the layout holds the same numbers.

| layout | exit | what becomes of it |
|---|--:|---|
"""
_SHOWN = 800
"""Characters of a sentence."""

_WRAPPERS = """
## Models of more than text

Of these the text decoder is trained, and nothing else is loaded: what takes pictures or sound stays in its files, and
no memory is planned for it. `all-linear` means the decoder's. The adapter has the names of the class that publishes the
whole model: PEFT puts it on that (`AutoModelForImageTextToText`), where it gives the loss that the report names, which
each run tries when it begins, and when it proves the published adapter. The tests hold losses and gradients against the
whole model with PEFT's adapter on it, as above; names of the tensors as today's and earlier versions of transformers
write them, whole models that are published in 4 bits, with their towers in 4 bits or not, and copies are tried as well.
Others are refused by `check`, by name.

Of Qwen 3.5, `AutoModelForCausalLM` makes the decoder alone, whose names are others: the adapter is for the whole model.

| model | model_type | adapter opens on | text decoder | how it trains | not loaded |
|---|---|---|---|---|---|
"""


def page() -> str:
    """What docs/models.md should be."""
    families_table = _table([_COLUMNS, ("---",) * len(_COLUMNS), *sorted(_rows())])
    return _HEAD + families_table + _WRAPPERS + _table(sorted(_wrapper_rows())) + _LAYOUTS + _table(_layouts())


def _table(rows: Iterable[tuple[str, ...]]) -> str:
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def _layouts() -> Iterator[tuple[str, ...]]:
    with tempfile.TemporaryDirectory() as scratch:
        for name in LAYOUTS:
            yield _layout(name, *outcome_of(name, Path(scratch)))
    yield _layout(f"a tokenizer that knows more tokens than the {ROWS} rows, none of them in the data", 0, "trained")
    yield _layout("the same, and the data has such a token", *token_beyond())
    yield _layout("more rows than the tokenizer knows tokens", 0, "trained")


def _layout(name: str, code: int, said: str) -> tuple[str, ...]:
    return name, str(code), said.replace("|", "\\|").replace("<", "&lt;")[:_SHOWN]


def _wrapper_rows() -> Iterator[tuple[str, ...]]:
    for name, (model_type, _) in WRAPPED.items():
        config = whole_config_of(name)
        text, left_out = text_config_of(config), Wrapper(config).left_out()
        beside = ", ".join(part.removeprefix("model.") for part in left_out) or "-"
        kinds = f"`{model_type}`", whole_class_of(config).__name__, f"`{text.model_type}`"
        yield name, *kinds, _how(empty_model(text)), beside


def _rows() -> Iterator[tuple[str, ...]]:
    for name, (model_type, _) in FAMILIES.items():
        if not hasattr(CONFIG_MAPPING[model_type](), "num_attention_heads"):
            continue  # `check` refuses what is published of it: the plan goes by attention's sizes
        model = empty_model(config_of(name))
        chosen = chosen_by_all_linear(model)
        adapted = "all but the head" if chosen is None else ", ".join(chosen)
        opens = f"`{type(model).__name__}`"
        parity = "losses 1e-4, gradients 1e-3"
        yield name, f"`{model_type}`", _how(model), parity, "to the bit", _experts(model), adapted, opens


def _experts(model: Any) -> str:
    if not experts_in(model):
        return "-"
    return "in 4 bits" if experts_in_four_bits(model) == experts_in(model) else "in 16 bits"


def _how(model: Any) -> str:
    rows, kernels = families.rows_of(model), families._KERNELS.get(model.config.model_type)
    if rows == "packed":
        return "hand-written" if families.is_supported(model.config) else "packed"
    if rows == "padded" and kernels:
        return f"one document a row; packed with {', '.join(kernels)}"
    return "one document a row" if rows == "padded" else "one at a time"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
