"""Tuning: the search by duels, the config that it writes, and that config served by a real Triton."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from arcface_build.bench.interleaved import Spread
from arcface_build.bench.tune import Duel, Settings, read_settings, search, with_settings, write_tuned
from arcface_build.reports.tune_page import tune_page
from arcface_build.repository.install import install
from arcface_build.serving.ports import free_ports
from deadlines import HANG_S

SHIPPED = Settings()


def judge_by(speed, latency=lambda settings: 10.0, spread: float = 0.01, count: int = 5):
    """A duel in which the faster one wins by the ratio of `speed`, within ± spread."""

    def duel(champion: Settings, challenger: Settings) -> Duel:
        ratio = speed(challenger) / speed(champion)
        measured = Spread(ratio, ratio - spread, ratio + spread, count)
        return Duel(champion, challenger, measured, latency(champion), latency(challenger), 100.0, 100.0 * ratio)

    return duel


def test_the_search_climbs_stage_by_stage():
    def speed(settings: Settings) -> float:
        return 100 + 10 * (settings.instances == 2) - 5 * (settings.queue_delay_us > 0) + 8 * (settings.max_batch == 32)

    best, duels = search(SHIPPED, 2, 8, judge_by(speed))
    assert best == Settings(2, 1, 0, 32)
    assert duels[-1].champion == SHIPPED and duels[-1].challenger == best, "the last duel is against the shipped one"
    assert len({(d.champion, d.challenger) for d in duels}) == len(duels)


@pytest.mark.parametrize(
    "duel",
    [
        judge_by(lambda settings: 100 + 0.1 * settings.instances),  # better by less than anyone would notice
        judge_by(lambda settings: 100 + 10 * settings.instances, spread=0.2),  # better on average, not in each round
        judge_by(lambda settings: 100 + 10 * settings.instances, count=2),  # too few undisturbed rounds
    ],
)
def test_chance_does_not_tune(duel):
    best, _ = search(SHIPPED, 2, 8, duel)
    assert best == SHIPPED


def test_under_a_latency_limit_a_setting_that_keeps_it_beats_a_faster_one_that_does_not():
    def latency(settings: Settings) -> float:
        return 50.0 if settings.max_batch > 16 else 20.0

    duel = judge_by(lambda settings: 100.0 - (settings.max_batch == 16), latency)
    assert search(SHIPPED, 2, 8, duel, latency_limit_ms=30)[0].max_batch == 16
    assert search(SHIPPED, 2, 8, duel)[0] == SHIPPED
    assert search(SHIPPED, 2, 32, duel, latency_limit_ms=30)[0] == SHIPPED, "a batch of 32 does not fit 16"


def test_settings_survive_the_config_and_warm_up_fits_the_largest_batch():
    base = (Path(__file__).parent.parent / "model_repository" / "arcface_onnx" / "config.pbtxt").read_text()
    assert read_settings(base) == SHIPPED
    text = with_settings(base, Settings(2, 1, 500, 16), "why\nso")
    assert text.startswith("# why\n# so\n")
    assert read_settings(text) == Settings(2, 1, 500, 16)
    assert "batch_size: 64" not in text


def test_a_tuned_config_is_served_with_its_ensembles_and_falls_with_the_weights(
    demo_repository, start_triton, tmp_path
):
    repository = tmp_path / "model_repository"
    shutil.copytree(demo_repository, repository, symlinks=True)
    written = write_tuned(repository, Settings(2, 1, 500, 16), "measured")
    assert [f"{p.parent.parent.name}/{p.name}" for p in written] == [
        f"{name}/tuned.pbtxt" for name in ("arcface_onnx", "arcface", "arcface_parity")
    ]
    server = start_triton(repository, ["arcface"], config_name="tuned")
    with urllib.request.urlopen(f"http://{server.http_url}/v2/models/arcface_onnx/config") as answer:
        config = json.load(answer)
    assert (config["max_batch_size"], config["instance_group"][0]["count"]) == (16, 2)
    assert config["dynamic_batching"]["max_queue_delay_microseconds"] == 500
    assert config["parameters"]["contract_id"]["string_value"], "a client must still learn the contract"
    server.stop()
    code = "import sys; from arcface_build.cli import main; main(sys.argv[1:])"
    line = [sys.executable, "-c", code, "serve", "--once", "--no-reference", "--model-config-name", "tuned"]
    ports = free_ports()
    line += ["--http-port", str(ports.http), "--grpc-port", str(ports.grpc), "--metrics-port", str(ports.metrics)]
    line += ["--model-repository", str(repository)]
    answer = subprocess.run(line, capture_output=True, text=True, timeout=HANG_S)
    assert answer.returncode == 0, answer.stderr
    assert written[0].exists(), "serving what was tuned must not choose other weights first"
    manifest = json.loads(next((repository / "arcface_onnx").glob("*/manifest.json")).read_text())
    weights = next((repository / "arcface_onnx").glob("*/model.onnx"))
    install(repository, "arcface_onnx", {"model.onnx": weights}, {**manifest, "precision": "bf16"})
    assert not written[0].exists(), "other weights must not be served with the contract of these"
    answer = subprocess.run(line, capture_output=True, text=True, timeout=HANG_S)
    assert answer.returncode == 3
    assert answer.stderr == (
        "Missing: arcface_onnx has no configs/tuned.pbtxt for the weights that it serves. Next: arcface tune\n"
    )


def test_the_page_shows_the_frontier_and_every_duel():
    best, duels = search(SHIPPED, 2, 8, judge_by(lambda settings: 100 + 10 * settings.instances))
    load = {"batch": 8, "concurrency": 4, "latency_limit_ms": None}
    text = tune_page(
        {
            "load": load, "beaten": True, "best": str(best), "shipped": str(SHIPPED), "host": {},
            "duels": [json.loads(json.dumps(d.to_json())) | {"won": d.won(None)} for d in duels],
        }
    )  # fmt: skip
    assert "Best: 2 × 1 threads, delay 0 µs, max batch 64. Shipped: 1 × all its threads" in text
    assert text.count("<tr>") == len(duels) + 1
    assert text.count("<circle") >= 2
