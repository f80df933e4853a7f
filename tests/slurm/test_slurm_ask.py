"""slurm/ask.txt, as `plan` fills it in, is a line for sbatch before train.sbatch."""

import re
import shlex

from filled_ask import filled
from stand_ins import TRAIN

OURS = dict(re.findall(r"^#SBATCH (--[a-z-]+)=(\S+)$", TRAIN.read_text(encoding="utf-8"), re.MULTILINE))
SBATCH_S_OWN = {"--tmp"}
"""Of sbatch's options, which train.sbatch leaves to the site."""


def options():
    text, _ask = filled("slurm")
    (line,) = [line for line in text.splitlines() if line]
    return dict(word.split("=", 1) for word in shlex.split(line))


def test_its_options_are_those_of_train_sbatch_or_sbatch_s_own():
    assert {"--gpus-per-node", "--cpus-per-task", "--mem"} <= OURS.keys()
    assert options().keys() - OURS.keys() == SBATCH_S_OWN


def test_memory_and_disk_are_those_of_the_json_and_the_rest_is_train_sbatch_s():
    _text, ask = filled("slurm")
    sizes = {"--mem": f"{ask['host_memory_gib']}G", "--tmp": f"{ask['disk_gib']}G"}

    assert options() == {name: OURS[name] for name in ("--gpus-per-node", "--cpus-per-task")} | sizes
