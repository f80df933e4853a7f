"""What a base's weights are, by the headers of their files: held to its config before they move, and said in a line."""

from dataclasses import dataclass

from job.core.promises import form_in_files
from job.edge.base import fetching
from job.edge.base.fetching import BaseModel
from job.edge.store.patience import Patience
from job.stages.attempt import Worker
from job.tune.model.promises import hold_to_promises


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """What the files hold."""

    form: str
    """`bf16`, or in which 4 bits they are published, and how many layers of them."""
    left: list[str] | None
    """Linear modules that are not in the 4 bits in which they are published; None: they are not in 4 bits."""
    tensors: int
    bytes: int
    here: bool
    """Whether they need not be fetched."""

    def __str__(self) -> str:
        where = "on this machine" if self.here else "to fetch"
        return f"{self.tensors:,} tensors, {self.bytes / 1e9:,.2f} GB {where}; {self.form}"


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
    return Weights(
        form=form_in_files(headers, left),
        left=left,
        tensors=len(headers),
        bytes=sum(header.bytes for header in headers.values()),
        here=fetching.is_here(identity, worker.models_folder),
    )
