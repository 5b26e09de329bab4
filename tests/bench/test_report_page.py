"""The page of a report holds nothing but itself, and all of it has words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from typing import cast

import numpy as np
import pytest
from matplotlib.figure import Figure as Canvas

import synthetic_rows as rows_of
from synthetic_rows import LAPTOP, lost, offline, online, quality, row, subject, where
from tessera.bench.record import Kind, Record
from tessera.bench.report.build import build
from tessera.bench.report.document import Report
from tessera.bench.report.drawing import inline_svg
from tessera.bench.report.page import html, markdown

DECODE = "flashinfer:tensor_cores"
NAIVE, FLASH = subject("naive", DECODE), subject("flash_attn:4", DECODE)


def said(records: Sequence[Record], baseline: str | None = None) -> str:
    return "\n".join(build(records, baseline=baseline).verdict)


class Page(HTMLParser):
    """Elements and attributes of a page; which ids are there and which are pointed at."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def of(self, tag: str, name: str) -> list[str]:
        return [value or "" for each, key, value in self.attributes if (each, key) == (tag, name)]


@pytest.fixture(scope="module")
def everything() -> Report:
    return build(rows_of.everything())


@pytest.fixture(scope="module")
def page(everything: Report) -> str:
    return html(everything)


def test_asked_resolved_and_proven_stand_side_by_side(page: str, everything: Report) -> None:
    text = markdown(everything)
    assert re.search(
        r"\| flash_attn:4\+\S+ \| prefill \| flash_attn:4 \| flash_attn:4 \| cutlass_flash_fwd_sm90 \| 40% \|", text
    )
    assert "not proven: another engine" in text and "cutlass_flash_fwd_sm90" in page


def test_answers_stand_beside_the_speed_of_the_same_type() -> None:
    single = [replace(each, case=each.case | {"dtype": "float32"}) for each in quality({"naive": 1e-9})]
    single = [replace(each, conditions=replace(each.conditions, dtype="float32")) for each in single]
    text = markdown(build(offline({"naive": 3000}, noise=0) + quality({"naive": 2e-4}) + single))
    table = text.partition("**Answers beside speed**")[2]
    assert "| naive | bfloat16 | 3,060 | 0.0002 |" in table and "| naive | float32 | - | 1e-09 |" in table


def test_what_did_not_run_is_there_with_its_reason(page: str, everything: Report) -> None:
    assert "259/265 succeeded, 5 unavailable, 1 failed" in everything.subtitle
    for text in (page, markdown(everything)):
        assert "flash_attn:3 needs compute capability 9.0" in text and "while it compiled: out of memory" in text


def test_whom_one_reason_keeps_out_stand_in_one_line_and_no_reason_is_lost() -> None:
    both = "prefill: no GPU; decode: no GPU"
    out = [lost("offline", subject(name), both, "unavailable") for name in ("triton", "xformers")]
    out += [lost("offline", subject("flash"), "prefill: no GPU; decode: no kernel", "unavailable")]
    out += [lost("online", subject("triton"), both, "unavailable"), lost("offline", subject("flex"), both)]
    out += [lost("api", each.subject, both, "unavailable") for each in out[:2]]
    report = build([*offline({"naive": 3000}), *out])
    lines = [line for line in markdown(report).splitlines() if "no GPU" in line]
    assert lines == [
        "| offline, api | triton, xformers | unavailable | 4 | workload rose | no GPU |",
        "| offline | flash | unavailable | 1 | workload rose | prefill: no GPU; decode: no kernel |",
        "| online | triton | unavailable | 1 | workload rose | no GPU |",
        "| offline | flex | failed | 1 | workload rose | no GPU |",
    ]
    assert "triton, xformers" in html(report)


def test_how_to_repeat_names_commands_versions_and_machine(everything: Report) -> None:
    text = markdown(everything).partition("## How to repeat")[2]
    assert (
        "tessera bench offline --repeats 5" in text
        and "2.11.0+cu130" in text
        and "driver 570.1" in text
        and "abc123def456" in text
    )


def test_every_figure_has_words_and_a_table(page: str, everything: Report) -> None:
    parsed = Page(page)
    names = {figure.name for figure in everything.figures}
    assert names >= {"offline-throughput", "online-latency", "kernel-roofline", "kernel-ceiling-share", "ttft"}
    panels = [panel for figure in everything.figures for panel in figure.panels]
    alts = [value for value in parsed.of("div", "aria-label") if value]
    assert all(panel.alt in alts for panel in panels) and all(len(panel.alt) > 40 for panel in panels)
    assert parsed.tags.count("table") == parsed.tags.count("caption") and parsed.tags.count("h1") == 1


def test_streams_at_a_time_are_one_figure_over_their_number() -> None:
    rows = []
    for each in online([(NAIVE, 160, 11), (FLASH, 95, 11)], scales=(0.4, 1.0)):
        streams = {0.4: 256, 1.0: 32}[float(each.case["scale"] or 0)]
        rows.append(replace(each, case={"trace": "poisson", "concurrency": streams}))
    [figure] = [figure for figure in build(rows).figures if figure.name.startswith("online-latency")]
    assert figure.table is not None and figure.table.columns[0] == "concurrency"
    assert [str(cells[0]) for cells in figure.table.rows] == ["32", "32", "256", "256"]
    assert all("over concurrency" in panel.alt for panel in figure.panels)


def test_speed_beside_answers_is_of_the_same_model_and_machine_and_of_one_case() -> None:
    def table(speed: list[Record]) -> str:
        return markdown(build([*speed, *quality({"naive": 2e-4})])).partition("**Answers beside speed**")[2]

    other = offline({"naive": 90000}, noise=0, at=where(run="r0"))
    other = [replace(each, conditions=replace(each.conditions, model="other")) for each in other]
    elsewhere = offline({"naive": 70000}, at=where(LAPTOP, command="tessera bench offline --repeats 5"))
    assert "| naive | 3,060 | 0.0002 |" in table([*offline({"naive": 3000}, noise=0), *other, *elsewhere])
    assert "| naive | - | 0.0002 |" in table(offline({"naive": 3000}, workloads=("rose", "long")))
    assert "| naive | 0.0002 |" in table([]) and "output tok/s" not in table(other)


@pytest.mark.parametrize(
    ("device", "roof"), [("cuda", "720.0 TFLOP/s in bfloat16, 4.1 TB/s"), ("cpu", "36 TFLOP/s in float32")]
)
def test_a_roofline_has_the_roof_that_was_measured(device: str, roof: str) -> None:
    found = [each for each in rows_of.kernels({"naive": 4.0, "triton": 1.0}) if each.kind == "kernels"]
    found = [replace(each, conditions=replace(each.conditions, device=device)) for each in found]
    (figure,) = (
        each for each in build(found + rows_of.ceilings(found[0].provenance, device)).figures if "roof" in each.name
    )
    alt = figure.panels[0].alt
    assert (
        roof in alt and ("float32" in alt) is (device == "cpu") and roof.split()[0] in inline_svg(figure.panels[0], "a")
    )


def test_the_verdict_stands_before_every_figure(page: str) -> None:
    assert page.index(">flash_attn:4+flashinfer:tensor_cores is 1.3") < page.index("<figure")


def test_the_page_asks_nothing_of_any_network(page: str) -> None:
    parsed = Page(page)
    assert not {"script", "link", "img", "iframe", "object", "image", "base", "form"} & set(parsed.tags)
    links = [
        value or "" for _, name, value in parsed.attributes if name in ("href", "src", "xlink:href", "srcset", "action")
    ]
    assert links and all(link.startswith("#") for link in links)
    assert not re.search(r"@import|url\((?!#)|src=", page)
    bare = re.sub(r'xmlns(:xlink)?="[^"]*"', "", page)
    assert "http://" not in bare and "https://" not in bare
    assert any("default-src 'none'" in value for value in parsed.of("meta", "content"))


def test_ids_are_unique_and_every_reference_has_one(page: str) -> None:
    ids = [value for _, name, value in Page(page).attributes if name == "id"]
    wanted = set(re.findall(r"url\(#([^)]+)\)", page)) | set(re.findall(r'href="#([^"]+)"', page))
    assert len(ids) == len(set(ids)) and wanted <= set(ids)


def test_the_same_rows_give_the_same_page(page: str) -> None:
    assert html(build(rows_of.everything())) == page


EVIL = "<script>alert(1)</script>$x^2$ \"'&|`_"


def test_labels_and_reasons_of_third_parties_are_only_text() -> None:
    who = replace(subject("naive"), label=EVIL)
    records = [replace(each, subject=who) for each in offline({"naive": 3000}) + online([(NAIVE, 160, 11)])]
    records = [replace(each, conditions=replace(each.conditions, model=EVIL)) for each in records]
    records.append(lost("offline", replace(subject("triton"), label="</td><img src=x onerror=alert(1)>"), EVIL))
    report = build(records, title=EVIL)
    page, text = html(report), markdown(report)
    parsed = Page(page)
    assert not {"script", "img"} & set(parsed.tags) and not any(
        name.startswith("on") for _, name, _ in parsed.attributes
    )
    assert "<script" not in page and r"\<script\>" in text and not re.search(r"(?<!\\)<(script|img)", text)
    assert "&lt;script&gt;alert(1)" in page and "$x^2$" in page


def test_a_p99_of_fewer_than_100_requests_is_not_shown() -> None:
    def of(num: int) -> str:
        found = online([(NAIVE, 160, 11), (FLASH, 95, 11)])
        return markdown(build([replace(each, case=each.case | {"num_requests": num}) for each in found]))

    assert "p99 hollow" in of(100) and "TTFT p99" in of(100)
    assert "no p99 of fewer than 100 requests" in of(99) and "TTFT p99" not in of(99)


def test_a_label_is_no_formula() -> None:
    records = [replace(each, subject=replace(each.subject, label="a_$x^2$")) for each in offline({"naive": 3000})]
    assert ">a_$x^2$</text>" in inline_svg(build(records).figures[0].panels[0], "a")


def test_colours_are_the_page_s_and_one_subject_has_one(everything: Report, page: str) -> None:
    assert re.search(r"var\(--c1\)", page) and not re.search(
        r"(fill|stroke): #(?!(fff|000)\b)", page.split("<main>")[1]
    )
    assert len({(style.color, style.marker, style.dash) for style in everything.styles.values()}) == len(
        everything.styles
    )
    assert "prefers-color-scheme: dark" in page and "@media print" in page


def test_a_panel_is_the_same_wherever_it_is_drawn(everything: Report) -> None:
    panel = everything.figures[0].panels[0]
    assert inline_svg(panel, "a") == inline_svg(panel, "a") and "<text" in inline_svg(panel, "a")


@pytest.mark.parametrize("kind", ["offline", "online", "kernels", "api", "ttft", "quality"])
def test_one_kind_of_rows_is_enough(kind: str) -> None:
    report = build([each for each in rows_of.everything() if each.kind == kind])
    assert report.verdict and len(html(report)) > 5000 and len(markdown(report)) > 1000


def test_one_subject_is_enough_and_compared_with_nothing() -> None:
    assert "Only naive was measured offline: output tok/s 3,0" in said(offline({"naive": 3000}))


def test_only_failures_give_a_page_that_says_so() -> None:
    report = build([lost("offline", subject("naive"), "out of memory")])
    assert "Nothing was measured: all 1 rows failed" in report.verdict[0] and "out of memory" in html(report)


def test_what_is_new_is_shown_and_not_judged() -> None:
    new = [
        row(cast(Kind, "vision"), subject(name), {"images": 4}, {"wobble": 3.25 + i}, repeat=i)
        for name in ("naive", "triton")
        for i in range(3)
    ]
    more = [replace(each, metrics=each.metrics | {"zeal": 77.0}) for each in offline({"naive": 3000, "triton": 4000})]
    text = markdown(build(new + more))
    assert "## Vision" in text and re.search(r"\| triton \| wobble \| 4.25 \|", text) and "is 1.3" in text


@pytest.mark.parametrize(
    ("flop_a_byte", "roofs"), [(3.0, True), (600.0, True), (3.0, False)], ids=["under", "beyond", "no roof"]
)
def test_a_roofline_of_one_case_shows_the_point_and_the_knee_and_no_line_above_the_roof(
    flop_a_byte: float, roofs: bool
) -> None:
    found = [row for row in rows_of.kernels({"naive": 4.0}, ("8q1s512",)) if row.case.get("phase") == "decode"]
    rate = {"tflop_s": 2.0, "tb_s": 2.0 / flop_a_byte}
    found = [replace(row, metrics=row.metrics | rate) for row in found]
    report = build(found + (rows_of.ceilings(found[0].provenance) if roofs else []))
    (panel,) = next(figure for figure in report.figures if "roof" in figure.name).panels
    axes = Canvas().add_subplot()
    panel.draw(axes)
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    knee = 720 / 4.1
    inside = [flop_a_byte, knee] if roofs else [flop_a_byte]
    assert 2 * left < min(inside) and max(inside) < right / 2 and right / left < 100 * max(inside) / min(inside)
    assert bottom < 2.0 < top and top < (1500 if roofs else 5)
    drawn = [np.asarray(line.get_ydata(), float) for line in axes.get_lines() if line.get_linestyle() != "None"]
    assert bool(drawn) is roofs and all(ys.max() <= 720 * (1 + 1e-9) for ys in drawn)
