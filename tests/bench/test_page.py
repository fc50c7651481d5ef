"""The page of a bench run: self-contained, true to the numbers, and readable where numbers are missing."""

from __future__ import annotations

import html
import re
from html.parser import HTMLParser

import pytest

from bench.page import main, render
from bench.page_plots import BLUE
from bench.page_tables import against
from bench.results import Measurement, Prediction, Results, exponent

GB = 10**9
TIMES = {"reference, SDPA": 3.0, "reference, plain": 4.5, "fast": 2.0}
OPS = {"gather, F.linear": 0.030, "native": 0.020, "eager": 0.031}


def race(group, case, times, baseline, **facts):
    """Return measurements of a case whose second round is a tenth slower for everyone."""
    return [
        Measurement(group, case, name, [time, 1.1 * time, time], baseline=name == baseline, **facts)
        for name, time in times.items()
    ]


def full():
    """Return results of every group, with a profile and predictions."""
    memory = {"peak_bytes": 2 * GB, "resident_bytes": 3 * GB, "saved_bytes": GB}
    step = {"samples": 4, "limit": 1.0, **memory}
    base = "reference, SDPA"
    found = race("training step", "base, batch 4", TIMES, base, **step)
    found += race("training step", "base, batch 4", {base: 2.5, "fast": 2.0}, base, allocator="kept", samples=4)
    found += race("encoding", "base, batch 4", {base: 1.0, "fast": 1.08}, base, samples=4)
    found += race("activation checkpointing", "base, batch 4, activation_checkpointing True", TIMES, base, **step)
    found += race("op", "patch_embed, batch 8", OPS, "gather, F.linear", macs=4 * GB, bytes=GB // 8, limit=0.015)
    found += race(
        "op", "decoder_tokens, batch 8", {"cat, gather, add": 0.01, "native": 0.006}, "cat, gather, add", bytes=GB // 20
    )
    groups = {"bands": (784, 3920, 7840), "image size": (196, 784, 1764), "batch": (1, 2, 4)}
    groups |= {"mask ratio": (0.5, 0.75, 0.9), "decode fraction": (0.25, 0.5, 1.0)}
    for group, numbers in groups.items():
        for x in numbers:
            times = {base: 0.1 * x**1.5, "fast": 0.05 * x**1.25}
            found += race(group, f"base, {group} {x}", times, base, x=float(x), resident_bytes=int(GB * (1 + x)))
    rows = [("blocks", 12), ("decoder.embed", 1), ("decoder.blocks", 11), ("masking", 0)]
    costs = {"title": "", "rows": [{"component": name, "macs": macs * GB} for name, macs in rows]}
    predictions = [
        Prediction("H100", group, "base, batch 64", name, 10**12, 10**10, 100, seconds, 0.25)
        for group, ours in (("training step", "fast"), ("op", "ours"))
        for name, seconds in (("reference, plain", 0.04), (ours, 0.02))
    ]
    return results(found, profiles={"base": {"batch": 1, "pretraining": costs}}, predictions=predictions)


def results(measurements, **more):
    machine = {
        "name": "m",
        "cpu": "A <fast> CPU",
        "cores": 2,
        "threads": 2,
        "memory_gb": 8.0,
        "gpu": "",
        "system": "Linux",
    }
    limits = {"copy_gb_s": 10.0, "gemm_gflop_s": 600.0}
    return Results(
        "2026-01-02T03:04:05+00:00", "abc+", machine, {"torch": "2.13"}, {"full": True}, limits, measurements, **more
    )


@pytest.fixture(scope="module")
def page():
    return render(full())


def headings(page):
    return re.findall("<h2>(.*?)</h2>", page)


def plots(page, title):
    """Return the texts of the plots under a title, each without its ticks."""
    found = re.findall(rf"<figcaption>{title}</figcaption>(<svg.*?</svg>)", page, flags=re.DOTALL)
    return [" ".join(re.findall(r">([^<>]*)</text>", drawing)) for drawing in found]


class Seen(HTMLParser):
    """The references of a page, its ids, and the tags that are still open at its end."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self, page):
        super().__init__()
        self.references, self.ids, self.open = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.open += [] if tag in self.VOID else [tag]
        self.handle_startendtag(tag, attributes)

    def handle_startendtag(self, tag, attributes):
        self.references += [value for name, value in attributes if name in ("src", "href", "xlink:href")]
        self.ids += [value for name, value in attributes if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing_from_elsewhere(page):
    seen = Seen(page)
    assert seen.open == []
    assert "<script" not in page
    assert not re.search(r"https?://|@import|<link", page)
    used = [name[1:] for name in seen.references] + re.findall(r"url\(#(.*?)\)", page)
    assert all(name.startswith("#") for name in seen.references)
    assert set(used) <= set(seen.ids)


def test_no_two_things_of_a_page_have_the_same_id(page):
    ids = Seen(page).ids
    assert len(ids) > 100
    assert len(ids) == len(set(ids))


def test_the_same_results_give_the_same_page():
    run = results(race("encoding", "tiny, batch 2", TIMES, "reference, SDPA"))
    assert render(run) == render(run)


def test_every_section_is_there_and_linked(page):
    sections = ["Models", "Ops", "Roofline", "Scaling", "Multiply-adds", "Predictions for GPUs", "The run"]
    assert headings(page) == sections
    links = re.findall(r'<a href="#(.*?)">(.*?)</a>', page)
    assert [title for _, title in links if title in sections] == sections
    assert ("models-0", "Training step") in links


def test_the_first_line_is_how_fast_a_training_step_of_base_is_and_where(page):
    (line,) = re.findall(r'<p class="answer">(.*?)</p>', page)
    assert line == (
        "On A &lt;fast&gt; CPU, a training step of base takes 2.00 s: <b>1.50 times as fast as the reference with "
        "SDPA</b>. Against the others: the plain reference 2.25."
    )
    other = results(race("encoding", "tiny, batch 2", {"reference, SDPA": 1.0, "fast": 1.08}, "reference, SDPA"))
    assert "encoding of tiny takes 1.08 s: <b>1.08 times as slow as the reference with SDPA</b>" in render(other)


def test_a_workload_is_named_once(page):
    models = page[page.index('id="models"') : page.index('id="ops"')]
    assert models.count("batch 4") == 1
    ops = page[page.index('id="ops"') : page.index('id="roofline"')]
    assert ops.count("batch 8") == 1


def test_contenders_and_their_ratios_are_in_table_and_plot(page):
    for name in (*TIMES, *OPS):
        assert f"<td>{name}</td>" in page
    assert re.search(r"<td>reference, plain</td><td>4\.50 s \(4\.50, 4\.95\)</td><td>0\.67</td><td>2\.25</td>", page)
    time, *_ = plots(page, "time")
    assert "2.00 s" in time
    assert "3.00 s, 1.50 x" in time
    assert "4.50 s, 2.25 x" in time
    (op,) = plots(page, "patch_embed")
    assert "20.0 ms" in op
    assert "30.0 ms, 1.50 x" in op
    assert "<td>2.00 (50%)</td>" in page  # 2 s over a limit of 1 s


def test_ours_is_blue_in_every_plot_and_marked_in_every_table(page):
    for title in ("time", "peak memory", "saved for backward", "patch_embed", "Bands: time"):
        (drawing, *_) = re.findall(rf"<figcaption>{title}</figcaption>(<svg.*?</svg>)", page, flags=re.DOTALL)
        assert BLUE in drawing
    rows = re.findall(r"<tr( class=\"ours\")?>(?:<td>[^<]*</td>)?<td>(fast|native|reference, SDPA)</td>", page)
    assert {name: bool(mark) for mark, name in rows} == {"fast": True, "native": True, "reference, SDPA": False}


def test_logarithmic_axes_are_labelled(page):
    assert "tokens, by more bands (logarithmic)" in plots(page, "Bands: time")[0]
    assert "seconds (logarithmic)" in plots(page, "Bands: time")[0]
    assert "logarithmic" not in plots(page, "Mask ratio: time")[0]
    assert plots(page, "Ops with matrix products")[0].count("(logarithmic)") == 2


def test_memory_kept_stands_beside(page):
    row = re.search(r"<tr><td>reference, SDPA</td>.*?</tr>", page)[0]
    assert row.endswith("<td>2.50 s (2.50, 2.75)</td><td>1.25</td></tr>")
    assert "2.50 s, 1.25 x" in plots(page, "time if all keep freed memory")[0]


def test_where_fast_is_slower_the_page_says_so_in_words(page):
    assert "Encoding: fast is 1.08 times as slow as reference, SDPA" in page
    assert '<td class="slower">slower: 1.08 times as slow</td>' in page
    assert re.search(r'fill: var\(--bad\)"[^>]*>1\.00 s, 0\.93 x</text>', page)
    even = race("encoding", "c", {"reference, SDPA": 2.0, "fast": 2.0}, "reference, SDPA")
    assert "Ours is nowhere slower" in render(results(even))
    assert against(even[1], even[0]) == "1.00"


def test_predictions_are_set_apart(page):
    measured, predicted = re.split('<section id="predictions-for-gpus" class="predicted">', page)
    assert "nothing here was measured" in predicted
    assert "H100" not in measured
    floors = "<td>40.000 ms</td><td>20.000 ms</td><td>2.00</td><td>25%</td>"
    assert f"{floors}<td>2.00</td><td>2.00</td></tr>" in predicted  # a model, whose launches have a price
    assert f"{floors}</tr>" in predicted


def test_the_fitted_exponents_are_in_the_legends(page):
    for name, power in (("reference, SDPA", "1.50"), ("fast", "1.25")):
        assert page.count(f"{name}: exponent {power}</text>") == 3  # bands, image size, batch


@pytest.mark.parametrize("power", [-1.0, 0.0, 0.5, 1.0, 2.0])
def test_the_exponent_of_a_power_law_is_found(power):
    assert exponent([(x, 3 * x**power) for x in (1, 2, 5, 40)]) == pytest.approx(power, abs=1e-12)


def test_the_exponent_is_that_of_least_squares():
    assert exponent([(1, 1), (2, 2), (4, 2)]) == pytest.approx(0.5)


def test_of_an_empty_run_only_its_facts_are_left():
    page = render(results([]))
    assert headings(page) == ["The run"]
    assert "<svg" not in page
    assert "copy 10.0 GB/s" in page


def test_a_quick_run_has_the_sections_of_what_it_took():
    quick = results(race("encoding", "tiny, batch 2", TIMES, "reference, SDPA"))
    assert headings(render(quick)) == ["Models", "The run"]


@pytest.mark.parametrize("seconds", [[], [float("nan")] * 3])
def test_a_contender_without_a_time_is_named_and_harms_nothing(seconds):
    group = {"peak_bytes": GB, "saved_bytes": GB, "samples": 4}
    models = race("training step", "base, batch 4", TIMES, "reference, SDPA", **group)
    models += [one for one in full().measurements if one.group == "bands"]
    ops = race("op", "patch_embed, batch 8", OPS, "gather, F.linear", macs=4 * GB, bytes=GB // 8, limit=0.015)
    for one in (*models, *ops):
        if one.contender in ("fast", "native"):
            one.seconds = seconds
    page = render(results([*models, *ops]))
    assert "<td>fast</td><td>not timed</td>" in page
    assert "nowhere slower" not in page
    assert ">nan<" not in page.lower()
    assert "Roofline" in headings(page)
    for one in ops:
        one.seconds = seconds
    assert "Roofline" not in headings(render(results(ops)))


def test_names_from_outside_are_escaped():
    evil = "<script>alert('$x_1$ & y')</script>"
    measured = race("training step", evil, {evil: 1.0, "fast": 2.0}, evil, note=evil, peak_bytes=GB)
    measured += race(evil, evil, {evil: 1.0, "fast": 2.0}, evil, x=1.0)
    measured += race("op", evil, {evil: 1.0, "native": 2.0}, evil, macs=GB, bytes=GB)
    costs = {"rows": [{"component": evil, "macs": GB}]}
    given = results(measured, profiles={evil: {"batch": 1, "pretraining": costs}})
    given.predictions = [Prediction(evil, evil, evil, name, 1, 1, 1, 1.0, 0.0) for name in ("fast", evil)]
    given.machine["cpu"] = given.commit = given.versions[evil] = given.options[evil] = evil
    page = render(given)
    assert "<script" not in page
    assert html.escape(evil) in page
    assert "A &lt;fast&gt; CPU" in render(results([]))
    assert Seen(page).open == []


def test_a_stored_run_is_rendered(tmp_path, capsys):
    stored, run = tmp_path / "run.json", results(race("op", "patchify, batch 8", OPS, "gather, F.linear"))
    stored.write_text(run.to_json())
    assert main([str(stored)]) == 0
    assert (tmp_path / "run.html").read_text() == render(run)
    assert main([str(stored), str(tmp_path / "other.html")]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "run.html"), str(tmp_path / "other.html")]


@pytest.mark.parametrize("text", [None, "no json", "[]", "{}", '{"format": 99}'])
def test_what_is_no_run_is_refused_with_a_reason(tmp_path, capsys, text):
    stored = tmp_path / "run.json"
    if text is not None:
        stored.write_text(text)
    with pytest.raises(SystemExit) as ended:
        main([str(stored)])
    assert ended.value.code == 1
    complaint = capsys.readouterr().err
    assert complaint.startswith(f"python -m bench.page: {stored}: ")
    assert (
        "No such file" if text is None else "format is 99, expected 1" if "99" in text else "not a results file"
    ) in complaint
    assert not stored.with_suffix(".html").exists()
