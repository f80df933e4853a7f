"""The tests of the engines use the tune room's tiny models."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tune"))
