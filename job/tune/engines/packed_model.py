"""The adapted model as engines and evaluation see it: a micro-batch in, the loss of each target out."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn

from job.core.data.packing import Rows, alike
from job.core.errors import UsageError
from job.tune.data.micro_batch import MicroBatch
from job.tune.engines.attention import PER_DOCUMENT, has_sinks, register
from job.tune.engines.attention_choice import AttentionChoice, choose_attention
from job.tune.engines.decoder_inputs import decoder_inputs, rotate_by_document, rotating_by_length, row_inputs
from job.tune.engines.families import attends_by_documents, kernels_by_borders, rows_of
from job.tune.engines.layers import LayerForwards
from job.tune.engines.linears import FusedLinears
from job.tune.engines.loss import Head, head_of, summed_loss, token_losses, token_scores
from job.tune.model.mixtures import leave_noise
from job.tune.model.recurrent import leave_fused_paths
from job.tune.model.recurrent_choice import choose_recurrent
from job.tune.model.sharded.layers import ShardedLayers


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentScores:
    """Held-out result of the documents of one micro-batch, on the host."""

    nll: list[float]
    """Summed loss of each document, in nats."""
    correct: int
    """Targets that were the model's first choice."""


class PackedModel(nn.Module):
    """The adapted model with our attention, linear layers and loss in it, and its layers compiled or not."""

    def __init__(self, model: PeftModel, sharded: ShardedLayers | None = None) -> None:
        """Change the model's layers in place.

        Args:
            model: base and adapter.
            sharded: where the layers' weights come from; None: they are there.
        """
        super().__init__()
        self.model = model
        self.sharded = sharded
        register()
        choose_recurrent(self._causal_lm(), next(self.parameters()).device)
        self.rows: Rows = rows_of(self._causal_lm())
        """How the decoder gets documents."""
        self.kernels_by_borders = kernels_by_borders(self._causal_lm())
        """Packages whose kernels keep a row's documents apart in recurrent layers."""
        self._attend()
        rotate_by_document(model)
        self.linears = FusedLinears(model)
        self.layers = LayerForwards(self._causal_lm(), sharded)

    @cached_property
    def attention(self) -> AttentionChoice:
        """Whose attention kernels it runs; ours are tried when this is first read."""
        causal_lm = self._causal_lm()
        return choose_attention(causal_lm.config, next(self.parameters()).device, sinks=has_sinks(causal_lm))

    def _causal_lm(self) -> Any:
        return self.model.get_base_model()

    @property
    def is_packed(self) -> bool:
        """Whether a row holds several documents."""
        return self.rows == "packed"

    def train(self, mode: bool = True) -> "PackedModel":  # noqa: FBT001, FBT002 - torch's signature
        """As torch does, without the fused kernels that pass over adapters, and without noise in routers."""
        super().train(mode)
        leave_fused_paths(self._causal_lm())
        leave_noise(self._causal_lm())
        return self

    @property
    def head(self) -> Head:
        """Hidden states -> logits."""
        return head_of(self._causal_lm())

    def seed_dropout(self, seed: int) -> None:
        """Seed the dropout masks of the next micro-batch, whoever draws them."""
        if self.training:
            torch.manual_seed(seed)  # what PEFT's own layers and attention draw from
            self.linears.seed_masks(seed)

    def hidden(self, batch: MicroBatch) -> Tensor:
        """Last hidden states at the places whose next token is a target: [N, hidden]."""
        decoder = _decoder_of(self._causal_lm())
        if not self.is_packed:
            states, places = self._one_document_a_row(decoder, batch)
            return states.index_select(0, places[batch.target_places])
        compiled = self.layers.compiled and torch.is_grad_enabled()
        inputs = decoder_inputs(
            batch,
            in_blocks=self.attention.own,
            by_borders=bool(self.kernels_by_borders),
            for_compiled_code=compiled,
        )
        row: Tensor = decoder(**inputs, use_cache=False).last_hidden_state
        return row[0].index_select(0, batch.target_places)

    def _one_document_a_row(self, decoder: Any, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Hidden states of rows, one behind the other, and where each token of the micro-batch is among them.

        Padding stands behind a document, where nothing before it can see it: no mask is needed, and attention stays
        plainly causal.
        """
        lengths, device = np.array(batch.document_lengths), batch.input_ids.device
        starts = np.cumsum(lengths) - lengths
        groups = alike(lengths.tolist()) if self.rows == "padded" else [[each] for each in range(len(lengths))]
        places, states, before = np.empty(batch.tokens, dtype=np.int64), [], 0
        for group in groups:
            at = np.arange(lengths[group[0]])  # the longest stands first
            for row, document in enumerate(group):
                start, length = starts[document], lengths[document]
                places[start : start + length] = before + row * len(at) + at[:length]
            before += len(group) * len(at)
            # A document's last token again and again: it costs what any other does, and is no target.
            filled = starts[group][:, None] + np.minimum(at, lengths[group][:, None] - 1)
            ids = batch.input_ids[0][torch.from_numpy(filled).to(device, non_blocking=True)]
            positions = torch.arange(len(at), device=device).expand(len(group), -1)
            ours = {}
            if self._attends_by_documents:
                ours = row_inputs(len(group), len(at), device, in_blocks=self.attention.own)
            hidden: Tensor = decoder(input_ids=ids, position_ids=positions, use_cache=False, **ours).last_hidden_state
            states.append(hidden.flatten(0, 1))
        return torch.cat(states), torch.from_numpy(places).to(device, non_blocking=True)

    def forward(self, batch: MicroBatch) -> Tensor:
        """Loss of each target, in nats: [N] fp32."""
        return token_losses(self.hidden(batch), batch.target_ids, self.head)

    def summed_loss(self, batch: MicroBatch, *, weight_per_target: float) -> tuple[Tensor, Tensor]:
        """The weighted sum of all losses, for its gradients; and each target's loss in nats, [N] fp32, detached."""
        return summed_loss(self.hidden(batch), batch.target_ids, self.head, weight_per_target=weight_per_target)

    @torch.no_grad()
    def score(self, batch: MicroBatch) -> DocumentScores:
        """Summed loss of each document and the number of targets that were the first choice."""
        losses, hits = token_scores(self.hidden(batch), batch.target_ids, self.head)
        nll = [float(part.double().sum()) for part in torch.split(losses.cpu(), list(batch.target_counts))]
        return DocumentScores(nll=nll, correct=int(hits.sum()))

    @contextmanager
    def generating(self) -> Iterator[Any]:
        """The model with transformers' own attention, PEFT's own layers and a cache, for `generate`."""
        causal_lm = self._causal_lm()
        was_training = self.training
        causal_lm.set_attn_implementation(_own_attention(causal_lm))
        causal_lm.config.use_cache = True
        self.eval()
        try:
            with self.linears.as_peft_has_them(experts_too=False):
                yield self.model
        finally:
            causal_lm.config.use_cache = False
            self._attend()
            self.train(was_training)

    @property
    def rotates_by_position(self) -> bool:
        """Whether rotations depend on a token's position alone, and not on how long its document is."""
        return not rotating_by_length(self.model)

    @contextmanager
    def attending(self, name: str) -> Iterator[None]:
        """The model in evaluation mode, with another attention that is registered with transformers."""
        was_training = self.training
        self._causal_lm().set_attn_implementation(name)
        self.eval()
        try:
            yield
        finally:
            self._attend()
            self.train(was_training)

    def states(self, **inputs: Any) -> Tensor:
        """The decoder's last hidden states: [rows, tokens, hidden]; what it does not know goes to the attention."""
        found: Tensor = _decoder_of(self._causal_lm())(**inputs, use_cache=False).last_hidden_state
        return found

    def take_rows(self, rows: Rows) -> None:
        """From now on, for good.

        Raises:
            UsageError: the base is sharded, and its layers are there one after the other, once for each micro-batch.
        """
        if self.sharded is not None and rows != "packed":
            raise UsageError(
                f"{type(self._causal_lm()).__name__}: here it has to train one document a row, which a base that is "
                "sharded does not allow; use GPUs that hold the whole base, and --base-placement replicated"
            )
        self.rows = rows
        self._attend()

    @contextmanager
    def as_peft_has_it(self) -> Iterator[None]:
        """Meanwhile linear layers and experts by PEFT, transformers and bitsandbytes alone.

        These would keep a layer's dequantised experts until the backward, so that all layers are recomputed in it.
        """
        recomputing = self.layers.recomputing
        self.layers.recomputing = recomputing or bool(self.linears.experts)
        try:
            with self.linears.as_peft_has_them():
                yield
        finally:
            self.layers.recomputing = recomputing

    @property
    def _attends_by_documents(self) -> bool:
        """Whether attention is ours, whose gradients have the same bits each time; else transformers' own."""
        return self.is_packed or (self.rows == "padded" and attends_by_documents(self._causal_lm()))

    def _attend(self) -> None:
        causal_lm = self._causal_lm()
        causal_lm.set_attn_implementation(PER_DOCUMENT if self._attends_by_documents else _own_attention(causal_lm))


def _decoder_of(causal_lm: Any) -> Any:
    """What makes hidden states of tokens; Llama 4 does not have it under the name that it gives."""
    decoder = getattr(causal_lm, causal_lm.base_model_prefix, None)
    return causal_lm.model if decoder is None else decoder


def _own_attention(causal_lm: Any) -> str:
    capped = getattr(causal_lm.config, "attn_logit_softcapping", None) is not None
    return "eager" if capped or not causal_lm._supports_sdpa else "sdpa"  # noqa: SLF001 - transformers has no other word
