"""A process that may take so many bytes more than it has as it begins: HOSTILE_BYTES (see warm.py, which runs this)."""

import os
import resource
from pathlib import Path

taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
limit = taken + int(os.environ["HOSTILE_BYTES"])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
