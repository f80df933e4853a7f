"""The image's process: signal handlers first, then the command line."""

import sys

from job.edge.host.interrupt import Interrupt
from job.edge.host.output import open_standard_streams

if __name__ == "__main__":
    open_standard_streams()
    # Before the heavy imports: as PID 1 a process without handlers ignores SIGTERM.
    interrupt = Interrupt()
    interrupt.install()
    from job.cli import main

    code = main(interrupt)
    interrupt.ignore()
    sys.exit(code)
