"""How much memory of each GPU is in use while something runs, by the driver: also that of other processes of ours."""

import threading
from contextlib import contextmanager

_LOOK_SECONDS = 0.1


@contextmanager
def memory_watched():
    """A list that holds, once the block is left, the most bytes in use on each GPU, less those before.

    It stays empty where there is no driver, or nothing to ask it with.
    """
    most = []
    try:
        import pynvml
    except ImportError:
        yield most
        return
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield most
        return
    gpus = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]

    def used():
        return [pynvml.nvmlDeviceGetMemoryInfo(gpu).used for gpu in gpus]

    before, seen, over = used(), [0] * len(gpus), threading.Event()

    def watch():
        while not over.wait(_LOOK_SECONDS):
            seen[:] = map(max, seen, used())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield most
    finally:
        over.set()
        watcher.join()
        most += [max(0, now - then) for now, then in zip(seen, before, strict=True)]
        pynvml.nvmlShutdown()
