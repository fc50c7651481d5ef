"""The forms of the cost report: text, Markdown, JSON, a page, and what a notebook shows."""

import dataclasses
import json
import re

import pytest

from mmmae.cost import Report

pytestmark = [
    pytest.mark.xdist_group("profile"),  # whose reports are counted once
    pytest.mark.usefixtures("one_counter", "no_backend_from_outside"),
]
COMPONENTS = [
    "masking",
    "patch_embed",
    "aux_encoders.ir",
    "aux_encoders.af",
    "aux_encoders.thickness",
    "conditioning",
    "blocks",
    "decoder.embed",
    "decoder.blocks",
    "decoder.pred",
    "loss",
    "contrastive",
]


def test_json_gives_the_report_back(tiny, tiny_reference):
    for report in (tiny, tiny_reference):
        assert Report.from_json(report.to_json()) == report


def test_json_holds_exact_counts_and_totals(tiny):
    values = json.loads(tiny.to_json())
    assert {"name", "batch", "config", "encoder", "encoder_all", "pretraining", "within_budget", "notes"} <= set(values)
    assert [row["component"] for row in values["pretraining"]["rows"]] == COMPONENTS
    for name in ("encoder", "encoder_all", "pretraining"):
        table = values[name]
        assert all(set(row) == {"component", "parameters", "macs", "bytes", "launches"} for row in table["rows"])
        for amount in ("parameters", "macs", "bytes", "launches"):
            assert table["total"][amount] == sum(row[amount] for row in table["rows"])


def test_markdown_has_a_column_for_each_count_and_says_how_it_is_counted(tiny, tiny_reference):
    text = tiny.to_markdown()
    assert text.count("| component | M params | GMAC | GFLOP (2x) | MB moved | launches |\n") == 3
    assert "one multiply-add (MAC) is one FLOP" in text
    assert "the column GFLOP (2x) counts two operations for each" in text
    assert "| launches | x fast |" in tiny_reference.to_markdown()
    total = 2 * tiny.pretraining.total.macs / 1e9
    assert f"| {total / 2:.3f} | {total:.3f} |" in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in tables} == {7}


def test_html_needs_nothing_from_elsewhere(tiny_reference):
    page = tiny_reference.to_html()
    assert not re.search(r"https?:|//|<script|<link|<img|@import|url\(", page)
    assert page.count("<svg") == page.count("</svg>") == 3 * 4
    assert "prefers-color-scheme: dark" in page
    for component in COMPONENTS:
        assert f"{component}: " in page


def test_the_stacked_bars_of_the_page_are_full(tiny):
    for drawing in re.findall(r'aria-label="(?:multiply-adds|bytes moved)">(.*?)</svg>', tiny.to_html()):
        widths = [float(width) for width in re.findall(r'width="([\d.]+)"', drawing)]
        assert sum(widths) == pytest.approx(1000, abs=0.1)


def test_the_gauges_of_the_page_show_the_value_and_the_limits(tiny):
    gauges = re.findall(r'<div class="bar gauge">.*?</b></div>', tiny.to_html())
    assert [re.sub("<.*?>", " ", gauge).split() for gauge in gauges] == [
        ["parameters", "0", "90", "to", "110", "M", "0.32", "M"],
        ["HSI", "encoder", "0", "10.8", "to", "13.2", "GMAC", "0.03", "GMAC"],
    ]


def test_only_a_model_that_misses_the_budget_unintentionally_is_marked_as_bad(tiny):
    assert 'class="budget plain"' in tiny.to_html()
    assert 'class="budget bad"' in dataclasses.replace(tiny, name="custom").to_html()


def test_the_page_opens_with_the_answer(tiny):
    assert f'</h1><p class="answer">{tiny.answer}</p>' in tiny.to_html()


def test_printing_a_report_shows_tables_of_80_columns_with_every_component(tiny_reference, capsys):
    print(tiny_reference)
    printed = capsys.readouterr().out
    tiny_reference.print()
    assert capsys.readouterr().out == printed
    assert max(map(len, printed.splitlines())) <= 80
    for table in tiny_reference.tables:
        rows = [line.split() for line in printed.split(table.title)[1].splitlines()[4:]]
        for row, cells in zip(rows, tiny_reference.cells(table)[1:-1], strict=False):
            assert row == [cell for cell in cells if cell]
    assert set(COMPONENTS) <= set(printed.split())


def test_a_notebook_shows_the_tables_without_scripts_and_styles(tiny):
    shown = tiny._repr_html_()
    assert shown.count("<table>") == 3
    assert f"<p>{tiny.answer}</p>" in shown
    assert not re.search(r"<style|<script|<html", shown)
    for component in COMPONENTS:
        assert f"<td>{component}</td>" in shown
