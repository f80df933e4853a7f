"""What a base's weights are, by the headers of their files: held to its config before they move, and said in a line."""

from dataclasses import dataclass

from job.core.base.mxfp4 import form_with_experts, is_mxfp4
from job.core.base.promises import form_in_files
from job.edge.base import fetching
from job.edge.base.fetching import BaseModel
from job.edge.store.patience import Patience
from job.stages.attempt import Worker
from job.tune.model.config import read_whole_config
from job.tune.model.promises import hold_to_promises
from job.tune.model.wrappers import parts_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """What the files hold."""

    form: str
    """`bf16`, or in which 4 bits they are published, and how many layers or tensors of them."""
    left: list[str] | None
    """Linear modules that are not in the 4 bits in which they are published; None: they are not in 4 bits."""
    tensors: int
    bytes: int
    read_bytes: int
    """Of those that are loaded: all of them, or a multimodal model's text decoder."""
    here: bool
    """Whether they need not be fetched."""

    def __str__(self) -> str:
        where = "on this machine" if self.here else "to fetch"
        part = "" if self.read_bytes == self.bytes else f", {self.read_bytes / 1e9:,.2f} GB of it the text decoder's"
        return f"{self.tensors:,} tensors, {self.bytes / 1e9:,.2f} GB {where}{part}; {self.form}"


def look_at_weights(worker: Worker, base: BaseModel, *, patience: Patience | None) -> Weights:
    """Read the headers alone.

    Args:
        worker: has the store's settings and the folder of models.
        base: with its small files on the local disk.
        patience: with a hub or store that fails; None: the one made for it.

    Raises:
        DataError: the weights are not those of the config.
        JobError: as `fetching.fetch`.
    """
    identity = base.identity
    headers = fetching.read_headers(
        identity,
        models_folder=worker.models_folder,
        settings=worker.settings,
        should_stop=worker.should_stop,
        patience=patience,
    )
    left = hold_to_promises(base.folder, headers, source=identity.source)
    config = read_whole_config(base.folder)
    text = parts_of(config, headers).text
    mixed = is_mxfp4(getattr(config, "quantization_config", None), config.model_type)
    return Weights(
        form=(form_with_experts(text) if mixed else None) or form_in_files(text, left),
        left=left,
        tensors=len(headers),
        bytes=sum(header.bytes for header in headers.values()),
        read_bytes=sum(header.bytes for header in text.values()),
        here=fetching.is_here(identity, worker.models_folder),
    )
