"""The budget of `base`, and the page docs/budget.md that derives it.

`MMMAE_REWRITE=1 pytest tests/cost/test_budget.py` writes the page's tables anew.
"""

import dataclasses
import os
import re
import sys
from pathlib import Path

import pytest
import torch

import mmmae
from mmmae.cost import Report, counting

pytestmark = pytest.mark.xdist_group("budget")  # whose reports are counted once

PAGE = Path(__file__).parents[2] / "docs" / "budget.md"
REPORT = re.compile(r"(<!-- profile: (\w+)(?: (\w+))? -->\n)(.*?)(<!-- end -->)", re.DOTALL)
FORMULA_ROW = re.compile(r"^\| `?([\w. ]+?)`? \| `([^`]+)` \| ([\d,]+) \| ([\d,]+) \|$", re.MULTILINE)


@pytest.fixture(scope="module", autouse=True)
def no_backend_from_outside():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MMMAE_KERNELS", raising=False)
        patch.delenv("MMMAE_ATTENTION", raising=False)
        yield


@pytest.fixture(scope="module")
def reports() -> dict[tuple[str, str], Report]:
    base = mmmae.profile("base")
    with torch.device("meta"):
        reference = mmmae.reference_model("base", attention="sdpa")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "fvcore", None)  # as if not installed: a second count of `base` is enough
        others = {("vit", ""): mmmae.profile("vit"), ("base", "reference"): mmmae.profile(reference)}
    return {("base", ""): base, **others}


def with_total(report: Report, parameters: int, macs: int) -> Report:
    """Return the report with other totals in the places that the budget reads."""

    def with_one_row(old, **amounts):
        row = dataclasses.replace(old.rows[0], component="all", **amounts)
        return dataclasses.replace(old, rows=(row,))

    pretraining = with_one_row(report.pretraining, parameters=parameters)
    return dataclasses.replace(report, pretraining=pretraining, encoder=with_one_row(report.encoder, macs=macs))


def test_base_has_the_known_figures(reports):
    report = reports["base", ""]
    assert report.pretraining.total.parameters == 93_926_400
    assert report.pretraining.total.macs == 26_043_964_160
    assert report.encoder.total.macs == 12_157_845_504
    assert report.encoder_all.total.macs == 59_960_721_408
    assert [row.component for row in report.encoder.rows] == ["patch_embed", "blocks"]
    assert "| total | 57.492 | 12.158 | 24.316 |" in report.to_markdown()


def test_base_is_within_budget_and_says_so(reports):
    report = reports["base", ""]
    assert report.within_budget
    assert report.out_of_budget == []
    assert report.standing == "Within budget"
    assert report.notes[-1].startswith("Within budget. The budget of `base` is 100 M parameters and 12 GFLOPs")
    assert report.answer == "93.93 M parameters; HSI encoder 12.16 GMAC, pretraining forward 26.04 GMAC a sample"


def test_vit_is_over_the_budget_by_design_with_its_true_figures(reports):
    report = reports["vit", ""]
    assert not report.within_budget
    assert report.notes[-1].startswith("Over the budget by design, with the usual MLP ratio of 4. ")
    assert report.answer.startswith("150.59 M parameters; HSI encoder 23.26 GMAC, ")
    assert report.out_of_budget == [
        "parameters: 150.59 M is 40.59 M over the limit of 110.0",
        "HSI encoder: 23.26 GMAC is 10.06 GMAC over the limit of 13.2",
    ]


@pytest.mark.parametrize(
    ("parameters", "macs", "complaints"),
    [
        (90_000_000, 10_800_000_000, []),
        (110_000_000, 13_200_000_000, []),
        (89_000_000, 12_000_000_000, ["parameters: 89.00 M is 1.00 M under the limit of 90.0"]),
        (100_000_000, 13_500_000_000, ["HSI encoder: 13.50 GMAC is 0.30 GMAC over the limit of 13.2"]),
        (110_000_001, 10_799_999_999, ["parameters", "HSI encoder"]),
    ],
)
def test_a_figure_out_of_the_budget_is_named_with_its_distance(reports, parameters, macs, complaints):
    report = dataclasses.replace(with_total(reports["base", ""], parameters, macs), name="custom")
    found = report.out_of_budget
    assert len(found) == len(complaints)
    assert report.within_budget == (not complaints)
    for complaint, expected in zip(found, complaints, strict=True):
        assert complaint.startswith(expected)
        assert report.notes[-1].startswith("Out of budget: ")
        assert complaint in report.notes[-1]


def test_the_budget_is_of_a_sample_whatever_the_batch(reports):
    report = reports["base", ""]
    many = with_total(report, 100_000_000, 12_000_000_000 * 64)
    assert not many.within_budget
    assert dataclasses.replace(many, batch=64).within_budget


def test_the_figures_in_the_presets_docstring_of_design_hold(reports):
    base, vit = reports["base", ""], reports["vit", ""]
    assert round(base.encoder.total.macs / 1e9, 2) == 12.16
    assert round(vit.encoder.total.macs / 1e9, 1) == 23.3
    assert round(base.pretraining.total.parameters / 1e6) == 94
    assert round(vit.pretraining.total.parameters / 1e6) == 151


def test_the_pages_reports_are_what_profile_gives_now(reports):
    page = PAGE.read_text()
    fresh = REPORT.sub(lambda match: f"{match[1]}{reports[match[2], match[3] or ''].to_markdown()}{match[5]}", page)
    if os.environ.get("MMMAE_REWRITE"):
        PAGE.write_text(fresh)
        page = fresh
    assert len(REPORT.findall(page)) == len(reports)
    if served(page) == served(fresh):
        assert page == fresh, "MMMAE_REWRITE=1 pytest tests/cost/test_budget.py writes the page anew"
    else:  # another library or version of torch has other bytes and launches
        assert without_bytes_and_launches(page) == without_bytes_and_launches(fresh)


def served(page: str) -> list[str]:
    return re.findall(r"^Bytes and launches: .*$", page, re.MULTILINE)


def without_bytes_and_launches(page: str) -> str:
    page = re.sub(r"^(\| [^|]+(?: \| [^|]+){3}) \| [\d,.]+ \| [\d,]+ \|", r"\1", page, flags=re.MULTILINE)
    page = re.sub(r", [\d.]+ times the bytes, [\d.]+ times the launches", "", page)
    return re.sub(r"^Bytes and launches: .*$", "", page, flags=re.MULTILINE)


def test_the_comparison_without_bytes_and_launches_keeps_the_other_columns(reports):
    text = without_bytes_and_launches(reports["base", ""].to_markdown())
    assert "| total | 57.492 | 12.158 | 24.316\n" in text
    assert text.count("launches |") == 3  # the heads


def test_the_pages_formulas_give_its_numbers_and_the_counted_ones(reports):
    rows = FORMULA_ROW.findall(PAGE.read_text())
    parameter_rows, mac_rows = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    for preset, column in (("base", 2), ("vit", 3)):
        table = reports[preset, ""].pretraining
        for field, formulas in (("parameters", parameter_rows), ("macs", mac_rows)):
            written = {row[0]: int(row[column].replace(",", "")) for row in formulas}
            derived = {row[0]: eval(row[1], symbols(reports[preset, ""].config)) for row in formulas}
            counted = {row.component: getattr(row, field) for row in table.rows if getattr(row, field)}
            # The page has one row for all three auxiliary encoders.
            alike = {name for name in counted if name.startswith("aux_encoders.")}
            encoders = {counted.pop(name) for name in alike}
            assert encoders == {written["each of aux_encoders"]} == {derived["each of aux_encoders"]}
            for values in (written, derived):
                del values["each of aux_encoders"]
            assert written == derived == counted, (preset, field)


def test_the_pages_ratios_are_what_models_of_them_cost(monkeypatch):
    monkeypatch.setitem(sys.modules, "fvcore", None)
    rows = re.findall(
        r"^\| \**([\d.]+)[^|]* \| \**([\d.]+)\** \| \**([\d.]+)\** \| \**([\d.]+) M", PAGE.read_text(), re.MULTILINE
    )
    assert [float(row[0]) for row in rows] == [4, 2, 1.5, 1]
    for ratio, blocks, encoder, parameters in rows:
        config = mmmae.MMMAEConfig.preset("base", mlp_ratio=float(ratio))
        with torch.device("meta"):
            model = mmmae.FastModel(config)
            without_the_rest = mmmae.FastModel(config.replace(aux={}, decoder_depth=1))
        costs = counting.count(without_the_rest, 1)
        assert f"{costs['blocks'].macs / 1e9:.2f}" == blocks
        assert f"{(costs['patch_embed'].macs + costs['blocks'].macs) / 1e9:.2f}" == encoder
        assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}" == parameters


@pytest.mark.parametrize(("ratio", "within"), [(0.78, False), (0.8, True), (1.27, True), (1.29, False)])
def test_the_pages_limits_of_the_ratio_hold(reports, ratio, within):
    config = mmmae.MMMAEConfig.preset("base", mlp_ratio=ratio)
    with torch.device("meta"):
        model = mmmae.FastModel(config)
    hidden = model.blocks[0].mlp.fc1.out_features
    blocks = config.depth * config.keep * config.dim * (4 * config.dim + 2 * hidden + 2 * config.keep)
    macs = blocks + config.keep * 768 * config.dim
    report = with_total(reports["base", ""], sum(p.numel() for p in model.parameters()), macs)
    assert report.within_budget == within


def symbols(config: mmmae.MMMAEConfig) -> dict[str, float]:
    groups, rows, columns = config.grid
    pt, ph, pw = config.patch
    return {
        "K": config.keep,
        "M": config.tokens - config.keep,
        "N": config.tokens,
        "S": rows * columns,
        "G": groups,
        "P": config.in_channels * pt * ph * pw,
        "D": config.dim,
        "L": config.depth,
        "r": round(config.mlp_ratio),
        "a": len(config.aux),
        "A": (config.image_size // config.aux_patch) ** 2,
        "Q": config.aux_patch**2,
        "E": config.aux_dim,
        "X": config.aux_depth,
        "W": config.decoder_dim,
        "Z": config.decoder_depth,
    }
