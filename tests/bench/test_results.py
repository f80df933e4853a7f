from bench.results import table, write_section


def test_a_section_that_is_measured_again_is_replaced(tmp_path):
    path = tmp_path / "R.md"
    path.write_text("# Measured\n\nBy hand.\n")
    write_section(path, "one", "## One\n\nfirst \\1")
    write_section(path, "two", "## Two\n\nkept")
    write_section(path, "one", "## One\n\nsecond \\1")

    content = path.read_text()
    assert content.startswith("# Measured\n\nBy hand.\n\n<!-- begin one -->\n\n## One\n\nsecond \\1\n")
    assert content.index("second") < content.index("kept")
    assert "first" not in content


def test_numbers_stand_on_the_right():
    assert table(("", "rate"), [("ours", 3)]) == "|  | rate |\n| --- | --: |\n| ours | 3 |"
