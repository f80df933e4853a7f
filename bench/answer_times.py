"""How fast the command line answers: `--help`, and `check` on a wrong recipe. Median of 5 whole processes each.

python bench/answer_times.py
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def seconds(*arguments, expect):
    """Median wall time of five runs."""
    times = []
    for _ in range(5):
        began = time.perf_counter()
        done = subprocess.run([sys.executable, ROOT / "entrypoint.py", *arguments], capture_output=True, check=False)
        times.append(time.perf_counter() - began)
        assert done.returncode == expect, done.stderr
    return statistics.median(times)


with tempfile.TemporaryDirectory() as folder:
    recipe = Path(folder) / "wrong.yaml"
    recipe.write_text("model: {base: ./nowhere}\ntrain: {steps: -1}\nfoo: 1\n")
    print(f"--help                   {seconds('--help', expect=0):.3f} s (at most 0.5)")
    print(f"check on a wrong recipe  {seconds('check', str(recipe), expect=64):.3f} s (at most 2)")
