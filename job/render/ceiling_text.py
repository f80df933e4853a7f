"""How near a run's steps came to what its GPU could at most do, in words: for page and terminal."""

from job.core.reports.report import Throughput


def ceiling_words(speed: Throughput) -> str | None:
    """None: it is not known."""
    if speed.ceiling_share is None or speed.ceiling_tflops is None:
        return None
    pace = "measured on one of its kind" if speed.ceiling_from == "measured" else "derived from its data sheet"
    a_gpu = "each GPU's" if speed.ranks > 1 else "the GPU's"
    sustained = f"{speed.ceiling_tflops:,.0f} TFLOP/s, {pace}"
    return f"{speed.ceiling_share:.2f} of what {a_gpu} large products sustain ({sustained})"
