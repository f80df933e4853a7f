"""The adapted model as engines and evaluation see it: a micro-batch in, the loss of each target out."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from job.tune.data.micro_batch import MicroBatch
from job.tune.engines.attention import PER_DOCUMENT, register
from job.tune.engines.attention_choice import AttentionChoice, choose_attention
from job.tune.engines.decoder_inputs import decoder_inputs, rotate_by_document, rotating_by_length
from job.tune.engines.families import is_packed
from job.tune.engines.layers import LayerForwards
from job.tune.engines.linears import FusedLinears
from job.tune.engines.loss import Head, head_of, summed_loss, token_losses, token_scores


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentScores:
    """Held-out result of the documents of one micro-batch, on the host."""

    nll: list[float]
    """Summed loss of each document, in nats."""
    correct: int
    """Targets that were the model's first choice."""


class PackedModel(nn.Module):
    """The adapted model with our attention, linear layers and loss in it, and its layers compiled or not."""

    def __init__(self, model: PeftModel) -> None:
        super().__init__()
        self.model = model
        register()
        self.is_packed = is_packed(self._causal_lm())
        """Whether the decoder gets a row of documents; else one document at a time, by transformers' own attention."""
        self._attend()
        rotate_by_document(model)
        self.linears = FusedLinears(model)
        self.layers = LayerForwards(self._causal_lm())

    @cached_property
    def attention(self) -> AttentionChoice:
        """Whose attention kernels it runs; ours are tried when this is first read."""
        return choose_attention(self._causal_lm().config, next(self.parameters()).device)

    def _causal_lm(self) -> Any:
        return self.model.get_base_model()

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
            lengths = list(batch.document_lengths)
            rows = zip(
                *(torch.split(part, lengths, dim=1) for part in (batch.input_ids, batch.position_ids)), strict=True
            )
            alone = [decoder(input_ids=ids, position_ids=at, use_cache=False).last_hidden_state for ids, at in rows]
            return torch.cat(alone, dim=1)[0].index_select(0, batch.target_places)
        compiled = self.layers.compiled and torch.is_grad_enabled()
        inputs = decoder_inputs(batch, in_blocks=self.attention.own, for_compiled_code=compiled)
        states: Tensor = decoder(**inputs, use_cache=False).last_hidden_state
        return states[0].index_select(0, batch.target_places)

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
            with self.linears.as_peft_has_them():
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

    def _attend(self) -> None:
        causal_lm = self._causal_lm()
        causal_lm.set_attn_implementation(PER_DOCUMENT if self.is_packed else _own_attention(causal_lm))


def _decoder_of(causal_lm: Any) -> Any:
    """What makes hidden states of tokens; Llama 4 does not have it under the name that it gives."""
    decoder = getattr(causal_lm, causal_lm.base_model_prefix, None)
    return causal_lm.model if decoder is None else decoder


def _own_attention(causal_lm: Any) -> str:
    capped = getattr(causal_lm.config, "attn_logit_softcapping", None) is not None
    return "eager" if capped or not causal_lm._supports_sdpa else "sdpa"  # noqa: SLF001 - transformers has no other word
