"""Names, records, answers and descriptions by strangers: shown, and obeyed by no terminal, page or reader of YAML."""

import itertools
import json
import shutil

import pytest
import yaml
from job_process import Job, call, write_lines

from job.edge.base import files as model_files

EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202egnp\r\nNO  everything is forged"


def is_tame(text):
    return all(line.isprintable() for line in text.replace("\t", " ").split("\n")) and "\nNO  everything" not in text


@pytest.mark.parametrize("form", ["console", "json"])
@pytest.mark.parametrize("command", ["run", "check"])
def test_a_name_of_a_file_is_shown_as_it_is_and_obeyed_by_nothing(job, command, form):
    write_lines(job.data / f"train{EVIL}.jsonl", [{"question": [EVIL], "answer": EVIL}])
    options = job.command(command)[2:]
    ended = call("--log-format", form, *options, outcome_file=job.outcome_file)
    assert ended.code == 65, ended.stdout
    assert is_tame(ended.stdout + ended.stderr)
    assert is_tame(ended.outcome["reason"])
    assert is_tame(job.outcome_file.read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory, base):
    job = Job(tmp_path_factory.mktemp("finished"), base)
    job.recipe["train"]["steps"] = 1
    assert job.call("run").code == 0
    return job


def with_evil(value):
    """Every text of a report, with what a terminal would obey; but what only our own words can be, and its recipe."""
    if isinstance(value, dict):
        kept = {
            "recipe",
            "loaded_from",
            "compute_dtype",
            "document_rows",
            "placement",
            "schema_version",
            "shown",
            "left_out",
        }
        return {name: part if name in kept else with_evil(part) for name, part in value.items()}
    if isinstance(value, list):
        return [with_evil(part) for part in value]
    return value + EVIL if isinstance(value, str) else value


@pytest.mark.parametrize("several", [False, True])
def test_a_report_s_texts_begin_no_line_and_move_no_cursor(finished, tmp_path, several):
    runs = tmp_path / "store" / "runs"
    shutil.copytree(finished.only_run(), runs / "r1")
    path = runs / "r1/report.json"
    content = json.loads(path.read_text())
    spoilt = with_evil(content)
    spoilt["metric"]["name"] = content["metric"]["name"]
    path.write_text(json.dumps(spoilt))
    if several:
        shutil.copytree(runs / "r1", runs / "r2")
    ended = call("report", *(f"file://{run}" for run in sorted(runs.iterdir())))
    assert ended.code == 0, ended.stdout + ended.stderr
    assert is_tame(ended.stdout)


def test_an_answer_begins_no_line_of_ours(finished):
    uri = f"file://{finished.only_run()}"
    prompt = r"12 red hats\n" + "\x1b[2J" + r"\ntuned   forged"
    ended = call("try", uri, "--prompt", prompt, "--workdir", str(finished.workdir), "--device", "cpu")
    assert ended.code == 0, ended.stdout + ended.stderr
    assert is_tame(ended.stdout)
    assert "tuned   forged" not in ended.stdout.splitlines()
    assert "        tuned   forged" in ended.stdout.splitlines()


# --- a base's card and licence ---------------------------------------------------------------------------------------


CARDS = {
    "aliases that double": "a: &a [x,x]\n"
    + "\n".join(f"{b}: &{b} [*{a},*{a}]" for a, b in itertools.pairwise("abcdefghi")),
    "deep": "license: " + "[" * 50_000,
    "many keys": "\n".join(f"k{n}: {n}" for n in range(20_000)),
    "an impossible date": "license: 2001-99-99",
    "a tag that makes objects": "license: !!python/object/apply:os.system ['true']",
    "no text": "\x00\x01license: mit",
    "a mapping for a licence": "license: {a: b}",
    "a number": "license: 3",
    "control characters": 'license: "\\e[2Jmit\\nx"',
    "long": f"license: {'x' * 60_000}",
}


@pytest.mark.parametrize("kind", CARDS)
def test_whatever_a_card_says_the_licence_is_a_short_text_or_none(tmp_path, limited, kind):
    (tmp_path / "README.md").write_text(f"---\n{CARDS[kind]}\n---\n" + "x" * 2**20)
    read = "import sys\nfrom pathlib import Path\nfrom job.edge.base import files\nlimit()\n"
    told = limited(f"{read}print(repr(files.licence(Path(sys.argv[1]))))", tmp_path, mib=200)
    assert len(told) < 300
    assert told.isprintable()


def test_a_licence_of_100_mb_is_left_where_it_is():
    sizes = {"config.json": 500, "LICENSE": 10**8, "README.md": 10**9, "NOTICE": 100, "model.safetensors": 10**9}
    assert model_files.wanted_files(sizes) == {"config.json": 500, "NOTICE": 100}


def test_the_adapter_s_card_holds_no_markup_of_strangers(job, tmp_path):
    base = shutil.copytree(job.recipe["model"]["base"], tmp_path / "own`base")
    licence = "mit` <script>alert(1)</script>\x1b[2J ![x](http://evil/x.png)"
    (base / "README.md").write_text("---\n" + yaml.safe_dump({"license": licence}) + "---\n")
    (job.data / "train.jsonl").rename(job.data / "train`<b>[x](y).jsonl")
    job.recipe["model"]["base"] = str(base)
    job.recipe["train"]["steps"] = 1
    assert job.call("run").code == 0
    card = (job.only_run() / "adapter/README.md").read_text()
    _, front, body = card.split("---\n", 2)
    assert set(yaml.safe_load(front)) == {
        "library_name",
        "license",
        "license_name",
        "model-index",
        "pipeline_tag",
        "tags",
    }
    assert is_tame(card)
    prose = body.split("```python")[0]
    from markdown_it import MarkdownIt

    page = MarkdownIt().render(prose)
    assert "<script>" not in page
    assert "<img" not in page
    assert "<b>" not in page
    assert "<a " not in page
