"""On what an adapter is merged: the base's own weights, or those of the base in 4 bits that it was trained on."""

from typing import Literal

Onto = Literal["weights", "quantised"]
"""As `export --onto` names them; apart from what is proved, so that the command line need not load that."""
