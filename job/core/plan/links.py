"""How fast GPUs reach each other: by their kind within a host, by the network between hosts."""

from dataclasses import dataclass

_OF_NVLINK, _OF_PCIE, _BY_THE_HOST, _OF_A_NETWORK = 0.8, 0.75, 0.3, 0.9
"""What NCCL moves of a link's rate.

NVLink: 370 of 450 GB/s (its author, github.com/NVIDIA/nccl-tests/issues/212). PCIe: 24 of 32 GB/s, and 10 through the
host's memory, as NCCL itself reckons (`PCI[24.0]` and `SYS 10.0` in its topology, issues/307 there). A network whose
cards read the GPUs' memory: 12 of 12.5 GB/s at best (issues/119 there), a little less where many send at once.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """What joins GPUs; all figures are each way."""

    name: str
    rate: float
    """Bytes a second of one GPU, or of a host's network, as the vendor says."""
    share: float
    """What is moved of it."""

    @property
    def bytes_per_second(self) -> float:
        """What is counted with."""
        return self.rate * self.share


NVLINK_5 = Link(name="NVLink 5", rate=900e9, share=_OF_NVLINK)
NVLINK_4 = Link(name="NVLink 4", rate=450e9, share=_OF_NVLINK)
NVLINK_3 = Link(name="NVLink 3", rate=300e9, share=_OF_NVLINK)
"""NVIDIA's data sheets of B200, of H100 and H200, and of A100: half of what they give for both ways together."""
PCIE_5 = Link(name="PCIe 5", rate=64e9, share=_OF_PCIE)
PCIE_4 = Link(name="PCIe 4", rate=32e9, share=_OF_PCIE)
"""16 lanes (PCI Express base specifications 5.0 and 4.0). Bridges of NVLink between two cards are not counted with."""
PCIE_5_BY_HOST = Link(name="PCIe 5 by the host", rate=64e9, share=_BY_THE_HOST)
PCIE_4_BY_HOST = Link(name="PCIe 4 by the host", rate=32e9, share=_BY_THE_HOST)
"""GeForce boards do not reach into each other's memory: what they exchange passes the host's."""


def network(gigabits: float) -> Link:
    """A host's network: so many Gbit/s each way, over all its ports."""
    return Link(name=f"a network of {gigabits:g} Gbit/s", rate=gigabits / 8 * 1e9, share=_OF_A_NETWORK)
