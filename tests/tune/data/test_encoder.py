"""Lines -> rows: the same bytes however many processes make them, and little memory however many there are."""

import json
import os
import subprocess
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from chat_styles import chat_tokenizer
from tiny import PAIR

from job.core.data.chunks import in_chunks
from job.core.data.records import Example
from job.core.errors import DataError
from job.core.recipe.data_section import DataSection
from job.edge import workers
from job.edge.workers import in_order
from job.tune.data.documents import select_documents
from job.tune.data.encoded import STREAM_END, EncodedSet, rows_of, stream_start
from job.tune.data.encoder import Encoder, rules_of
from job.tune.data.frame import Framed

ROOT = Path(__file__).parents[3]
HALF = PAIR.model_copy(update={"validation": PAIR.validation.model_copy(update={"fraction": 0.5})})


def chats(count):
    """Conversations, every 97th without an answer."""
    for number in range(1, count + 1):
        asked = {"role": "user", "content": f"{number} <|im_end|> {'ab' * (number % 7)}"}
        said = {"role": "assistant", "content": "c" * (number % 50 + 1)}
        record = {"messages": [asked] if number % 97 == 0 else [asked, said, asked, said]}
        yield "chats.jsonl", number, json.dumps(record).encode()


def lines(count):
    for number in range(1, count + 1):
        record = {"q": "ab" * (number % 7 + 1), "a": f" c{'d' * (number % 50)}"}
        yield "train.jsonl", number, b"{" if number % 97 == 0 else json.dumps(record).encode()


def encoded(encoder, count, processes, folder, *sources):
    """Both files, and the tally; of these sources, or else of one."""
    out = {"train": stream_start(), "validation": stream_start()}
    tallies = []
    given = enumerate(sources or [lines])
    for chunk in in_order(
        encoder,
        chain.from_iterable(in_chunks(each(count), side="train", source=place) for place, each in given),
        workers=processes,
        size_of=lambda chunk: chunk.size,
        should_stop=lambda: False,
        doing="encoding the data",
    ):
        tallies.append(chunk.tally)
        for side, rows in chunk.rows.items():
            out[side] += rows
    first, *others = tallies
    for tally in others:
        first.merge(tally)
    for side, content in out.items():
        (folder / f"{side}-{processes}.arrow").write_bytes(content + STREAM_END)
    return out, first


def test_the_same_bytes_come_of_one_process_and_of_several(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "ALONE_BYTES", 1)
    encoder = Encoder(rules_of(tokenizer, HALF))
    (one, tally), two, three = (encoded(encoder, 6000, processes, tmp_path) for processes in (1, 2, 3))
    assert one == two[0] == three[0]
    assert tally == two[1] == three[1]
    assert [bad.where for bad in tally.first_bad[:2]] == ["train.jsonl:97", "train.jsonl:194"]
    assert (tally.lines, tally.bad) == (6000, 6000 // 97)
    sides = [EncodedSet(tmp_path / f"{side}-2.arrow") for side in ("train", "validation")]
    assert sum(map(len, sides)) == tally.good
    # In the order of the lines, across chunks.
    numbers = [int(sides[0].where(row).removeprefix("train.jsonl:")) for row in range(len(sides[0]))]
    assert numbers == sorted(numbers)


def test_chats_and_fields_side_by_side_are_the_same_of_one_process_and_of_several(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "ALONE_BYTES", 1)
    tokenizer = chat_tokenizer(tmp_path / "base", "chatml")
    pair = {"uri": "train.jsonl", "prompt": "{q}", "completion": "{a}"}
    both = {"train": [pair, {"uri": "chats.jsonl", "chat": "messages"}], "validation": {"fraction": 0.5}}
    rules = rules_of(tokenizer, DataSection.model_validate(both))
    with Encoder(rules) as encoder:
        one, tally = encoded(encoder, 2000, 1, tmp_path, lines, chats)
        assert (one, tally) == encoded(encoder, 2000, 2, tmp_path, lines, chats)
    assert (tally.lines, tally.bad) == (4000, 2 * (2000 // 97))
    sides = [EncodedSet(tmp_path / f"{side}-2.arrow") for side in ("train", "validation")]
    counts = np.array([np.bincount(side.sources, minlength=2) for side in sides])
    assert counts.sum(axis=0).tolist() == [2000 - 2000 // 97] * 2
    assert counts.min() > 800
    assert all((np.diff(side.sources) >= 0).all() for side in sides)
    last = len(sides[0]) - 1
    assert sides[0].where(last).startswith("chats.jsonl:")
    assert len(sides[0].spans(last)) == 2


def test_a_chat_template_that_cannot_be_used_is_named_by_the_processes_too(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "ALONE_BYTES", 1)
    tokenizer = chat_tokenizer(tmp_path / "base", "chatml")
    data = DataSection(train=("chats.jsonl",), chat="messages", chat_template="{{ messages.__class__.__mro__ }}")
    with pytest.raises(DataError, match=r"^chats\.jsonl:1: data\.chat_template reaches for what"):
        encoded(Encoder(rules_of(tokenizer, data)), 2000, 2, tmp_path, chats)


@pytest.mark.parametrize(
    "change",
    [{"learn": "last-assistant"}, {"reasoning": "mask"}, {"chat_template": "chatml"}, {"max_record": 2**19}],
)
def test_what_decides_how_chats_are_read_is_in_the_name(tmp_path, change):
    tokenizer = chat_tokenizer(tmp_path / "base", "chatml")
    data = DataSection(train=("chats.jsonl",), chat="messages")
    other = data.model_copy(update=change)
    assert Encoder(rules_of(tokenizer, data)).fingerprint() != Encoder(rules_of(tokenizer, other)).fingerprint()


def test_the_bases_own_chat_template_is_in_the_name(tmp_path):
    tokenizer = chat_tokenizer(tmp_path / "base", "chatml")
    data = DataSection(train=("chats.jsonl",), chat="messages")
    before = Encoder(rules_of(tokenizer, data)).fingerprint()
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    assert Encoder(rules_of(tokenizer, data)).fingerprint() != before


def test_what_was_sent_to_another_process_has_the_same_name(tokenizer):
    """It names what the work folder keeps: a start that derives another one would encode again."""
    import pickle

    encoder = Encoder(rules_of(tokenizer, PAIR))
    again = Encoder(rules_of(tokenizer, PAIR))
    assert encoder.fingerprint() == again.fingerprint() == pickle.loads(pickle.dumps(encoder)).fingerprint()


def test_lengths_and_targets_are_made_once(tokenizer, tmp_path):
    encoder = Encoder(rules_of(tokenizer, PAIR))
    encoded(encoder, 200, 1, tmp_path)
    documents = select_documents(EncodedSet(tmp_path / "train-1.arrow"), max_length=20, too_long="truncate")
    assert documents.lengths is documents.lengths
    assert documents.targets is documents.targets
    assert documents.lengths.max() == 20
    assert [len(documents.token_ids(n)) for n in range(len(documents))] == documents.lengths.tolist()


LIMIT = """
import resource, sys
def limit(mib):
    taken = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (taken * 1024 + mib * 2**20,) * 2)
"""


def in_little_memory(program, *arguments):
    ended = subprocess.run(
        [sys.executable, "-c", LIMIT + program, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.split()


READ = """
from operator import attrgetter
from job.core.data.chunks import in_chunks
from job.edge.workers import in_order
limit(160)
line, size = b"x" * 1000, attrgetter("size")
chunks = in_chunks((("a.jsonl", number, line) for number in range(1, 300_001)), side="train")
print(sum(in_order(size, chunks, workers=2, size_of=size, should_stop=lambda: False, doing="this")))
"""


def test_three_hundred_megabytes_go_through_a_hundred_and_sixty():
    assert in_little_memory(READ) == ["300000000"]


USE = """
from pathlib import Path
import numpy as np
from job.core.plan.course import plan_course
from job.core.data.packing import pack_evenly
from job.core.data.same_content import count_repeated, count_shared
from job.tune.data.documents import select_documents
from job.tune.data.encoded import EncodedSet
limit(int(sys.argv[2]))
encoded = EncodedSet(Path(sys.argv[1]))
documents = select_documents(encoded, max_length=40, too_long="truncate", most=len(encoded) - 1)
rows, every = documents.rows, len(encoded)
shared = count_shared(encoded.part, encoded.part, used=rows, others_used=rows, examples=every)
course = plan_course(examples=len(documents), batch_size=32, steps=None, epochs=1.0, seed=0)
for step in range(1, 50):
    pack_evenly(documents.lengths[course.batch(step)].tolist(), most=2048)
print(every, count_repeated(encoded.part, examples=every), shared)
"""


def test_half_a_million_examples_take_no_more_than_numbers_do(tokenizer, tmp_path):
    encoder = Encoder(rules_of(tokenizer, PAIR))
    (chunk,) = in_chunks(((name, n, line) for name, n, line in lines(1000) if line != b"{"), side="train")
    rows = encoder(chunk).rows["train"]
    with (tmp_path / "train.arrow").open("wb") as file:
        file.write(stream_start())
        for _ in range(550):
            file.write(rows)
        file.write(STREAM_END)
    count, repeated, shared = map(int, in_little_memory(USE, tmp_path / "train.arrow", 100))
    assert count > 500_000
    assert repeated > 0.99 * count
    assert shared == count - 1


def rows_for(encoder, given):
    (chunk,) = in_chunks(given, side="train")
    return encoder(chunk).rows["train"]


def written(path, parts):
    path.write_bytes(stream_start() + b"".join(parts) + STREAM_END)
    return EncodedSet(path)


def test_the_largest_id_is_found_in_whichever_part_it_stands_first(tmp_path):
    def part(*rows):
        examples = [Example(parts=(), where=f"train.jsonl:{n}") for n in range(len(rows))]
        framed = [Framed(ids=list(ids), spans=((1, len(ids)),), answer_from=1) for ids in rows]
        return rows_of(examples, framed, source=0)

    parts = [part((1, 7), (2, 3)), part((4, 5), (6, 9, 2), (9, 1)), part((9, 9), (8, 0))]
    assert written(tmp_path / "train.arrow", parts).largest_id() == (9, 3)
    assert written(tmp_path / "none.arrow", []).largest_id() is None


def test_pages_of_a_column_that_was_read_do_not_stay(tokenizer, tmp_path):
    path = tmp_path / "train.arrow"
    rows = rows_for(Encoder(rules_of(tokenizer, PAIR)), [line for line in lines(1000) if line[2] != b"{"])
    found = written(path, [rows] * 100)
    found.largest_id(), found.digests(), found.target_counts(100)

    maps = Path("/proc/self/smaps").read_text().split(f" {path}\n")[1:]
    assert maps
    resident = sum(int(each.split("Rss:")[1].split()[0]) * 1024 for each in maps)
    assert resident < path.stat().st_size / 20
