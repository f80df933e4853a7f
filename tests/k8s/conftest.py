"""What starts the job as a process stands in tests/run."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "run"))
