"""Before the first step: is the loss the model's own and causal, is a pack isolated, does every adapter learn?

Each of these has failed silently in a known tool; here each ends the job before it costs anything. An engine, with our
linear layers, attention and loss in it, is compared with PEFT's own layers on the same documents; what differs is left
out.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from types import MappingProxyType
from typing import Any

import structlog
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from job.core.data.packing import Rows
from job.core.errors import JobError, UsageError
from job.tune.data.micro_batch import MicroBatch
from job.tune.data.trial_documents import Text, one_row, trial_documents
from job.tune.device.failures import error_line
from job.tune.engines.engine import Engine
from job.tune.engines.families import IN_WORDS, layers_across
from job.tune.engines.packed_model import PackedModel
from job.tune.model.adapter import trainable
from job.tune.model.config import tokens_beyond
from job.tune.model.wrappers import Wrapper

log = structlog.get_logger(__name__)

_TOLERANCE = 0.05
"""Mean difference of a token's loss between our forward and the model's own, as a share of the mean loss; of a nat,
where the mean is less: a base that knows its text by heart has a loss of nearly nothing.

Token by token: over a document differences would cancel. In bf16 at most 0.0007 is seen on the CPU.
"""
_OWN_LOSS_TOLERANCE = 0.01
"""The same where the layers are PEFT's on both sides, and no rounding can choose another expert: a window that is not
handed on moves the loss by 0.017. Where one rounding of the embedding moves the losses by more, as in a deep base of
random weights whose attention is sharp, twice that, and at most `_TOLERANCE`."""
_ROUNDING_TIMES, _MOST_BY_ROUNDING = 2, 0.8
"""The most is of a gradient's direction or norm; another gradient is further away."""
_DIRECTION_TOLERANCE = 0.35
"""Distance of an adapter's gradients by two engines, each scaled to a norm of 1. In bf16 with random weights they are
up to 0.18 apart, and as far from fp32; in fp32 1e-5. A gradient of something else is more than 1 away.
"""
_LAYER = re.compile(r"\.\d+\.")
"""A layer's number in the name of its adapter."""
_NORM_TOLERANCE = 0.05
"""Ratio of their norms less 1, over all layers' adapters of one kind: rounding turns a gradient and hardly lengthens
it, at most by 0.02, while a wrong scale does nothing else."""
_MOST_OF_A_KIND = 0.4
"""The most that rounding can make of it, where it sends tokens to other experts: half and twice are a wrong scale."""
_ONE_NORM_TOLERANCE = 0.15
"""The same of one adapter alone, which rounding moves by up to 0.06."""


def check_model(model: PackedModel, text: Text = ()) -> None:
    """Run the four checks on documents of text; random generators and gradients are left as they were.

    They concern the architecture, in PEFT's own layers; `difference` finds out whether ours may replace those.

    Raises:
        UsageError: this architecture cannot be trained by this job; the message says what is wrong.
    """
    device = next(model.parameters()).device
    with _undisturbed(model, device), model.as_peft_has_it():
        documents = _in_right_rows(model, device, text)
        with _refusing_what_does_not_run(model, device):
            _check_gradients(model, documents)


def find_rows(model: PackedModel, text: Text = ()) -> None:
    """Have a model that is only judged take its documents in the rows that `check_model` would find right.

    Raises:
        UsageError: as `check_model`.
    """
    if _slower_rows(model) is not None:
        device = next(model.parameters()).device
        with _undisturbed(model, device), model.as_peft_has_it(), torch.no_grad():
            _in_right_rows(model, device, text)


def _in_right_rows(model: PackedModel, device: torch.device, text: Text) -> list[Tensor]:
    """Try the model's rows, and slower ones where a document does not stand right in them; returns the documents."""
    while True:
        try:
            with _refusing_what_does_not_run(model, device):
                documents = _documents(model, device, text)
                _check_rows(model, documents)
        except UsageError as error:
            slower = _slower_rows(model)
            if slower is None:
                raise
            log.warning("document_rows", reason=str(error), then=IN_WORDS[slower])
            model.take_rows(slower)
        else:
            return documents


def _slower_rows(model: PackedModel) -> Rows | None:
    """What is tried where documents do not stand right in their rows; None: the model is refused."""
    if model.is_packed:
        return "padded" if model.linears.experts or model.kernels_by_borders else None
    return "alone" if model.rows == "padded" else None


def check_whole(model: PackedModel, wrapper: Wrapper | None, text: Text = ()) -> None:
    """On a decoder that was taken out of a multimodal model: does that compute the same, where there is only text?

    Args:
        model: the decoder with its adapter.
        wrapper: the multimodal model; None: the base is a language model alone, and nothing is looked at.
        text: what to try it with.

    Raises:
        UsageError: it computes something else, so an adapter trained on the decoder would be another one there.
    """
    if wrapper is None:
        return
    device = next(model.parameters()).device
    with _undisturbed(model, device), model.generating() as ours, torch.no_grad():
        document = _documents(model, device, text)[0]
        whole = wrapper.around(ours.get_base_model())
        with nullcontext() if model.sharded is None else model.sharded.asked_by(wrapper.decoder):
            alone, inside = (
                cross_entropy(each(input_ids=document[None], use_cache=False).logits[0, :-1].float(), document[1:])
                for each in (ours, whole)
            )
    if not abs(inside - alone) <= _OWN_LOSS_TOLERANCE * alone:  # so that NaN fails too
        raise UsageError(
            f"{wrapper.architecture}: its loss on text is {float(inside):.4f} where its text decoder alone, which this "
            f"job trains, has {float(alone):.4f}; use another base"
        )


@contextmanager
def _refusing_what_does_not_run(model: PackedModel, device: torch.device) -> Iterator[None]:
    """On the CPU; what a GPU raises may be the GPU's."""
    try:
        yield
    except JobError:
        raise
    except Exception as error:
        if device.type != "cpu" and isinstance(error, RuntimeError):
            raise
        raise UsageError(
            f"{_name(model)}: its code in transformers does not run on documents ({error_line(error)}); "
            "use another base"
        ) from error


def _name(model: PackedModel) -> str:
    return type(model.model.get_base_model()).__name__


def _config(model: PackedModel) -> Any:
    return model.model.get_base_model().config


@contextmanager
def _undisturbed(model: PackedModel, device: torch.device) -> Iterator[None]:
    """Without dropout; random generators, gradients and mode are left as they were."""
    was_training = model.training
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        model.eval()
        try:
            yield
        finally:
            model.zero_grad(set_to_none=True)
            model.train(was_training)


def difference(model: PackedModel, engine: Engine, reference: Engine, text: Text = ()) -> str | None:
    """How an engine differs from another one in PEFT's own layers, on documents of text and with a moved adapter.

    An engine may be its own reference: then our layers in it are compared with PEFT's. Random generators, the adapter
    and its gradients are left as they were.

    Returns:
        The first difference that rounding does not explain; None where there is none.
    """
    device = next(model.parameters()).device
    with _undisturbed(model, device), _moved_adapter(model, engine, reference):
        documents = _documents(model, device, text)
        batch = one_row(documents)
        with model.as_peft_has_it():  # ours would agree with themselves
            theirs, their_gradients = _losses_and_gradients(model, reference, batch)
        ours, our_gradients = _losses_and_gradients(model, engine, batch)
        off = float(_share(ours - theirs, theirs))
        if not off <= _TOLERANCE:
            return f"a token's loss differs by {off:.1%}"
        against = _gradient_difference(our_gradients, their_gradients)
        if against is not None:  # a last bit is much later on: many layers further, or where it chooses another expert
            jumps = bool(model.linears.experts or layers_across(model.model.get_base_model()))
            with model.as_peft_has_it(), _rounded_embedding(model.model.get_base_model()):
                rounded = _losses_and_gradients(model, reference, batch)[1]
            against = _gradient_difference(our_gradients, their_gradients, rounded, jumps=jumps)
            if against is not None:
                return against
        other = one_row([torch.roll(documents[0], 1), *documents[1:]])
        kept = slice(len(documents[0]) - 1, None)
        if not torch.equal(_losses_and_gradients(model, engine, other)[0][kept], ours[kept]):
            return "a document changes its neighbour"
    return None


def _gradient_difference(
    ours: Mapping[str, Tensor],
    theirs: Mapping[str, Tensor],
    rounded: Mapping[str, Tensor] = MappingProxyType({}),
    *,
    jumps: bool = False,
) -> str | None:
    """Direction and norm are compared apart: a gradient that is too long points the right way.

    `rounded` are theirs with the embedding rounded otherwise: a direction may be twice as far away as that turns it,
    and a norm differ by twice what it lengthens, or, where a token may jump to another expert, by what it moves.
    """
    moved = {name: each - theirs[name] for name, each in rounded.items() if name in theirs} if jumps else {}
    for name, gradient in theirs.items():
        if name not in ours:
            return f"{name} gets no gradient"
        turned, ratio = _apart(ours[name], gradient)
        turn, length = _apart(rounded[name], gradient) if name in rounded else (0.0, 1.0)
        if not turned <= _allowed(_DIRECTION_TOLERANCE, _ROUNDING_TIMES * turn):  # so that NaN fails too
            return f"the gradient of {name} points elsewhere (by {turned:.1%})"
        share = float(moved[name].norm() / gradient.norm()) if name in moved else 0.0
        if abs(ratio - 1) > _allowed(_ONE_NORM_TOLERANCE, max(_ROUNDING_TIMES * abs(length - 1), share)):
            return f"the gradient of {name} is {ratio:.2f} times as large"
    most = max((abs(ratio - 1) for ratio in _ratios_by_kind(rounded, theirs).values()), default=0.0)
    shares = _ratios_by_kind(moved, theirs)
    for kind, ratio in _ratios_by_kind(ours, theirs).items():
        by_rounding = max(_ROUNDING_TIMES * most, shares.get(kind, 0.0))
        if abs(ratio - 1) > min(_allowed(_NORM_TOLERANCE, by_rounding), _MOST_OF_A_KIND):
            return f"the gradient of all {kind} is {ratio:.2f} times as large"
    return None


def _ratios_by_kind(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> dict[str, float]:
    """How many times as long gradients are, over all layers' adapters of one kind."""
    squares: dict[str, list[float]] = {}
    for name in (name for name in theirs if name in ours):
        of_its_kind = squares.setdefault(_LAYER.sub(".", name), [0.0, 0.0])
        of_its_kind[0] += float(ours[name].norm()) ** 2
        of_its_kind[1] += float(theirs[name].norm()) ** 2
    return {kind: math.sqrt(mine / their_own) for kind, (mine, their_own) in squares.items()}


def _apart(one: Tensor, other: Tensor) -> tuple[float, float]:
    """How far two gradients' directions are apart, and how many times as long the first one is."""
    norms = one.norm(), other.norm()
    return float((one / norms[0] - other / norms[1]).norm()), float(norms[0] / norms[1])


def _allowed(tolerance: float, by_rounding: float) -> float:
    return max(tolerance, min(by_rounding, _MOST_BY_ROUNDING))


@contextmanager
def _moved_adapter(model: PackedModel, *engines: Engine) -> Iterator[None]:
    """With lora_B at random values: while it is zero, as at the start, lora_A has no gradient."""
    before = [parameter.detach().clone() for parameter in trainable(model)]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_B" in name:
            parameter.data.normal_(std=0.01)
    for engine in engines:
        engine.refresh()
    try:
        yield
    finally:
        for parameter, old in zip(trainable(model), before, strict=True):
            parameter.data.copy_(old)
        for engine in engines:
            engine.refresh()


def _losses_and_gradients(model: PackedModel, engine: Engine, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    losses = engine.accumulate(batch, targets=batch.targets, seed=0)
    return losses, {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def _documents(model: PackedModel, device: torch.device, text: Text) -> list[Tensor]:
    config = _config(model)
    return trial_documents(
        text, at_least=tokens_beyond(config), vocabulary=config.vocab_size, rows=model.rows, device=device
    )


def _share(difference: Tensor, losses: Tensor) -> Tensor:
    """Mean size of differences of losses, as a share of the mean loss or, where that is less, of a nat."""
    return difference.abs().mean() / losses.mean().clamp(min=1.0)


def _mean(difference: Tensor) -> float:
    return float(difference.abs().mean())


@torch.no_grad()
def _check_loss(model: PackedModel, document: Tensor) -> float:
    """Returns the share of the loss that two right computations may be apart."""
    ours = model(one_row([document]))
    with model.generating() as own:
        theirs, rounded = _own_losses(own, document), _own_losses(own, document, rounded=True)
    tolerance = min(max(_OWN_LOSS_TOLERANCE, _ROUNDING_TIMES * float(_share(rounded - theirs, theirs))), _TOLERANCE)
    if not _share(ours - theirs, theirs) <= tolerance:  # so that NaN fails too
        raise UsageError(
            f"{_name(model)}: the loss of this job is {float(ours.mean()):.4f} where the model's own is "
            f"{float(theirs.mean()):.4f} (a token differs by {_mean(ours - theirs):.4f}), so it does something that "
            "this job does not know; use another base"
        )
    return tolerance


@contextmanager
def _rounded_embedding(model: Any) -> Iterator[None]:
    """Meanwhile with each number of the embedding moved by its last bit: what that changes, rounding alone can."""

    def moved(_module: Any, _inputs: Any, embedding: Tensor) -> Tensor:
        up = torch.randint(0, 2, embedding.shape, device=embedding.device) * 2 - 1
        return embedding + embedding * up * torch.finfo(embedding.dtype).eps

    hook = model.get_input_embeddings().register_forward_hook(moved)
    try:
        yield
    finally:
        hook.remove()


def _own_losses(own: Any, document: Tensor, *, rounded: bool = False) -> Tensor:
    """[tokens - 1], by the model's own code; rounded: as `_rounded_embedding` does."""
    with _rounded_embedding(own) if rounded else nullcontext():
        logits: Any = own(input_ids=document[None], use_cache=False).logits[0, :-1]
    return cross_entropy(logits.float(), document[1:], reduction="none")


@torch.no_grad()
def _check_order(model: PackedModel, document: Tensor) -> None:
    """A token is predicted from those before it: models that fill gaps see it, and would seem to learn at once."""
    other = document.clone()
    other[-1] = (document[-1] + 1) % _config(model).vocab_size
    before, after = (model(one_row([each]))[:-1] for each in (document, other))
    if not _share(before - after, before) <= _OWN_LOSS_TOLERANCE:
        raise UsageError(
            f"{_name(model)}: a token changes the losses of those before it (by {_mean(before - after):.4f}), so the "
            "model looks ahead and is no causal language model; use another base"
        )


def _check_rows(model: PackedModel, documents: Sequence[Tensor]) -> None:
    """Of a mixture by our products of its experts: to transformers' a token's neighbours are a matter of last bits."""
    with model.linears.experts.ours():
        _check_order(model, documents[1])
    tolerance = _check_loss(model, documents[0])
    with model.linears.experts.ours():
        _check_isolation(model, documents, tolerance)


@torch.no_grad()
def _check_isolation(model: PackedModel, documents: Sequence[Tensor], tolerance: float) -> None:
    before = model(one_row(documents))
    other = [torch.roll(documents[0], 1), *documents[1:]]
    after = model(one_row(other))
    kept = slice(len(documents[0]) - 1, None)
    if model.rows == "padded":
        here, reference = before, torch.cat([model(one_row([each])) for each in documents])
        if not _share(here - reference, reference) <= tolerance:
            raise UsageError(
                f"{_name(model)}: padding behind a document changes its loss (a token differs by "
                f"{_mean(here - reference):.4f}), so its layers look at padding; use another base"
            )
    else:
        # Without the longest one the row has another size, which may round otherwise: no bits are compared.
        here, reference = before[kept], model(one_row(documents[1:]))
    if not torch.equal(before[kept], after[kept]) or not _share(here - reference, reference) <= tolerance:
        raise UsageError(
            f"{_name(model)}: a document changes its neighbour in a {model.rows} micro-batch, "
            "so its layers look across documents; use another base"
        )


def _check_gradients(model: PackedModel, documents: Sequence[Tensor]) -> None:
    batch = one_row(documents)
    torch.autograd.backward(model.summed_loss(batch, weight_per_target=1 / batch.targets)[0])
    # lora_B starts at zero, which keeps lora_A's first gradient at zero too: B stands for both.
    dead = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and "lora_B" in name and (parameter.grad is None or not parameter.grad.any())
    ]
    if dead:
        raise UsageError(
            f"lora.targets: no gradient reaches {', '.join(dead[:3])} ({len(dead)} in all); leave it out of the list"
        )
