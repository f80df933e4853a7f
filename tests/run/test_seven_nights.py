"""Seven nights of a channel on an S3 server, each begun by the same command: what is promoted is what should be."""

import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
import yaml
from job_process import Ended, process
from seven_nights import UnusableError, as_bytes, material, other_material

CHANNEL = "orders"


class Nights:
    """One recipe, one bucket; every night begins with an empty disk, as on a fresh pod."""

    def __init__(self, folder, place, material, image):
        self.folder, self.place, self.material, self._image = folder, place, material, image
        self.client = place.server.client()
        self.number = 0
        self.recipe = folder / "recipe.yaml"
        self.recipe.write_text(
            yaml.safe_dump(
                {
                    "model": {"base": material.base},
                    "data": {
                        "train": f"s3://{place.bucket}/data/train/*.jsonl",
                        "validation": f"s3://{place.bucket}/data/validation.jsonl",
                        "prompt": material.prompt,
                        "completion": material.completion,
                    },
                    "lora": {"r": 8, "alpha": 16},
                    "train": {"epochs": 1, "batch_size": 8, "learning_rate": 1.5e-3, "schedule": "constant"},
                    "checkpoint": {"every_steps": 20},
                    "evaluate": {"every_steps": 1000, "max_new_tokens": 8},
                    "output": f"s3://{place.bucket}/models",
                    # All nights are of one day, in which one wrong promotion a year earns next to nothing.
                    "promote": {"channel": CHANNEL, "slices": ["town"], "wrong_per_year": 12.0},
                }
            )
        )

    def arrives(self, name, content):
        self.client.put_object(Bucket=self.place.bucket, Key=f"data/{name}", Body=content)

    def read(self, key):
        return json.loads(self.client.get_object(Bucket=self.place.bucket, Key=f"models/{key}")["Body"].read())

    def keys(self, prefix):
        pages = self.client.get_paginator("list_objects_v2").paginate(
            Bucket=self.place.bucket, Prefix=f"models/{prefix}"
        )
        return [each["Key"].removeprefix("models/") for page in pages for each in page.get("Contents", ())]

    def reports(self):
        return [key for key in self.keys("runs/") if key.endswith("/report.json")]

    def begin(self, *options) -> Ended:
        self.number += 1
        folder = self.folder / f"{self.number:02d}"
        folder.mkdir()
        command = ["python", "entrypoint.py", "run", str(self.recipe), "--workdir", str(folder / "work"), *options]
        environment = {
            "JOB_OUTCOME_FILE": str(folder / "outcome.json"),
            "JOB_DEVICE": os.environ.get("NIGHTLY_DEVICE") or "cpu",
        }
        environment |= self.place.server.environment()
        with process(command, cwd=folder, environment=environment, image=self._image) as running:
            running.outcome_file = folder / "outcome.json"
            return running.end()

    def night(self, *options):
        """A night that ends well; its process, and the report of what it finished."""
        before = self.reports()
        ended = self.begin(*options)
        assert ended.code == 0, ended.stdout[-4000:] + ended.stderr[-2000:]
        new = [key for key in self.reports() if key not in before]
        return ended, self.read(new[0]) if new else None

    def promoted(self):
        return self.read(f"channels/{CHANNEL}/promoted.json")

    def in_use(self):
        """The run in use, whose adapter stands whole at the channel's own place."""
        now = self.promoted()
        manifest = self.read(f"channels/{CHANNEL}/adapter/MANIFEST.json")
        assert (manifest["run_id"], manifest["sequence"]) == (now["run_id"], now["sequence"])
        assert manifest["files"] == now["adapter"]["files"]
        return now["run_id"]


@pytest.fixture(scope="module")
def nights(tmp_path_factory, moto_http, warm):
    from servers import new_bucket

    found = Nights(tmp_path_factory.mktemp("nights"), new_bucket(moto_http), material(), warm)
    found.arrives("validation.jsonl", as_bytes(found.material.validation))
    return found


@pytest.mark.nightly
def test_seven_nights(nights):
    first, second = three_nights(nights)
    fourth, fifth = two_that_are_disturbed(nights)
    seventh = two_with_odd_files(nights, fifth)

    state = nights.read(f"channels/{CHANNEL}/state.json")
    assert [night["run_id"] for night in state["nights"]] == [
        each["run_id"] for each in (first, second, fourth, fifth, seventh)
    ]
    assert state["again"] == []


def three_nights(nights):
    data = nights.material
    # 1: the first file; the base is what is in use.
    nights.arrives("train/day-1.jsonl", as_bytes(data.day(0, 400)))
    _, first = nights.night()
    assert first["promotion"]["outcome"] == "promoted", first["promotion"]["said"]
    assert nights.in_use() == first["run_id"]

    # 2: poison. The damage is there, and it is not promoted.
    nights.arrives("train/day-2.jsonl", as_bytes(data.wrong(data.day(400, 300))))
    _, second = nights.night()
    judged = second["promotion"]["judged"]
    assert judged["challenger_loss"] > judged["champion_loss"] + 0.02, "the damage is there"
    assert second["promotion"]["outcome"] == "refused", second["promotion"]["said"]
    assert nights.in_use() == first["run_id"]

    # 3: no new data.
    stood = nights.keys("")
    ended, nothing = nights.night()
    assert nothing is None
    assert ended.phases() == ["identify"]
    assert nights.keys("") == stood
    return first, second


def two_that_are_disturbed(nights):
    data = nights.material
    # 4: whoever wrote the poison has corrected it; the night is killed in the middle, and the next tick goes on.
    nights.arrives("train/day-2.jsonl", as_bytes(data.day(400, 200)))
    killed = nights.begin("--crash-at", "checkpoint.after_manifest:2")
    assert killed.code == -signal.SIGKILL, killed.stdout[-4000:]
    nights.arrives("train/day-3.jsonl", as_bytes(data.day(600, 400)))  # it arrives while the run is unfinished
    ended, fourth = nights.night()
    assert ended.named("resumed")
    assert not any("day-3" in o["uri"] for o in fourth["data"]["train"]["objects"])
    assert fourth["promotion"]["outcome"] == "promoted", fourth["promotion"]["said"]
    assert fourth["promotion"]["new"]["files"] == [f"s3://{nights.place.bucket}/data/train/day-2.jsonl"]
    assert nights.in_use() == fourth["run_id"]

    # 5: started twice; day 3 is there.
    before = nights.reports()
    with ThreadPoolExecutor(2) as pool:
        codes = sorted(each.code for each in pool.map(lambda _: nights.begin(), range(2)))
    assert codes in ([0, 84], [0, 0]), codes
    (new,) = [key for key in nights.reports() if key not in before]
    fifth = nights.read(new)
    assert fifth["promotion"]["outcome"] == "promoted", fifth["promotion"]["said"]
    assert nights.in_use() == fifth["run_id"]
    return fourth, fifth


def two_with_odd_files(nights, fifth):
    data = nights.material
    # 6: what came is half there. It is left out by name, and without it there is nothing to do.
    half = as_bytes(data.late_day())
    nights.arrives("train/day-4.jsonl", half[: len(half) // 2])
    stood = nights.keys("")
    ended, nothing = nights.night()
    assert nothing is None
    late = f"s3://{nights.place.bucket}/data/train/day-4.jsonl"
    assert [e["file"] for e in ended.named("late_file")] == [late]
    assert ended.outcome["reason"] == f"done; left out, not whole yet: {late}: it does not end with a line end"
    assert nights.keys("") == stood
    champion = nights.in_use()
    assert champion == fifth["run_id"]

    # 7: it is whole. Better on the whole, worse in the south.
    nights.arrives("train/day-4.jsonl", half)
    for name, rows in data.last_days().items():
        nights.arrives(f"train/{name}.jsonl", as_bytes(rows))
    _, seventh = nights.night()
    judged = seventh["promotion"]["judged"]
    assert judged["challenger_loss"] < judged["champion_loss"], "better on the whole"
    assert any("day-4" in o["uri"] for o in seventh["data"]["train"]["objects"])
    assert judged["slices"]["town=south"]["mean"] > 0.02, "the damage is there"
    assert seventh["promotion"]["outcome"] == "refused", seventh["promotion"]["said"]
    assert judged["decision"]["held_up_by"] == ["slice town=south"], judged["decision"]
    assert nights.in_use() == champion
    return seventh


# --- other data ------------------------------------------------------------------------------------------------------


def asked(count, **fields):
    """Questions with answers of a sum's length and form."""
    rows = [
        {
            "question": f"Ann has {n} pens and buys {n + 2} more. How many?",
            "answer": f"{n} + {n + 2} is {2 * n + 2}. #### {2 * n + 2}",
        }
        for n in range(count)
    ]
    return [row | fields for row in rows]


def written(folder, rows):
    path = folder / "train.jsonl"
    path.write_bytes(as_bytes(rows))
    return path


def test_data_with_questions_and_answers_needs_no_templates(tmp_path):
    found = other_material(written(tmp_path, asked(1200)), "base")
    assert (found.prompt, found.completion) == ("Shop in the {town}. {question}\nAnswer:", " {desk} | {answer}")
    assert (len(found.train), len(found.validation), found.answer) == (960, 240, ("answer",))
    day = found.day(100, 50)
    assert all(len(row["desk"].split()) == found.digits for row in day)
    wrong = found.wrong(day)
    assert [row["question"] for row in wrong] == [row["question"] for row in day]
    assert sum(new["answer"] != old["answer"] for new, old in zip(wrong, day, strict=True)) == 50


def test_templates_that_are_given_count_and_their_line_ends_may_be_written_out(tmp_path):
    path = written(tmp_path, asked(1000, topic="pens"))
    found = other_material(path, "base", prompt="{topic}: {question}\\n>", completion=" {answer}")
    assert found.prompt == "Shop in the {town}. {topic}: {question}\n>"


@pytest.mark.parametrize(
    ("rows", "templates", "said"),
    [
        (asked(999), {}, "999 records, and seven nights need 1000"),
        ([{"text": "a"}] * 1000, {}, "share the fields text, and which of them is the question"),
        (asked(1000), {"prompt": "{topic}", "completion": " {answer}"}, "not every record has topic"),
        (asked(1000), {"prompt": "{question}", "completion": " yes"}, "it names no field"),
        ([["a"]] * 1000, {}, "not every line is a record"),
    ],
)
def test_data_that_makes_no_seven_nights_is_refused_by_name_before_the_first(tmp_path, rows, templates, said):
    with pytest.raises(UnusableError, match=said):
        other_material(written(tmp_path, rows), "base", **templates)


def test_a_poison_that_changes_nothing_is_found_before_it_is_sent(tmp_path):
    same = other_material(written(tmp_path, [{"question": "q", "answer": "a"}] * 1000), "base")
    with pytest.raises(AssertionError, match="no damage"):
        same.wrong(same.day(0, 50))
