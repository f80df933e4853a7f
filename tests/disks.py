"""A disk that is full, as a process sees it."""

import resource
from contextlib import contextmanager


@contextmanager
def largest_file(size):
    """Every file that this process writes ends at so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
