"""Report pages: self-contained, every figure in them, and drawn by a real browser at phone width without overflow."""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from arcface_build.compare.comparison import Faces, compare_sides
from arcface_build.compare.matrix import parity_matrix
from arcface_build.compare.sides import Side
from arcface_build.reports.bench_page import bench_csv, bench_page
from arcface_build.reports.compare_page import compare_page
from arcface_build.reports.matrix_page import matrix_page
from arcface_build.reports.page import table
from arcface_build.reports.plots import Axis, Series, lines
from arcface_clients.evidence.accuracy import pairs_from_identities
from arcface_clients.evidence.drift import DRIFT_LIMITS
from arcface_clients.faces.synthetic import synthetic_faces
from deadlines import HANG_S

NAMES = tuple(f"p{i // 3}/{i % 3}.jpg" for i in range(12))


def embeddings(noise: float) -> np.ndarray:
    rng = np.random.default_rng(1)
    rows = np.repeat(rng.normal(size=(4, 64)), 3, axis=0) + 0.4 * rng.normal(size=(12, 64))
    rows = rows + noise * rng.normal(size=rows.shape)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def compared() -> str:
    faces = Faces(synthetic_faces(12), NAMES)
    pairs = pairs_from_identities([name.split("/")[0] for name in NAMES])
    a, b = (
        Side(label, encode=lambda _, noise=noise: embeddings(noise)) for label, noise in (("A", 0.0), ("<B>", 0.02))
    )
    report = compare_sides(a, b, faces, 1e-5, pairs).report
    report["findings"] = [{"fault": "weights or precision", "sentence": "A <long> sentence.", "rows": []}]
    layers = [{"tensor": f"layer{i}", "operator": "Conv", "relative": 10.0 ** (i - 9)} for i in range(9)]
    report["layers"] = {"layers": layers, "tolerance": 1e-3, "told": "the first that differs is layer7"}
    return compare_page(report, faces.pixels)


@pytest.fixture(scope="module")
def matrix() -> str:
    from contextlib import nullcontext

    faces = Faces(synthetic_faces(12), NAMES)
    right = Side("insightface", encode=lambda pixels: embeddings(0.0)[: len(pixels)])
    rows = {face.tobytes(): row for face, row in zip(faces.pixels, embeddings(0.02), strict=True)}
    # Depends on the size of the batch: what the row of batch invariance has to show.
    side = Side(
        "onnx", "int8", encode=lambda pixels: np.stack([rows[f.tobytes()] + 0.1 * (len(pixels) > 4) for f in pixels])
    )
    report = parity_matrix(right, [lambda: nullcontext(side)], faces, [4, 12], DRIFT_LIMITS)
    assert [row["passed"] for row in report["rows"]] == [True, True, False]
    return matrix_page(report)


def _scaled(spread: dict, factor: float) -> dict:
    return {key: value * factor for key, value in spread.items() if key != "count"} | {"count": spread["count"]}


def bench_result() -> dict:
    spread = {"median": 1.0, "low": 0.9, "high": 1.1, "count": 7}
    split = {"queue_ms": 0.5, "compute_infer_ms": 20.0, "faces_per_execution": 32.0}
    rows = [
        {
            "name": f"arcface grpc b32 c{c}", "where": "server", "model": "arcface", "protocol": "grpc", "batch": 32,
            "faces_per_s": spread, "cpu_ms_per_face": None, "server": {"arcface": split, "arcface_onnx": split},
            "latency_ms": {"p50": 10.0 * c, "p90": 12.0 * c, "p95": 13.0 * c, "p99": 15.0 * c},
            "ensemble": {
                "over": "arcface_onnx", "added_ms": _scaled(spread, 0.04), "compute_ms": _scaled(spread, 20.0),
                "share_of_compute": _scaled(spread, 0.002),
            },
        }
        for c in (1, 2)
    ]  # fmt: skip
    return {
        "variants": rows,
        "ratios": [{"variant": rows[0]["name"], "base": "bare b32", **spread}],
        "rounds": {"measured": 7, "kept": [0], "disturbed": True},
        "host": {"cpu": "a cpu", "versions": {"numpy": "1.26"}},
        "created": "2026-01-31T12:00:00+00:00",
        "served": {"model": "arcface", "name": "my_r50", "precision": "bf16", "contract_id": "c0ffee" * 10},
        "waterfall": [
            {"step": "bare ONNX Runtime", "ms_per_face": spread, "over_bare_us": {**spread, "median": 0.0}},
            {"step": "gRPC", "ms_per_face": {**spread, "median": 1.25}, "over_bare_us": {**spread, "median": 250.0}},
        ],
    }


class _Addresses(HTMLParser):
    found: list[str]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]
        assert tag not in ("script", "link", "iframe", "object"), tag


def test_pages_need_no_network_and_escape_what_they_are_given(compared, matrix):
    for text in (compared, matrix, bench_page(bench_result())):
        parser = _Addresses()
        parser.found = []
        parser.feed(text)
        assert all(address.startswith("data:image/png;base64,") for address in parser.found)
        assert "url(" not in text and "@import" not in text
        assert "prefers-color-scheme: dark" in text and "@media print" in text
    assert "&lt;B&gt; against A" in compared and "<B>" not in compared


def test_the_comparison_shows_verdict_finding_curves_and_the_worst_faces(compared):
    for words in (
        "Failed: largest drift",
        "A &lt;long&gt; sentence.",
        "ROC",
        "Faces by drift",
        "the first that differs is layer7",
    ):
        assert words in compared
    assert compared.count("data:image/png;base64,") == 8
    drifts = [float(d) for d in re.findall(r"<figcaption>p\d/\d\.jpg: 1 − cosine ([0-9.e-]+)", compared)]
    assert len(drifts) == 8 and drifts == sorted(drifts, reverse=True)


def test_the_matrix_shades_what_is_near_its_limit(matrix):
    assert "1 of 3 combinations exceed their limits: onnx int8 batch 12" in matrix
    shades = [float(s) for s in re.findall(r"rgba\(var\(--heat\), ([0-9.]+)\)", matrix)]
    assert len(shades) == 6
    assert max(shades) > 2 * min(shades), "what is outside its limit looks like what is far inside"


def test_the_benchmark_shows_overheads_and_says_when_it_is_not_reliable():
    text = bench_page(bench_result())
    assert "1.250 ms, +250 µs" in text
    assert f"my_r50 (bf16), contract {'c0ffee' * 10}; 2026-01-31T12:00:00+00:00; 1 of 7 rounds kept; a cpu" in text
    assert ">1</text>" in text and "Faces per second: median, p10–p90</figcaption>" in text
    assert "Not reliable" in text
    assert "<td>arcface_onnx</td>" in text and ">0.2000%</td>" in text


def test_a_spreadsheet_reads_every_figure_under_its_name() -> None:
    first, second = csv.DictReader(bench_csv(bench_result()).splitlines())
    assert (first["variant"], second["variant"]) == ("arcface grpc b32 c1", "arcface grpc b32 c2")
    figures = {key: float(value) for key, value in first.items() if key not in ("variant", "where") and value}
    assert figures["faces_per_s"] == 1.0 and figures["ratio_to_bare"] == 1.0
    assert second["ratio_to_bare"] == "", "only the first has a ratio"
    assert (figures["p50_ms"], figures["p90_ms"], figures["p99_ms"]) == (10.0, 12.0, 15.0)
    assert (figures["queue_ms"], figures["compute_ms"]) == (0.5, 20.0)
    assert (figures["ensemble_added_ms"], figures["ensemble_share_of_compute"]) == (0.04, 0.002)
    assert None not in first and None not in second, "a row is longer than the heading"


@pytest.mark.parametrize(
    ("low", "high", "log", "ticks"),
    [
        (0, 1, False, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0.9, 1, False, [0.9, 0.92, 0.94, 0.96, 0.98, 1]),
        (0, 1300, False, [0, 500, 1000]),
        (2e-4, 1, True, [1e-3, 1e-2, 0.1, 1]),
        (5, 5, False, [5]),
    ],
)
def test_axes_have_round_ticks(low, high, log, ticks):
    assert Axis("x", low, high, log).ticks() == pytest.approx(ticks)


def test_only_figures_are_set_right():
    text = table(
        ("a", "b", "c"), [("1 × 2 threads, batch 64", "1.07 (0.14–2.64)", "—"), ("x", "99.18 ± 0.11", "1e-05")]
    )
    assert text.count('<td class="n">') == 4
    assert "<td>1 × 2 threads, batch 64</td>" in text


def test_values_outside_an_axis_are_drawn_at_its_end():
    text = lines("t", [Series("s", [0.0, 2.0], [1e-12, 5.0])], Axis("x", 0, 1), Axis("y", 1e-3, 1, log=True))
    at_the_ends = lines("t", [Series("s", [0.0, 1.0], [1e-3, 1.0])], Axis("x", 0, 1), Axis("y", 1e-3, 1, log=True))
    drawn, expected = (re.search(r'<polyline points="([^"]+)"', svg).group(1) for svg in (text, at_the_ends))
    assert drawn == expected


@pytest.mark.parametrize(("width", "paper"), [(360, False), (1100, False), (688, True)])  # 688: A4 less its margins
def test_a_browser_lays_the_page_out_without_sideways_scrolling(compared, matrix, tmp_path, width, paper):
    browser = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)
    if browser is None:
        pytest.skip("no Chromium on this host: apt-get install chromium")
    pages = {"compare": compared, "matrix": matrix, "bench": bench_page(bench_result())}
    frames = ""
    for name, text in pages.items():
        if paper:  # nobody can scroll a table there
            text = text.replace("@media print", "@media all")
        (tmp_path / f"{name}.html").write_text(text)
        frames += f'<iframe src="{name}.html" style="width:{width}px;height:900px"></iframe>'
    measure = (
        "addEventListener('load', () => { const seen = [...document.querySelectorAll('iframe')].map(frame => {"
        "const root = frame.contentDocument.documentElement;"
        f"const parts = [root, ...root.querySelectorAll({'.scroll' if paper else 'html'!r})];"
        "const wider = Math.max(...parts.map(part => part.scrollWidth - part.clientWidth));"
        "return [wider, root.querySelectorAll('svg, table').length]; });"
        "document.body.textContent = 'MEASURED ' + JSON.stringify(seen); });"
    )
    (tmp_path / "all.html").write_text(f"<body>{frames}<script>{measure}</script></body>")
    line = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--dump-dom"]
    line += [f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "all.html").as_uri()]
    answer = subprocess.run(line, capture_output=True, text=True, timeout=HANG_S, check=True)
    found = re.search(r"MEASURED (\[.*\])", answer.stdout)
    assert found, answer.stdout[-500:]
    import json

    seen = json.loads(found.group(1))
    assert [wider for wider, _ in seen] == [0, 0, 0], "a page is wider than its window"
    assert all(drawn >= 2 for _, drawn in seen)
    assert Path(tmp_path / "compare.html").stat().st_size < 500_000
