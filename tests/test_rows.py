"""Rows of results come out the same wherever they are printed or written."""

import argparse
import json
import os
from pathlib import Path

import pytest
from rich.table import Table

from effvit_zoo.errors import UserError
from effvit_zoo.report import rows

ROWS = [
    {"model": "a", "size": [3, 32], "per_class": [{"class": "x"}]},
    {"model": "ü", "top1": 87.5, "versions": {"torch": "2"}},
]


def test_csv_has_every_plain_column_and_json_has_everything(tmp_path):
    rows.write_rows(ROWS, tmp_path / "new" / "rows.csv")
    assert (tmp_path / "new" / "rows.csv").read_text("utf-8") == "model,size,top1\na,3 32,\nü,,87.5\n"
    rows.write_rows(ROWS, tmp_path / "rows.json")
    assert json.loads((tmp_path / "rows.json").read_text("utf-8")) == ROWS
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "rows.json"]


def test_other_suffixes_are_refused_before_anything_is_measured():
    rows.check_output(None)
    rows.check_output(Path("rows.json"))
    with pytest.raises(UserError, match=r"--results-file rows\.txt: expected a name that ends in \.csv or \.json"):
        rows.check_output(Path("rows.txt"), "--results-file")


def test_a_pipe_is_written_to_and_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    rows.print_rows([{"a": 1}], as_json=False, output=pipe)
    assert os.read(reader, 100) == b"a\n1\n"
    os.close(reader)
    assert pipe.is_fifo()


def test_tables_are_aligned_and_never_cut_off_a_terminal(capsys, tmp_path):
    rows.print_table(["model", "M"], [["a" * 300, "1"], ["[b]", "10"]], right=(1,))
    head, first, second = capsys.readouterr().out.splitlines()
    assert head == f"{'model':300}   {'M':>2}"
    assert first.split() == ["a" * 300, "1"]
    assert second.split() == ["[b]", "10"]
    rows.print_table([], [["name", "value"]], output=tmp_path / "facts.txt")
    assert (tmp_path / "facts.txt").read_text() == "name   value\n"


def test_names_are_printed_as_they_are(capsys):
    """Neither rich's markup nor its emoji codes, in titles, heads and cells of every console; escape sequences are shown, not obeyed."""
    names = ["cat [indoor]", ":cat:", "[/INST]", "[bold]"]
    console = rows.make_console()
    table = Table(*names, title="set [v2] :dog:")
    table.add_row(*names)
    console.print(table)
    console.print(" ".join(names))
    text = capsys.readouterr().out
    assert all(text.count(name) == 3 for name in names)
    assert "set [v2] :dog:" in text
    rows.print_table(names, [names, ["\x1b[31mred", "two\nlines", "", ""]])
    text = capsys.readouterr().out
    assert all(text.count(name) == 2 for name in names)
    assert r"\x1b[31mred" in text
    assert len(text.splitlines()) == 4


def test_format_arguments_and_numbers():
    parser = argparse.ArgumentParser()
    rows.add_format_arguments(parser)
    args = parser.parse_args(["--csv", "--output", "x"])
    assert (args.json, args.csv, args.output) == (False, True, Path("x"))
    assert [rows.figures(value) for value in (12.345, 0.12345)] == ["12.35", "0.123"]
    cells = [None, True, 1234567, 0.5, 1234.5, [3, 32, 32], "text"]
    assert [rows.shown(cell) for cell in cells] == ["-", "yes", "1,234,567", "0.50", "1,234", "3 x 32 x 32", "text"]
