"""The image's process: signal handlers first, then the command line."""

import sys

from job.edge.host.interrupt import Interrupt

if __name__ == "__main__":
    # Before the heavy imports: as PID 1 a process without handlers ignores SIGTERM.
    interrupt = Interrupt()
    interrupt.install()
    from job.cli import main

    code = main(interrupt)
    interrupt.ignore()
    sys.exit(code)
