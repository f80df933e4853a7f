"""JSON lines: which are examples, what is said about the others, and on which side an example falls."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from job.core.data import records
from job.core.data.records import BadRecord, Example, Part, Tally, checked_lines, is_held_out, judge_lines, parse_line
from job.core.data.report_data import BadLine
from job.core.errors import DataError
from job.core.recipe.data_section import DataSection

TEXT = DataSection(train=("train.jsonl",), text="{text}")
PAIR = DataSection(train=("train.jsonl",), prompt="{input}", completion="{output}")
GOOD = b'{"text": "good"}'


def examples(lines, data, *, tally):
    """The examples of all lines there are, judged at their end."""
    yield from checked_lines(lines, data, tally=tally)
    judge_lines([tally], data)


def lines(*raw, source="train.jsonl"):
    return [(source, number, line) for number, line in enumerate(raw, start=1)]


def text_example(text, *, where=""):
    return Example(parts=(Part(text=text, learned=True),), where=where)


def pair_example(prompt, completion, *, where=""):
    return Example(parts=(Part(text=prompt, learned=False), Part(text=completion, learned=True)), where=where)


def read(*raw, data=TEXT):
    """Texts of the good lines, and the tally."""
    tally = Tally()
    return [example.text for example in examples(lines(*raw), data, tally=tally)], tally


def reason(raw, data=TEXT):
    """Why a line is no example."""
    found = parse_line(raw, data, where="train.jsonl:17")
    assert isinstance(found, BadRecord), found
    return found.reason


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        (b"hello", "not JSON (Expecting value, column 1)"),
        (b"{'text': 'x'}", "not JSON"),
        (b'{"text": "x"', "not JSON"),
        (b'{"text": "x"},', "not JSON (Extra data"),
        (b'{"text": "x"} {"text": "y"}', "not JSON (Extra data"),
        (b'{"text": "a\tb"}', "not JSON (Invalid control character"),
        (b"[1, 2]", "not a JSON object but a list"),
        (b'"text"', "not a JSON object but a string"),
        (b"17", "not a JSON object but a number"),
        (b"NaN", "not a JSON object but a number"),
        (b"true", "not a JSON object but a boolean"),
        (b"null", "not a JSON object but null"),
        (b"{}", '"text" is missing (the record is empty)'),
        (b'{"Text": "x", "b": 1}', '"text" is missing (the record has "Text", "b"; did you mean "Text"?)'),
        (b'{"text": ""}', '"text" is empty'),
        (b'{"text": " \\t\\n"}', '"text" is empty'),
        ('{"text": "\u00a0\u2003"}'.encode(), '"text" is empty'),
        (b'{"text": null}', '"text" is null, not a string'),
        (b'{"text": NaN}', '"text" is NaN, which JSON does not have'),
        (b'{"text": ["x"]}', '"text" is a list, not a string'),
        (
            b'{"text": [{"role": "user"}]}',
            '"text" is a list, not a string; for a chat\'s messages write data.chat: text',
        ),
        (b'{"text": {"x": 1}}', '"text" is an object, not a string'),
        (b'{"text": "caf\xe9"}', "not UTF-8 (byte 14 of the line)"),
        ('{"text": "x"}'.encode("utf-16-le"), "holds a NUL byte"),
        (b'{"text": "a\0b"}', "holds a NUL byte"),
        (b'{"text": "a\\u0000b"}', '"text" holds a NUL character'),
        (b'{"text": "\\ud83d"}', '"text" holds half a surrogate pair, which is no character'),
        (b'{"text": "\\ude00 x"}', '"text" holds half a surrogate pair, which is no character'),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"text": "x", "deep": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_wrong_line_is_told_with_its_reason(raw, told):
    assert reason(raw).startswith(told)


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b'{"text": "plain"}', "plain"),
        (b'  {"text" : "spaces around"}  ', "spaces around"),
        (b'{"text": "windows"}\r', "windows"),
        (b'{"text": "\\ud83d\\ude00"}', "\U0001f600"),
        ('{"text": "a\u2028b\u0085c\u2029d"}'.encode(), "a\u2028b\u0085c\u2029d"),
        (b'{"text": "a\\nb\\tc"}', "a\nb\tc"),
        (b'{"text": "old", "text": "the last one counts"}', "the last one counts"),
        (b'{"text": 5}', "5"),
        (b'{"text": -1.50e3}', "-1.50e3"),
        (b'{"text": ' + b"1" * 5000 + b"}", "1" * 5000),
        (b'{"text": true}', "true"),
        (b'{"text": false}', "false"),
        (b'{"text": " kept as it is "}', " kept as it is "),
        (b'{"text": "x", "other": [null, {"deep": 1}], "n": NaN}', "x"),
        ('{"text": "a\ufeffb"}'.encode(), "a\ufeffb"),
    ],
)
def test_a_right_line_is_an_example(raw, text):
    assert parse_line(raw, TEXT, where="train.jsonl:17") == text_example(text, where="train.jsonl:17")


def test_a_record_that_is_too_long_is_told_so():
    longest = b" " * (2**20 - len(GOOD)) + GOOD

    assert isinstance(parse_line(longest, TEXT, where=""), Example)
    assert reason(b" " + longest).startswith("longer than data.max_record (1,048,576 bytes); ")


def test_names_of_other_fields_are_shown_on_one_line_and_can_be_written_anywhere():
    names = {"line\nbreak": 1, "half\ud800": 2, "größe": 3, "long" * 40: 4, "e": 5, "f": 6, "g": 7}
    told = reason(json.dumps(names).encode())

    assert told == (
        '"text" is missing (the record has "line\\nbreak", "half\\ud800", "größe", "'
        + "long" * 10
        + '", "e", "f", ...)'
    )
    assert BadLine(where="train.jsonl:1", reason=told).model_dump_json()


def test_a_byte_order_mark_on_the_first_line_is_no_mistake():
    assert read(b"\xef\xbb\xbf" + GOOD, GOOD)[0] == ["good", "good"]


def test_a_byte_order_mark_further_down_is_none_of_the_record():
    """Compressed files that were put one behind the other are one file of several beginnings."""
    assert read(GOOD, b"\xef\xbb\xbf" + GOOD)[0] == ["good", "good"]


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        (b'{"text": true}', '"text" is a boolean, not a string'),
        (b'{"text": 5}', '"text" is a number, not a string'),
        (b'{"text": 5.5}', '"text" is a number, not a string'),
    ],
)
def test_strict_types_take_strings_alone(raw, told):
    assert reason(raw, TEXT.model_copy(update={"strict_types": True})) == told


ALPACA = DataSection(train=("a",), prompt="I: {instruction}\n[Input: {input?}\n]R:", completion=" {output}")


@pytest.mark.parametrize("absent", [b"", b', "input": null', b', "input": ""', b', "input": " \\n"'])
def test_an_optional_field_that_is_not_there_takes_its_group_with_it(absent):
    made = parse_line(b'{"instruction": "a", "output": "b"' + absent + b"}", ALPACA, where="")
    assert (made.text, made.borders) == ("I: a\nR: b", (7,))


def test_an_optional_field_is_looked_at_where_it_is_there():
    raw = b'{"instruction": "a", "output": "b", "input": %s}'
    assert parse_line(raw % b'"c"', ALPACA, where="").text == "I: a\nInput: c\nR: b"
    assert reason(raw % b'["c"]', ALPACA) == '"input" is a list, not a string'


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b'{"meta": {"lang": "de"}}', "de"),
        (b'{"meta": {"lang": "de"}, "meta.lang": "fr"}', "fr"),
        (b'{"meta": {"lang": 3}}', "3"),
    ],
)
def test_a_field_inside_an_object_is_found_and_a_key_of_that_very_name_wins(raw, text):
    assert parse_line(raw, DataSection(train=("a",), text="{meta.lang}"), where="").text == text


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        (b'{"meta": {"lung": "de"}}', '"meta.lang" is missing (the record has "lung"; did you mean "lung"?)'),
        (b'{"meta": ["de"]}', '"meta.lang" is missing ("meta" is a list, not an object)'),
        (
            b'{"meta": [{"lang": 1}]}',
            '"meta.lang" is missing ("meta" is a list, not an object; for a chat\'s messages write data.chat: meta)',
        ),
        (b'{"other": 1}', '"meta.lang" is missing (the record has "other")'),
        (b'{"meta": {"lang": {}}}', '"meta.lang" is an object, not a string'),
    ],
)
def test_a_field_inside_an_object_that_is_not_there_is_told(raw, told):
    assert reason(raw, DataSection(train=("a",), text="{meta.lang}")) == told


def test_an_empty_answer_is_left_out_counted_and_named_and_is_no_wrong_line():
    good, empty = (f'{{"input": "q", "output": "{answer}"}}'.encode() for answer in ("a", " "))

    texts, tally = read(good, empty, good, data=PAIR)
    assert (texts, tally.good, tally.bad, tally.empty) == (["qa", "qa"], 2, 0, 1)
    assert [str(each) for each in tally.first_bad] == ['train.jsonl:2: "output" is empty']
    with pytest.raises(DataError, match=r"1 wrong line of 2, 1 without an answer\n.*:1: .*\n.*:2: "):
        read(empty, b'{"input": "q", "output": null}', data=PAIR)


def test_an_answer_of_which_nothing_is_there_is_empty():
    data = DataSection(train=("a",), prompt="{q}", completion="A: {a?}")
    assert read(b'{"q": "x", "a": ""}', b'{"q": "x"}', data=data)[1].empty == 2


def test_a_record_that_is_wrong_otherwise_is_wrong_whatever_its_answer():
    assert read(b'{"input": 1, "output": ""}', data=PAIR)[1].empty == 1
    with pytest.raises(DataError, match='"input" is null'):
        read(b'{"output": "", "input": null}', data=PAIR)


def test_a_field_that_is_empty_in_some_records_is_answered_with_the_optional_form():
    data = DataSection(train=("a",), prompt="I: {instruction}\nInput: {input}\nR:", completion=" {output}")
    with pytest.raises(DataError) as refused:
        read(
            b'{"instruction": "a", "input": "", "output": "b"}',
            b'{"instruction": "a", "input": "c", "output": "b"}',
            data=data,
        )
    assert str(refused.value).splitlines()[-1] == r'  data.prompt: "I: {instruction}\n[Input: {input?}\n]R:"'


def test_the_share_of_wrong_lines_is_told_with_the_lines_that_it_is_of():
    train, validation = Tally(side="data.train"), Tally(side="data.validation")
    data = skipping(0.1)
    list(records.checked_lines(lines(b"a", b"b", *[GOOD] * 6), data, tally=train))
    list(records.checked_lines(lines(*[GOOD] * 32), data, tally=validation))

    with pytest.raises(
        DataError, match=r"2 wrong lines of 40\n(.*\n)+2 of 8 lines of data\.train are wrong \(25\.00%\)"
    ):
        records.judge_lines([train, validation], data)


def test_each_file_may_begin_with_a_byte_order_mark():
    both = [*lines(b"\xef\xbb\xbf" + GOOD, source="a.jsonl"), *lines(b"\xef\xbb\xbf" + GOOD, source="b.jsonl")]

    assert len(list(examples(both, TEXT, tally=Tally()))) == 2


def test_blank_lines_are_ignored_and_not_counted():
    found, tally = read(b"", GOOD, b"   ", b"\r", b"\t", GOOD, b"")

    assert found == ["good", "good"]
    assert (tally.lines, tally.good, tally.bad) == (2, 2, 0)


def test_lines_are_counted_as_an_editor_counts_them():
    with pytest.raises(DataError, match=r"train\.jsonl:4: not JSON"):
        read(b"", GOOD, b"", b"oops")


def test_a_wrong_line_ends_the_job_with_file_line_reason_and_what_to_do():
    with pytest.raises(DataError) as caught:
        read(GOOD, b'{"txet": "x"}', GOOD)

    assert str(caught.value) == (
        "1 wrong line of 3\n"
        '  train.jsonl:2: "text" is missing (the record has "txet"; did you mean "txet"?)\n'
        "correct them, or name in data.text the fields that the records have"
    )


def test_twenty_wrong_lines_are_told_at_once_with_the_total():
    with pytest.raises(DataError) as caught:
        read(*[b"oops"] * 25, GOOD)

    told = str(caught.value).splitlines()
    assert told[0] == "25 wrong lines of 26"
    assert [line.split(": ")[0].strip() for line in told[1:21]] == [f"train.jsonl:{n}" for n in range(1, 21)]
    assert told[21].strip() == "... and 5 more"


def skipping(limit):
    return TEXT.model_copy(update={"on_bad_record": "skip", "bad_record_limit": limit})


@pytest.mark.parametrize(("limit", "bad", "of"), [(0.01, 1, 100), (0.29, 29, 100), (0.07, 14, 200), (0.5, 1, 2)])
def test_as_many_wrong_lines_as_the_limit_says_are_noise_and_one_more_is_not(limit, bad, of):
    """In binary 0.29 * 100 is a bit less than 29."""
    found, tally = read(*[b"oops"] * bad, *[GOOD] * (of - bad), data=skipping(limit))

    assert (len(found), tally.good, tally.bad, tally.lines) == (of - bad, of - bad, bad, of)
    with pytest.raises(DataError, match=r"more than data\.bad_record_limit"):
        read(*[b"oops"] * (bad + 1), *[GOOD] * (of - bad - 1), data=skipping(limit))


def test_leaving_out_is_advised_while_the_limit_allows_it():
    data = TEXT.model_copy(update={"bad_record_limit": 0.5})
    with pytest.raises(DataError, match=r"\ncorrect them, or set data\.on_bad_record: skip$"):
        read(b"oops", GOOD, data=data)
    with pytest.raises(DataError, match=r"\ncorrect them$"):
        read(b"oops", b"oops", GOOD, data=data)


def test_a_reason_that_all_lines_share_is_told_once_whatever_else_the_records_hold():
    with pytest.raises(DataError, match=r'3 lines: "text" is missing \(the record has "a"\)\n'):
        read(b'{"a": 1}', b'{"b": 1}', b"{}")
    with pytest.raises(DataError, match=r"train\.jsonl:1: not JSON.*\n  train\.jsonl:2: .*a list"):
        read(b"oops", b"[]")


def test_skipped_lines_are_kept_for_the_report():
    _, tally = read(b"oops", *[GOOD] * 99, data=skipping(0.01))

    assert [record.where for record in tally.first_bad] == ["train.jsonl:1"]


def test_tallies_of_two_files_add_up():
    first, second = Tally(), Tally()
    list(examples(lines(b"a", *[GOOD] * 20), skipping(0.9), tally=first))
    list(examples(lines(*[b"b"] * 25, GOOD, source="other.jsonl"), skipping(0.99), tally=second))
    first.merge(second)

    assert (first.lines, first.good, first.bad, len(first.first_bad)) == (47, 21, 26, records.REPORTED_AT_ONCE)
    assert first.first_bad[1].where == "other.jsonl:1"


def test_every_field_of_the_templates_must_be_there():
    assert reason(b'{"input": "q"}', PAIR).startswith('"output" is missing')
    assert reason(b'{"output": "a"}', PAIR).startswith('"input" is missing')
    assert parse_line(b'{"input": "q", "output": "a"}', PAIR, where="") == pair_example("q", "a")


@pytest.mark.parametrize(
    ("template", "record", "text"),
    [
        (
            "### Question: {input}\n ### Answer: {output}",
            {"input": "What is 2 + 2?", "output": "4"},
            "### Question: What is 2 + 2?\n ### Answer: 4",
        ),
        (
            "### The following is a note by Eevee the Dog: {note}",
            {"note": "Today I chased a squirrel."},
            "### The following is a note by Eevee the Dog: Today I chased a squirrel.",
        ),
        ('{{"answer": "{a}"}}', {"a": "x"}, '{"answer": "x"}'),
        ("{a} and {a}", {"a": "x"}, "x and x"),
        ("{first name}", {"first name": "Mia"}, "Mia"),
    ],
)
def test_a_template_becomes_text(template, record, text):
    data = DataSection(train=("a",), text=template)

    example = parse_line(json.dumps(record).encode(), data, where="")
    assert (example.text, example.borders) == (text, (0,))


def test_a_templates_own_text_may_hold_control_tokens_and_a_field_may_not():
    data = DataSection(train=("a",), prompt="<s>{q}</s>", completion="{a}</s>")

    example = parse_line(b'{"q": "</s>", "a": "<s>"}', data, where="")
    assert [(part.text, part.learned, part.control) for part in example.parts] == [
        ("<s>", False, True),
        ("</s>", False, False),
        ("</s>", False, True),
        ("<s>", True, False),
        ("</s>", True, True),
    ]


def test_braces_and_percent_signs_in_the_data_stay_as_they_are():
    assert parse_line(b'{"text": "{other} {{x}} %s {0}"}', TEXT, where="").text == "{other} {{x}} %s {0}"


texts = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1).filter(str.strip)


@settings(deadline=None, derandomize=True, database=None)
@given(prompt=texts, completion=texts, ascii_only=st.booleans())
def test_whatever_stands_in_the_record_arrives_unchanged(prompt, completion, ascii_only):
    raw = json.dumps({"input": prompt, "output": completion}, ensure_ascii=ascii_only).encode()

    assert parse_line(raw, PAIR, where="f:1") == pair_example(prompt, completion, where="f:1")


@settings(deadline=None, derandomize=True, database=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_an_example_or_have_a_reason(raw):
    assert isinstance(parse_line(raw, TEXT, where="f:1"), (Example, BadRecord))


def sides(texts, fraction):
    """Which of the examples are held out."""
    made = [text_example(text, where=f"f:{n}") for n, text in enumerate(texts)]
    return {example.text for example in made if is_held_out(example.digest, fraction)}


def test_an_example_stays_on_its_side_when_the_file_grows_or_is_reordered():
    first = [f"example {n}" for n in range(500)]
    grown = [f"new {n}" for n in range(500)] + first[::-1]

    assert sides(first, 0.1) == sides(grown, 0.1) & set(first)


def test_a_larger_fraction_keeps_who_was_held_out():
    texts = [f"example {n}" for n in range(500)]

    assert sides(texts, 0.05) < sides(texts, 0.2)


def test_the_held_out_share_is_about_the_fraction():
    assert 80 <= len(sides([f"example {n}" for n in range(1000)], 0.1)) <= 120


def test_duplicates_stay_on_one_side():
    """The side is decided by the content, not by the line it stands in."""
    one, other = (pair_example("q", "a", where=where) for where in ("a.jsonl:1", "b.jsonl:900"))

    assert one.digest == other.digest


def test_the_border_between_prompt_and_completion_is_part_of_the_content():
    assert pair_example("ab", "c").digest != pair_example("a", "bc").digest


def test_a_text_is_learned_as_a_whole_and_of_prompt_and_completion_the_completion_is():
    assert text_example("abc").borders == (0,)
    assert pair_example("ab", "c").borders == (2,)


@pytest.mark.parametrize("loss_on", ["completion", "all"])
def test_what_the_loss_is_over_is_not_part_of_the_content(loss_on):
    data = PAIR.model_copy(update={"loss_on": loss_on})
    assert parse_line(b'{"input": "q", "output": "a"}', data, where="") == pair_example("q", "a")


def flags(example):
    """Each character, and whether it is learned."""
    return [(character, part.learned) for part in example.parts for character in part.text]


some_parts = st.lists(st.builds(Part, text=st.text("a1,:", max_size=3), learned=st.booleans()), max_size=5)
some_examples = st.builds(Example, parts=some_parts.map(tuple), where=st.just("f:1"))


@settings(deadline=None, derandomize=True, database=None)
@given(some_examples)
def test_borders_say_which_characters_are_learned(example):
    borders = example.borders
    assert list(borders) == sorted(borders)
    assert example.text == "".join(character for character, _ in flags(example))
    assert [learned for _, learned in flags(example)] == [
        sum(border <= place for border in borders) % 2 == 1 for place in range(len(example.text))
    ]
    assert (len(borders) % 2 == 1) == (example.parts != () and example.parts[-1].learned)


@settings(deadline=None, derandomize=True, database=None, max_examples=300)
@given(one=some_examples, other=some_examples)
def test_examples_of_one_digest_have_the_same_text_and_learn_the_same_of_it(one, other):
    same = (one.text, one.borders) == (other.text, other.borders)
    assert (one.digest == other.digest) == same
    if same:
        assert flags(one) == flags(other)


def test_the_same_text_of_other_parts_has_another_digest():
    """Every way to learn some of three characters has a name of its own."""
    digests = set()
    for learned in range(8):
        parts = tuple(Part(text=c, learned=bool(learned >> place & 1)) for place, c in enumerate("abc"))
        digests.add(Example(parts=parts, where="").digest)
    assert len(digests) == 8


def test_the_split_never_changes_silently():
    """A run that is resumed by a newer image must find its examples on the same sides."""
    assert pair_example("### Question: a\n", "b").digest.hex() == "4355064cf8b7fe736e396224193c130f"
    assert text_example("### Question: a\nb").digest.hex() == "f0970faf6bfec539dbd27b4a11b860d6"
    assert pair_example("größe \U0001f600: ", "1:b").digest.hex() == "41d373a5e8987c4766d9f327b80219ba"
    assert sorted(sides([f"example {n}" for n in range(40)], 0.1)) == ["example 22", "example 27"]
