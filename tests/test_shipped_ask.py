"""What job.yaml and train.sbatch ask for is what `plan` asks for the recipe that ships, which job.yaml has in it."""

import json
import re
from pathlib import Path
from string import Template

import pytest
import yaml
from job_process import Job
from run_material import make_base

ROOT = Path(__file__).parents[1]
LLAMA_2_7B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "float16",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "vocab_size": 32000,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-05,
    "hidden_act": "silu",
}
"""The config of the shipped recipe's base; its weights play no part."""


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def ask(tmp_path_factory, warm):
    """`ask` of `plan --json`. Which examples they are makes no difference to memory and disk."""
    base = make_base(tmp_path_factory.mktemp("base"))
    for weights in base.glob("*.safetensors"):
        weights.unlink()
    (base / "config.json").write_text(json.dumps(LLAMA_2_7B), encoding="utf-8")
    job = Job(tmp_path_factory.mktemp("plan"), base, warm)
    shipped = yaml.safe_load(read("recipes/llama2-7b.yaml"))
    own = {"model": job.recipe["model"], "output": job.recipe["output"]}
    data = job.recipe["data"] | {"max_length": shipped["data"]["max_length"]}
    train = shipped["train"] | {"warmup_steps": 0}  # that few examples make fewer steps
    job.recipe = shipped | own | {"data": data, "train": train}
    ended = job.start("plan", "--gpu", "a100", "--json")
    assert ended.code == 0, ended.stdout + ended.stderr
    return json.loads(ended.stdout)["ask"]


def test_the_resources_in_job_yaml(ask):
    expected = yaml.safe_load(Template(read("k8s/ask.txt")).substitute(ask))["resources"]
    (job,) = [each for each in yaml.safe_load_all(read("k8s/job.yaml")) if each["kind"] == "Job"]
    found = job["spec"]["template"]["spec"]["containers"][0]["resources"]

    assert {kind: {name: str(value) for name, value in found[kind].items()} for kind in found} == {
        kind: {name: str(value) for name, value in expected[kind].items()} for kind in expected
    }


def test_the_options_in_train_sbatch(ask):
    """Not --tmp, with which a job would never start where the site does not say how large its nodes' disks are."""
    expected = dict(word.split("=", 1) for word in Template(read("slurm/ask.txt")).substitute(ask).split())
    found = dict(re.findall(r"^#SBATCH (--[a-z-]+)=(\S+)$", read("slurm/train.sbatch"), re.MULTILINE))

    assert "--tmp" not in found
    assert {name: found.get(name) for name in expected if name != "--tmp"} == {
        name: value for name, value in expected.items() if name != "--tmp"
    }


def test_the_numbers_that_the_pages_name(ask):
    disk, memory = f"{ask['disk_gib']}", f"{ask['host_memory_gib']}"

    assert f"{disk} GiB: the base model" in read("k8s/README.md")
    assert f"{memory} GiB is what `plan` expects" in read("k8s/README.md")
    assert f"`--mem={memory}G`" in read("slurm/README.md")
    assert f"`--tmp={disk}G`" in read("slurm/README.md")
