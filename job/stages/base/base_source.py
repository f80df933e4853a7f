"""The base of an attempt: its copy in 4 bits where one stands, else its weights, of which a copy is kept."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from job.core.base.promises import TensorHeader
from job.core.errors import LocalDiskError, NotFoundError, UsageError
from job.core.recipe.schema import ModelSection, is_hub_id
from job.edge.base import fetching
from job.edge.base.fetching import BaseModel, BaseModelIdentity, OnProgress
from job.edge.base.quantised_copies import QuantisedCopy
from job.edge.store.objects import StoreSettings
from job.edge.store.opening import open_store
from job.tune.device.compute_dtype import compute_dtype
from job.tune.model.base import (
    can_be_kept,
    has_experts_in_16_bits,
    is_in_four_bits,
    is_quantised,
    quantised_bytes,
    quantised_files,
)
from job.tune.model.four_bit import quantised_form
from job.tune.model.promises import hold_to_promises
from job.tune.model.sharded.streamed_copy import StreamedCopy


def loaded_from(base: BaseModel) -> Literal["weights", "copy in 4 bits"]:
    """What was read to load it, in the report's words."""
    return "copy in 4 bits" if base.quantised else "weights"


def refuse_changed_base(identity: BaseModelIdentity, settings: StoreSettings) -> None:
    """See that the base of a finished run still stands where it stood.

    Raises:
        NotFoundError: another one does.
    """
    if is_hub_id(identity.source):
        return  # the commit says it all
    now = fetching.identify(identity.source, None, settings=settings)
    if now.revision != identity.revision:
        raise NotFoundError(
            f"{identity.source}: another base stands there now than the one this run was trained on "
            f"({identity.revision[:12]}); put the old one back"
        )


class BaseSource:
    """Where one base comes from, for one device."""

    def __init__(
        self,
        identity: BaseModelIdentity,
        model: ModelSection,
        *,
        device: torch.device,
        models_folder: Path,
        settings: StoreSettings,
        should_stop: Callable[[], bool],
    ) -> None:
        """Nothing is looked at yet.

        Raises:
            UsageError: model.quantised_copies is no place.
        """
        self._identity = identity
        self._models_folder, self._settings, self._should_stop = models_folder, settings, should_stop
        place = model.quantised_copies
        self._copy = QuantisedCopy(
            identity,
            quantised_form(device),
            models_folder=models_folder,
            store=None if place is None else open_store(place, settings),
            should_stop=should_stop,
        )

    def fetch_small(self, on_progress: OnProgress) -> Path:
        """The folder with configuration and tokenizer.

        Raises:
            JobError: as `fetching.fetch`.
        """
        return self._copy.find() or self._fetch(on_progress, weights=False).folder

    def fetch(self, on_progress: OnProgress) -> BaseModel:
        """All of it, after `fetch_small`: the copy, or the weights where there is none that is whole.

        Raises:
            JobError: as `fetching.fetch`.
        """
        return self._copy.bring(on_progress) or self._fetch(on_progress, weights=True)

    def refuse_broken_promises(self, small: Path) -> None:
        """Compare what the weights are with what the configuration says, before they are fetched.

        A copy in 4 bits was made from weights that were compared.

        Args:
            small: from `fetch_small`.

        Raises:
            DataError: they do not go together.
            JobError: as `fetching.fetch`.
        """
        if small != self._copy.folder:
            hold_to_promises(small, self._headers(), source=self._identity.source)

    def _headers(self) -> dict[str, TensorHeader]:
        return fetching.read_headers(
            self._identity,
            models_folder=self._models_folder,
            settings=self._settings,
            should_stop=self._should_stop,
        )

    def keep(self, loaded: Any, base: BaseModel, on_beat: Callable[[], None]) -> None:
        """Make a copy for later starts, when the weights were what was loaded.

        Args:
            loaded: from `load_base`, with nothing added to it yet.
            base: what it was loaded from.
            on_beat: called when something moves.
        """
        if base.quantised or is_quantised(base.folder) or not can_be_kept(loaded):
            return
        size = quantised_bytes(loaded)
        self._copy.keep(quantised_files(loaded, base.folder), beside=base.folder, needed_bytes=size, on_beat=on_beat)

    def make_copy(
        self, base: BaseModel, *, device: torch.device, on_beat: Callable[[], None], on_progress: OnProgress
    ) -> BaseModel:
        """A base in 4 bits that is read part by part: as it is, or its copy, made from file to file.

        Args:
            base: from `fetch`.
            device: quantises.
            on_beat: called when something moves.
            on_progress: called while the copy is verified.

        Raises:
            UsageError: it cannot be put into 4 bits without loading it.
            DataError: its weights are not all finite.
            LocalDiskError: the copy could not be written; a warning has said why.
        """
        if base.quantised:
            return base
        if is_in_four_bits(base.folder):
            if has_experts_in_16_bits(base.folder):
                raise UsageError(
                    "--base-placement sharded: the base is in 4 bits, but for its experts, which a single GPU must put "
                    "into them while it is loaded; use GPUs that hold the whole base, or the base in 16 bits"
                )
            return base
        copy = StreamedCopy(base.folder, device=device, dtype=compute_dtype(device))
        self._copy.keep(copy.files(), beside=base.folder, needed_bytes=copy.needed_bytes, on_beat=on_beat)
        copy.check()
        made = None if self._copy.find() is None else self._copy.bring(on_progress)
        if made is None:
            raise LocalDiskError(
                f"{self._copy.folder}: the copy of the base in 4 bits, of which each GPU reads its part, could not be "
                "written; the warning before this says why; give the work folder more room"
            )
        return made

    def _fetch(self, on_progress: OnProgress, *, weights: bool) -> BaseModel:
        return fetching.fetch(
            self._identity,
            models_folder=self._models_folder,
            settings=self._settings,
            should_stop=self._should_stop,
            on_progress=on_progress,
            weights=weights,
        )
