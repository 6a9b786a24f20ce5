"""Photos in, faces out, by the real server: as our own detector finds them, over every way that a photo can come."""

from __future__ import annotations

import asyncio
import base64
import http.client
import json
import os
import pickle
import re
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from dataclasses import fields
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from click.testing import CliRunner

from arcface_build.cli import cli
from arcface_build.serving.process import TritonProcess
from arcface_clients import AsyncPhotoEmbedder, PhotoEmbedder, TritonEmbedder
from arcface_clients.errors import (
    ClientUnusable,
    ConfigError,
    ContractMismatch,
    InvalidFaces,
    ModelNotReady,
    ServerUnreachable,
    WrongUse,
)
from arcface_clients.faces.detect import MODEL_NAME, FaceDetector
from arcface_clients.faces.photos import read_photo
from arcface_clients.photos.analysis import FaceAnalysis
from arcface_clients.photos.face import Face, Verified
from arcface_clients.photos.npz import embed_photos_to_npz
from arcface_clients.photos.session import PhotoSession, encoded
from arcface_clients.triton.options import ClientOptions, PhotoArguments
from conftest import REPO
from deadlines import HANG_S
from test_alerts import Prometheus, panel_expressions

STEPS = ("decode", "detect", "align", "scrfd", "yunet", "refusal")


@pytest.fixture(scope="module")
def portraits(assets: Path) -> list[Path]:
    """Twelve photos of 250×250; some show more than one face."""
    return [sorted(folder.iterdir())[0] for folder in sorted((assets / "faces" / "raw250").iterdir())[:12]]


@pytest.fixture(scope="module")
def detector(assets: Path) -> FaceDetector:
    return FaceDetector(assets / "detectors" / MODEL_NAME)


@pytest.mark.parametrize(("model", "step"), [*(("photo_faces", step) for step in STEPS), ("photo_verify", "refusal")])
def test_the_served_steps_are_the_files_of_the_package(model: str, step: str) -> None:
    served = REPO / "model_repository" / model / "1" / f"{step}.py"
    ours = REPO / "clients" / "arcface_clients" / "faces" / "steps" / f"{step}.py"
    assert served.read_bytes() == ours.read_bytes(), f"cp {ours} {served}"


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_the_server_finds_what_the_client_finds(
    photo_server: TritonProcess, portraits: list[Path], detector: FaceDetector, protocol: str
) -> None:
    url = photo_server.grpc_url if protocol == "grpc" else f"http://{photo_server.http_url}"
    with PhotoEmbedder(url, crops=True) as photos, TritonEmbedder(photo_server.grpc_url) as embedder:
        for portrait in portraits:
            expected, found = detector.detect_encoded(portrait.read_bytes()), photos.faces(portrait)
            assert len(found) == len(expected)
            for mine, theirs in zip(expected, found, strict=True):
                assert np.allclose(theirs.box, mine.box, atol=1e-3)
                assert np.allclose(theirs.landmarks, mine.landmarks, atol=1e-3)
                assert theirs.score == pytest.approx(mine.score, abs=1e-5)
                assert theirs.crop is not None
                embedding, norm = embedder.encode_with_norms(mine.face)
                assert embedding[0] @ theirs.embedding >= 0.9999
                assert theirs.norm == pytest.approx(norm[0], rel=1e-2)


def test_plain_http_takes_the_file_base64_and_generate(photo_server: TritonProcess, portraits: list[Path]) -> None:
    data = portraits[0].read_bytes()
    text = base64.b64encode(data).decode()
    as_json = {"inputs": [{"name": "image", "shape": [1], "datatype": "BYTES", "data": [text]}]}
    status, _, answer = post(photo_server, "infer", json.dumps(as_json).encode())
    assert status == 200
    outputs = {output["name"]: output for output in json.loads(answer)["outputs"]}
    faces = outputs["score"]["shape"][0]
    assert faces >= 1
    assert outputs["embedding"]["shape"] == [faces, 512]
    assert "crop" not in outputs  # 37,632 numbers a face, in JSON: only for who asks
    status, headers, answer = post(photo_server, "infer", data, {"Inference-Header-Content-Length": "0"})
    head = json.loads(answer[: int(headers["Inference-Header-Content-Length"])])
    assert status == 200
    assert {output["name"]: output["shape"] for output in head["outputs"]} == {
        name: output["shape"] for name, output in outputs.items()
    }
    status, _, answer = post(photo_server, "generate", json.dumps({"image": text}).encode())
    assert status == 200
    assert len(np.ravel(json.loads(answer)["embedding"])) == faces * 512


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_the_asyncio_client_answers_as_the_plain_one(
    photo_server: TritonProcess, portraits: list[Path], protocol: str
) -> None:
    url = photo_server.grpc_url if protocol == "grpc" else f"http://{photo_server.http_url}"
    items: list[Any] = [*portraits[:3], b"text", Path("no such file.jpg"), read_photo(portraits[3])]

    async def later() -> AsyncIterator[Any]:
        for item in items:
            yield item

    async def ask() -> tuple[list[Any], list[Any], list[Face], list[Verified | None]]:
        async with AsyncPhotoEmbedder(url) as photos:
            await photos.ensure_ready()
            plain = [answer async for answer in photos.faces_stream(items)]
            lazy = [answer async for answer in photos.faces_stream(later())]
            one, *pairs = await asyncio.gather(
                photos.faces(portraits[0]),
                photos.verify(portraits[0], portraits[1]),
                photos.verify(portraits[0], np.zeros((90, 90, 3), np.uint8)),
            )
            return plain, lazy, one, pairs

    plain_stream, async_stream, one, pairs = asyncio.run(ask())
    with PhotoEmbedder(url) as photos:
        expected = list(photos.faces_stream(items))
        same_pair = photos.verify(portraits[0], portraits[1])
    for found in (plain_stream, async_stream):
        assert list(map(str, map(boxes, found))) == list(map(str, map(boxes, expected)))
    assert [type(answer) for answer in expected[3:5]] == [InvalidFaces, InvalidFaces]
    assert boxes(one) == boxes(expected[0])
    assert pairs[1] is None
    assert pairs[0] is not None and same_pair is not None
    assert pairs[0].similarity == pytest.approx(same_pair.similarity, abs=1e-4)
    assert (pairs[0].box_a, pairs[0].box_b) == (same_pair.box_a, same_pair.box_b)


def boxes(answer: list[Face] | InvalidFaces) -> Any:
    return str(answer) if isinstance(answer, InvalidFaces) else [face.box for face in answer]


def test_an_asyncio_stream_that_is_left_early_cancels_what_is_under_way(
    photo_server: TritonProcess, portraits: list[Path]
) -> None:
    async def leave() -> int:
        taken = 0

        def source() -> Iterator[Path]:
            nonlocal taken
            for portrait in portraits:
                taken += 1
                yield portrait

        async with AsyncPhotoEmbedder(photo_server.grpc_url, in_flight=2) as photos:
            async with aclosing(photos.faces_stream(source())) as answers:
                assert boxes(await anext(answers))
            left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            assert not left
            assert boxes(await photos.faces(portraits[0]))  # the connection is as good as before
        return taken

    assert asyncio.run(leave()) <= 3


def test_a_client_of_photos_is_pickled_as_its_arguments_and_refuses_use_after_its_end() -> None:
    made = PhotoEmbedder("127.0.0.1:9", min_score=0.8, crops=True, retry_for_s=0, total_timeout_s=2.0)
    again = pickle.loads(pickle.dumps(made))
    assert vars(again.options) == vars(made.options)
    assert again._wishes == made._wishes == {"min_score": 0.8, "min_size": None, "max_faces": None, "crops": True}
    with pytest.raises(ServerUnreachable):
        again.faces(b"photo")
    again.close()
    with pytest.raises(ClientUnusable):
        again.faces(b"photo")
    with pytest.raises(TypeError, match="unexpected keyword argument 'min_scores'"):
        PhotoEmbedder(min_scores=0.8)  # type: ignore[call-arg]


@pytest.mark.parametrize("shape", [(0, 5, 3), (5, 0, 3)])
def test_pixels_of_which_there_are_none_are_a_bad_photo_and_do_not_end_a_stream(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidFaces, match=r"the photo has no pixels"):
        encoded(np.zeros(shape, np.uint8))
    with PhotoEmbedder("127.0.0.1:1") as photos:
        (answer,) = photos.faces_stream([np.zeros(shape, np.uint8)])
    assert isinstance(answer, InvalidFaces)


@pytest.mark.parametrize("contract", ["short", "z" * 64])
def test_what_cannot_be_a_contract_id_is_refused_when_the_client_is_made(contract: str) -> None:
    with pytest.raises(ConfigError, match="expected_contract"):
        PhotoEmbedder(expected_contract=contract)


@pytest.mark.parametrize(("took_s", "error"), [(61, InvalidFaces), (1, ModelNotReady)])
def test_a_photo_that_ends_two_processes_is_refused_and_not_sent_for_ever(
    monkeypatch: pytest.MonkeyPatch, took_s: float, error: type[Exception]
) -> None:
    now_s = 1000.0
    monkeypatch.setattr("arcface_clients.photos.session.time.monotonic", lambda: now_s)
    steps = PhotoSession(ClientOptions(model="photo_faces"), {}, crops=False).faces(b"photo", retry_for_s=600)
    asked, sent = next(steps), 0
    with pytest.raises(error, match="not healthy"):
        while True:
            if asked[0] == "infer_files":
                sent += 1
                now_s += took_s
                asked = steps.throw(ModelNotReady("Stub process 'photo_faces_0_1' is not healthy."))
            else:
                now_s += asked[1]
                asked = steps.send(None)
    assert (sent == 2) == (error is InvalidFaces)


def test_the_arguments_that_a_type_checker_knows_are_those_of_the_options() -> None:
    told = PhotoArguments.__annotations__
    assert {"url", "model", "shared_memory", *told} == {field.name for field in fields(ClientOptions)}


def test_no_face_is_an_answer(photo_server: TritonProcess) -> None:
    with PhotoEmbedder(photo_server.grpc_url) as photos:
        assert photos.faces(np.full((300, 200, 3), 127, np.uint8)) == []


def post(
    server: TritonProcess, method: str, body: bytes, headers: dict[str, str] | None = None, model: str = "photo_faces"
) -> tuple[int, dict[str, Any], bytes]:
    """Status, headers and body of a request without any client of ours."""
    host, port = server.http_url.split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=HANG_S)
    try:
        connection.request("POST", f"/v2/models/{model}/{method}", body, headers or {})
        reply = connection.getresponse()
        return reply.status, dict(reply.headers), reply.read()
    finally:
        connection.close()


def test_two_photos_are_compared_by_their_most_alike_faces(photo_server: TritonProcess, portraits: list[Path]) -> None:
    with PhotoEmbedder(photo_server.grpc_url) as photos:
        a, b = photos.faces(portraits[0]), photos.faces(portraits[1])
        expected = max(float(mine.embedding @ theirs.embedding) for mine in a for theirs in b)
        pair = photos.verify(portraits[0], portraits[1], max_distance=1 - expected + 1e-3)
        assert pair is not None
        assert pair.similarity == pytest.approx(expected, abs=1e-4)
        assert pair.same
        assert pair.box_a in [face.box for face in a]
        assert pair.box_b in [face.box for face in b]
        assert not pair.calibrated  # the caller's own limit
        assert pair.max_distance == pytest.approx(1 - expected + 1e-3)
        guessed = photos.verify(portraits[0], portraits[1])
        assert guessed is not None
        assert (guessed.calibrated, guessed.max_distance) == (False, pytest.approx(0.65))
        farther = photos.verify(portraits[0], portraits[1], max_distance=1 - expected - 1e-3)
        assert farther is not None
        assert not farther.same
        assert photos.verify(portraits[0], np.zeros((90, 90, 3), np.uint8)) is None
        with pytest.raises(InvalidFaces, match="not an image"):
            photos.verify(portraits[0], b"text")


def test_a_stream_gives_each_photo_its_own_faces_and_goes_on_after_a_bad_one(
    photo_server: TritonProcess, portraits: list[Path]
) -> None:
    with PhotoEmbedder(photo_server.grpc_url) as photos:
        alone = [photos.faces(portrait) for portrait in portraits]
        items: list[Any] = [*portraits[:5], b"text", Path("no such file.jpg"), *portraits[5:]]
        answers = list(photos.faces_stream(iter(items)))
    assert isinstance(answers[5], InvalidFaces)
    assert isinstance(answers[6], InvalidFaces)
    good = [answer for answer in answers if not isinstance(answer, InvalidFaces)]
    for mine, theirs in zip(alone, good, strict=True):
        assert [face.box for face in mine] == [face.box for face in theirs]
        assert all(a.embedding @ b.embedding > 0.9999 for a, b in zip(mine, theirs, strict=True))


def test_parameters_choose_which_faces_are_answered(photo_server: TritonProcess, portraits: list[Path]) -> None:
    with PhotoEmbedder(photo_server.grpc_url) as photos:
        several = next(p for p in portraits if len(photos.faces(p)) > 1)
        everyone = photos.faces(several)
    with PhotoEmbedder(photo_server.grpc_url, max_faces=1) as photos:
        assert [face.box for face in photos.faces(several)] == [everyone[0].box]
    with PhotoEmbedder(photo_server.grpc_url, min_size=240) as photos:
        assert photos.faces(several) == []
    with PhotoEmbedder(photo_server.grpc_url, min_score=0.98) as photos:
        assert len(photos.faces(several)) < len(everyone)
    with (
        PhotoEmbedder(photo_server.grpc_url, min_score=7) as photos,
        pytest.raises(WrongUse, match=r"min_score is '?7'?: expected a number in 0.01..0.99"),
    ):
        photos.faces(several)
    with (
        PhotoEmbedder(photo_server.grpc_url) as photos,
        pytest.raises(WrongUse, match=r"max_distance is 3: expected a number in 0..2"),
    ):
        photos.verify(several, several, max_distance=3)


def test_a_face_of_face_analysis_is_used_as_insightfaces_own(photo_server: TritonProcess, assets: Path) -> None:
    several = [sorted(folder.iterdir())[0] for folder in sorted((assets / "faces" / "raw250").iterdir())[:3]]
    image = np.hstack([read_photo(path) for path in several])
    with FaceAnalysis(photo_server.grpc_url) as app:
        app.prepare()
        faces = app.get(image)
        assert len(app.get(image, max_num=-1)) == len(faces) >= 3, "below 0 it means all, as 0 does"
        (largest,) = app.get(image, max_num=1, det_metric="max")
        assert largest.bbox.tolist() == max(faces, key=lambda f: np.prod(f.bbox[2:] - f.bbox[:2])).bbox.tolist()
        with pytest.raises(WrongUse, match=r"max_num is '1'"):
            app.get(image, max_num="1")  # type: ignore[arg-type]
    face, other = faces[:2]
    assert (face.det_score.dtype, face.embedding_norm.dtype) == (np.float32, np.float32)
    assert (face.age, face.sex, face.get("gender")) == (None, None, None)
    assert set(face) == set(dict(face)) == {"bbox", "kps", "det_score", "embedding"}
    assert "embedding" in face
    assert np.array_equal(face["normed_embedding"], face.normed_embedding)
    with pytest.raises(KeyError):
        face["nothing"]
    face.name = "somebody"
    face["kps"] *= 2  # back to a photo of another size
    again = pickle.loads(pickle.dumps(face))
    assert (again.name, type(again)) == ("somebody", type(face)) and np.array_equal(again.kps, face.kps)
    face.embedding = face.embedding + other.embedding
    assert np.linalg.norm(face.normed_embedding) == pytest.approx(1, abs=1e-5)
    assert face.normed_embedding @ face.embedding == pytest.approx(face.embedding_norm, rel=1e-5)
    with pytest.raises(AttributeError, match="follows from embedding"):
        face.normed_embedding = other.embedding


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_numbers_of_any_type_are_sent_and_anything_else_is_refused_before(
    photo_server: TritonProcess, portraits: list[Path], protocol: str
) -> None:
    url = photo_server.grpc_url if protocol == "grpc" else f"http://{photo_server.http_url}"
    with PhotoEmbedder(url, min_score=np.float32(0.5), max_faces=np.int64(1)) as photos:  # type: ignore[arg-type]
        assert len(photos.faces(portraits[0])) == 1
        limit: Any = np.float32(0.5)
        assert photos.verify(portraits[0], portraits[0], max_distance=limit)
        with pytest.raises(ConfigError, match=r"max_distance is b'1'; expected a number"):
            photos.verify(portraits[0], portraits[0], max_distance=b"1")  # type: ignore[arg-type]
    for huge in (1 << 63, 10**400):
        with PhotoEmbedder(url, min_size=huge) as photos, pytest.raises(WrongUse, match="min_size"):
            photos.faces(portraits[0])


WRONG: list[dict[str, Any]] = [
    *({name: value} for name in ("min_score", "min_size", "max_faces") for value in ("0.5", b"1", [1], np.True_)),
    *({"expected_contract": 7}, {"headers": "x"}, {"model": "\ud800"}),
]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_an_argument_that_cannot_be_sent_is_a_config_error_that_names_it(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(ConfigError, match=name):
        PhotoEmbedder(**wrong)


def test_what_is_no_file_of_a_photo_is_refused_without_waiting_and_a_stream_goes_on(
    photo_server: TritonProcess, portraits: list[Path], tmp_path: Path
) -> None:
    pipe, large = tmp_path / "pipe.jpg", tmp_path / "large.jpg"
    os.mkfifo(pipe)
    with large.open("wb") as file:
        file.truncate(1 << 40)  # without a block on the disk
    tall, huge = np.zeros((1_000_001, 1, 3), np.uint8), np.broadcast_to(np.zeros((1, 1, 3), np.uint8), (9000, 9000, 3))
    unread = cv2.imread(str(tmp_path / "nowhere.png"))  # None
    wrong: list[Any] = [pipe, "/dev/zero", large, "a\0b", "\ud800.jpg", tall, huge, unread]

    async def answers() -> list[Any]:
        async with AsyncPhotoEmbedder(photo_server.grpc_url) as photos:
            return [answer async for answer in photos.faces_stream([*wrong, portraits[0]])]

    with PhotoEmbedder(photo_server.grpc_url) as photos:
        for found in (list(photos.faces_stream([*wrong, portraits[0]])), asyncio.run(answers())):
            assert all(isinstance(answer, InvalidFaces) for answer in found[:-1])
            for word, answer in zip(
                ("pipe", "device", "bytes", "name", "name", "PNG", "80,000,000", "imread"), found[:-1], strict=True
            ):
                assert word in str(answer)
            assert isinstance(found[-1], list) and found[-1]
    with pytest.raises(InvalidFaces, match="pipe"):
        read_photo(pipe)
    with pytest.raises(IsADirectoryError):
        read_photo(tmp_path)


def test_the_metrics_count_photos_and_faces(photo_server: TritonProcess, portraits: list[Path]) -> None:
    before = settled_metrics(photo_server)
    with PhotoEmbedder(photo_server.grpc_url) as photos:
        faces = sum(len(photos.faces(portrait)) for portrait in portraits[:4])
    after = settled_metrics(photo_server)
    assert after['arcface_photos{outcome="answered"}'] - before['arcface_photos{outcome="answered"}'] == 4
    counted = 'arcface_photo_faces_sum{model="photo_faces"}'
    assert after[counted] - before[counted] == faces
    for stage in ("decode", "detect", "align", "embed"):
        name = f'arcface_photo_stage_us{{stage="{stage}"}}'
        assert after[name] > before[name]


def test_the_dashboard_shows_photos_on_a_real_prometheus(
    photo_server: TritonProcess, portraits: list[Path], tmp_path: Path
) -> None:
    running = Prometheus(tmp_path, f"127.0.0.1:{photo_server.ports.metrics}")
    try:
        running.wait_for('up{job="arcface"} == 1')
        with PhotoEmbedder(photo_server.grpc_url) as photos:
            faces = [len(photos.faces(portrait)) for portrait in portraits]
        scrapes = sum(running.values("count_over_time(up[5m])"))
        running.wait_for(f"sum(count_over_time(up[5m])) >= {scrapes + 3}")
        shown = {title: running.values(expr) for title, expr in panel_expressions() if "arcface_photo" in expr}
    finally:
        running.stop()
    assert shown.keys() == {"Photos a second", "Faces a photo", "Time a photo by stage"}
    assert max(shown["Photos a second"]) > 0
    assert shown["Faces a photo"] == [pytest.approx(np.mean(faces))]
    assert len(shown["Time a photo by stage"]) == 4
    assert min(shown["Time a photo by stage"]) > 0


DOCUMENTED = (REPO / "docs" / "photos.md").read_text()


@pytest.mark.parametrize("block", re.findall(r"```bash\n(.*?)```", DOCUMENTED, re.DOTALL))
def test_the_documented_curl_lines_work(
    photo_server: TritonProcess, portraits: list[Path], tmp_path: Path, block: str
) -> None:
    if shutil.which("curl") is None:
        pytest.skip("no curl")
    (tmp_path / "photo.jpg").write_bytes(portraits[0].read_bytes())
    script = block.replace("localhost:8000", photo_server.http_url).replace("curl -s ", "curl -sf --noproxy '*' ")
    done = subprocess.run(["bash", "-e", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=HANG_S)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"name":"embedding"') == 1  # infer
    assert done.stdout.count('"embedding":[') == 1  # generate
    assert b'"binary_data_size"' in (tmp_path / "faces.bin").read_bytes()


def test_the_blocks_of_readme_are_those_that_are_tried_here() -> None:
    readme = (REPO / "README.md").read_text()
    shown = re.findall(r"```(?:js|python)\n[^`]*?photo_faces[^`]*```|```python\n[^`]*PhotoEmbedder[^`]*```", readme)
    assert len(shown) == 2 and all(block in DOCUMENTED for block in shown)


def test_the_documented_javascript_works(photo_server: TritonProcess, portraits: list[Path], tmp_path: Path) -> None:
    if shutil.which("node") is None:
        pytest.skip("no node")
    (code,) = re.findall(r"```js\n(.*?)```", DOCUMENTED, re.DOTALL)
    uri = f"data:image/jpeg;base64,{base64.b64encode(portraits[0].read_bytes()).decode()}"
    (tmp_path / "photo.mjs").write_text(
        f"const file = null, readAsDataURL = async () => {json.dumps(uri)};\n"
        + code.replace("localhost:8000", photo_server.http_url)
        + "console.log(faces.box.length);\n"
    )
    done = subprocess.run(["node", "photo.mjs"], cwd=tmp_path, capture_output=True, text=True, timeout=HANG_S)
    if "fetch is not defined" in done.stderr:
        pytest.skip("this node is older than 18")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 4


def test_the_documented_python_works(
    photo_server: TritonProcess,
    portraits: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, portrait in zip(("photo.jpg", "a.jpg", "b.jpg"), portraits * 3, strict=False):
        Path(name).write_bytes(portrait.read_bytes())
    names = {"paths": ["a.jpg", "b.jpg"], "image": cv2.imread("photo.jpg")}
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENTED, re.DOTALL)
    for block in blocks:
        exec(block.replace("localhost:8001", photo_server.grpc_url), names)
    assert "(512,)" in capsys.readouterr().out
    assert len(blocks) == 4 and names["pair"] is not None and len(names["faces"]) > 0


def settled_metrics(server: TritonProcess) -> dict[str, float]:
    """The metrics when they change no more: each instance tells its sums half a second late."""
    before: dict[str, float] = {}
    while (now := metrics(server)) != before:
        before = now
        time.sleep(1)
    return now


def metrics(server: TritonProcess) -> dict[str, float]:
    """Triton's metrics of photos by their full names."""
    connection = http.client.HTTPConnection("127.0.0.1", server.ports.metrics, timeout=HANG_S)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    return {
        name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if "arcface_photo" in line[:14])
    }


def test_embed_detects_on_the_server_with_the_same_output(
    photo_server: TritonProcess, portraits: list[Path], assets: Path, tmp_path: Path
) -> None:
    detector = str(assets / "detectors" / MODEL_NAME)
    sources = [*map(str, portraits[:4]), str(tmp_path / "missing.jpg")]
    written = {}
    for way, options in {"client": ["--detector", detector], "server": [], "auto": []}.items():
        output = tmp_path / f"{way}.npz"
        flag = "--detect" if way == "auto" else f"--detect={way}"
        line = ["embed", flag, *sources, "-o", str(output), "--url", photo_server.grpc_url, "--json", *options]
        result = CliRunner().invoke(cli, line, standalone_mode=False)
        assert result.exception is None, result.output
        summary = json.loads(result.stdout)
        assert summary["detected_by"] == ("client" if way == "client" else "server")
        assert [refused["path"] for refused in summary["refused"]] == [sources[-1]]
        written[way] = dict(np.load(output))
    for way in ("server", "auto"):
        assert written[way].keys() == written["client"].keys()
        for name in ("paths", "contract_id", "model"):
            assert (written[way][name] == written["client"][name]).all()
        assert np.einsum("nd,nd->n", written[way]["embeddings"], written["client"]["embeddings"]).min() >= 0.9999
        for name in ("scores", "boxes", "landmarks"):
            assert np.allclose(written[way][name], written["client"][name], atol=1e-2)


def test_embeddings_of_another_contract_than_the_file_would_name_are_not_written(
    photo_server: TritonProcess, portraits: list[Path], tmp_path: Path
) -> None:
    files, output, read = [str(portraits[0])] * 9, tmp_path / "out.npz", []
    with PhotoEmbedder(photo_server.grpc_url) as photos, pytest.raises(ContractMismatch, match="expected 0000000000"):
        embed_photos_to_npz(
            files, photos, output, contract_id="0" * 64, model="arcface", on_file=lambda: read.append(1)
        )
    assert not output.exists()
    assert not read  # the first face says it, and not the last


def test_a_bulk_job_has_the_server_find_the_faces_with_the_same_rows(
    photo_server: TritonProcess, portraits: list[Path], assets: Path, tmp_path: Path
) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    people = sorted((assets / "faces" / "aligned112").iterdir())[:2]
    crops = np.stack([read_photo(min(folder.iterdir())) for folder in people])
    photos = tmp_path / "photos"
    photos.mkdir()
    for number, portrait in enumerate(portraits[:5]):
        shutil.copy(portrait, photos / f"{number}.jpg")
    (photos / "2a.jpg").write_bytes(b"text")
    cv2.imwrite(str(photos / "3a.png"), np.full((90, 90, 3), 127, np.uint8))
    np.save(photos / "aligned.npy", crops)
    written, refused = {}, {}
    for way, options in {"client": ["--detector", assets / "detectors" / MODEL_NAME], "auto": [], "server": []}.items():
        output = tmp_path / f"{way}.parquet"
        flag = "--detect" if way == "auto" else f"--detect={way}"
        line = ["embed", flag, photos, "-o", output, "--url", photo_server.grpc_url, "--unit-rows", 3, "--json"]
        result = CliRunner().invoke(cli, [*map(str, [*line, *options])], standalone_mode=False)
        assert result.exception is None, result.output
        summary = json.loads(result.stdout)
        assert summary["detected_by"] == ("client" if way == "client" else "server")
        written[way] = parquet.read_table(output).to_pydict()
        refused[way] = [json.loads(row) for row in Path(summary["refused_list"]).read_text().splitlines()]
    expected = written["client"]
    assert len(expected["path"]) > 5
    told = {Path(row["path"]).name: row["reason"] for row in refused["client"]}
    assert told.keys() == {"2a.jpg", "3a.png", "aligned.npy[0]", "aligned.npy[1]"}
    assert told["aligned.npy[0]"] == "an array of crops, not an image: embed it without --detect"
    for way in ("auto", "server"):
        assert [row["path"] for row in refused[way]] == [row["path"] for row in refused["client"]]
        assert {Path(row["path"]).name: row["reason"] for row in refused[way]}.items() >= {
            (name, reason) for name, reason in told.items() if name != "2a.jpg"
        }
        assert written[way].keys() == expected.keys()
        for name in ("path", "identity", "contract_id", "digest"):
            assert written[way][name] == expected[name], name
        cosines = np.einsum("nd,nd->n", np.array(written[way]["embedding"]), np.array(expected["embedding"]))
        assert cosines.min() >= 0.9999


def test_face_analysis_answers_with_insightfaces_fields(photo_server: TritonProcess, portraits: list[Path]) -> None:
    image = read_photo(portraits[0])
    with FaceAnalysis(photo_server.grpc_url) as app, PhotoEmbedder(photo_server.grpc_url, min_score=0.5) as photos:
        app.prepare(ctx_id=0, det_thresh=0.5, det_size=(640, 640))
        found, expected = app.get(image), photos.faces(portraits[0])
        assert len(found) == len(expected) > 1
        for face, theirs in zip(found, expected, strict=True):
            x, y, width, height = theirs.box
            assert np.allclose(face.bbox, [x, y, x + width, y + height])
            assert np.allclose(face.kps, theirs.landmarks)
            assert face["det_score"] == theirs.score
            assert np.allclose(face.normed_embedding, theirs.embedding)
            assert np.linalg.norm(face.embedding) == pytest.approx(face.embedding_norm, rel=1e-4)
        assert len(app.get(image, max_num=1)) == 1
