"""Bad photos: a clear error or a right answer, in bounded time and memory; never a dead instance."""

from __future__ import annotations

import io
import os
import random
import signal
import struct
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from arcface_build.serving.process import TritonProcess
from arcface_clients import PhotoEmbedder
from arcface_clients.errors import BackendUnavailable, InvalidFaces
from arcface_clients.photos.face import Face

MUTATIONS = 300
MEMORY_MIB = 1200  # of one instance: the interpreter, the detector, and one photo of 80 million pixels


@pytest.fixture(scope="module")
def photos(photo_server: TritonProcess) -> PhotoEmbedder:
    return PhotoEmbedder(photo_server.grpc_url, timeout_s=60, retry_for_s=0)


@pytest.fixture(scope="module")
def portrait(assets: Path, photos: PhotoEmbedder) -> Path:
    """A photo of one face, 250×250."""
    folders = sorted((assets / "faces" / "raw250").iterdir())
    return next(path for path in (min(folder.iterdir()) for folder in folders) if len(photos.faces(path)) == 1)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def heic(image: Image.Image) -> bytes:
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.register_heif_opener()
    return saved(image, "HEIF", quality=95)


def rgb16_png(image: Image.Image) -> bytes:
    """16 bits a channel, as scanners write it; Pillow cannot."""
    import cv2

    return bytes(cv2.imencode(".png", np.asarray(image)[..., ::-1].astype(np.uint16) * 257)[1])


def on_canvas(image: Image.Image) -> Image.Image:
    """In the middle of 6000×4000 pixels: 24 million."""
    canvas = Image.new("RGB", (6000, 4000), "grey")
    canvas.paste(image.resize((2500, 2500), Image.Resampling.LANCZOS), (1500, 700))
    return canvas


RIGHT: dict[str, Callable[[Image.Image], bytes]] = {
    "animated gif": lambda image: saved(
        image.quantize(), "GIF", save_all=True, append_images=[Image.new("P", image.size)] * 3
    ),
    "animated webp": lambda image: saved(image, "WEBP", save_all=True, append_images=[Image.new("RGB", image.size)]),
    "cmyk jpeg": lambda image: saved(image.convert("CMYK"), "JPEG", quality=95),
    "16 bit grey png": lambda image: saved(
        Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257), "PNG"
    ),
    "16 bit rgb png": rgb16_png,
    "grey jpeg": lambda image: saved(image.convert("L"), "JPEG", quality=95),
    "palette png": lambda image: saved(image.quantize(256), "PNG"),
    "alpha png": lambda image: saved(image.convert("RGBA"), "PNG"),
    "progressive jpeg": lambda image: saved(image, "JPEG", quality=95, progressive=True),
    "tiff": lambda image: saved(image, "TIFF"),
    "heic": heic,
    "with trailing bytes": lambda image: saved(image, "JPEG", quality=95) + b"\0" * 1000,
}


@pytest.mark.parametrize("kind", RIGHT)
def test_an_odd_photo_gets_the_right_answer(photos: PhotoEmbedder, portrait: Path, kind: str) -> None:
    (expected,), (found,) = photos.faces(portrait), photos.faces(RIGHT[kind](Image.open(portrait)))
    assert np.abs(found.landmarks - expected.landmarks).max() < 6


def test_a_large_jpeg_is_decoded_small_and_its_face_is_found_where_it_is(
    photo_server: TritonProcess, portrait: Path
) -> None:
    large = on_canvas(Image.open(portrait))
    with PhotoEmbedder(photo_server.grpc_url, crops=True) as photos:
        (expected,), (reduced,) = photos.faces(portrait), photos.faces(saved(large, "JPEG", quality=95))
        (whole,) = photos.faces(saved(large, "PNG", compress_level=1))  # cannot be decoded at a reduced size
    assert np.abs(reduced.landmarks - (expected.landmarks * 10 + [1500, 700])).max() < 60  # 6 pixels of the small one
    assert np.abs(reduced.landmarks - whole.landmarks).max() < 0.01 * whole.box[3]
    assert reduced.crop is not None and whole.crop is not None
    assert np.abs(reduced.crop.astype(int) - whole.crop.astype(int)).mean() < 8


def bomb_png() -> bytes:
    """30,000 × 30,000 pixels of nothing, in 110 kB."""
    packed = zlib.compressobj(9)
    rows = b"".join([packed.compress(bytes(3751 * 1000)) for _ in range(30)]) + packed.flush()
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 1, 0, 0, 0, 0)), (b"IDAT", rows), (b"IEND", b"")]
    parts = [struct.pack(">I", len(b)) + n + b + struct.pack(">I", zlib.crc32(n + b)) for n, b in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def said_to_be(photo: bytes, width: int, height: int) -> bytes:
    """A JPEG whose header claims another size."""
    at = photo.index(b"\xff\xc0") + 5
    return photo[:at] + struct.pack(">HH", height, width) + photo[at + 4 :]


REFUSED: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "cut in the middle": (lambda photo: photo[: len(photo) // 2], "damaged or truncated"),
    "cut in the header": (lambda photo: photo[:40], "damaged or truncated|not an image"),
    "no bytes": (lambda photo: b"", "not an image"),
    "text": (lambda photo: b"this is no photo", "not an image"),
    "base64 of text": (lambda photo: b"dGhpcyBpcyBubyBwaG90bw==", "not an image"),
    "html": (lambda photo: b"<!doctype html><title>not found</title>", "not an image"),
    "a program for Ghostscript": (lambda photo: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    "bomb of 900 million pixels": (lambda photo: bomb_png(), "pixels|too large"),
    "jpeg that claims 65500×65500": (lambda photo: said_to_be(photo, 65500, 65500), "pixels|too large"),
    "33 MB": (lambda photo: photo + bytes(2**25), "bytes; expected at most"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_bad_photo_is_refused_in_words_and_soon(photos: PhotoEmbedder, portrait: Path, kind: str) -> None:
    spoil, words = REFUSED[kind]
    photo = spoil(portrait.read_bytes())
    start_s = time.monotonic()
    with pytest.raises(InvalidFaces, match=words):
        photos.faces(photo)
    assert time.monotonic() - start_s < 20
    assert len(photos.faces(portrait)) == 1


def test_a_jpeg_that_claims_64_million_pixels_takes_no_more_time_than_one(
    photos: PhotoEmbedder, portrait: Path
) -> None:
    start_s = time.monotonic()
    photos.faces(said_to_be(portrait.read_bytes(), 8000, 8000))  # libjpeg fills what is missing with grey
    assert time.monotonic() - start_s < 20


@pytest.mark.parametrize("size", [(1, 1), (5000, 1), (1, 5000), (3, 20000), (17, 17)])
def test_a_photo_without_room_for_a_face_has_none(photos: PhotoEmbedder, size: tuple[int, int]) -> None:
    assert photos.faces(saved(Image.new("RGB", size), "PNG")) == []


def test_a_crowd_of_500_is_answered_within_bounds(photos: PhotoEmbedder, portrait: Path) -> None:
    face = Image.open(portrait).crop((60, 50, 190, 200)).resize((100, 100), Image.Resampling.LANCZOS)
    crowd = Image.new("RGB", (2500, 2000), "grey")
    for i in range(500):
        crowd.paste(face, (i % 25 * 100, i // 25 * 100))
    found = photos.faces(saved(crowd, "JPEG", quality=92))
    assert len(found) > 450
    cells = {(int(f.box[0] + f.box[2] / 2) // 100, int(f.box[1] + f.box[3] / 2) // 100) for f in found}
    assert len(cells) == len(found)


def test_mutated_photos_never_take_an_instance_down_nor_change_a_neighbours_answer(
    photo_server: TritonProcess, photos: PhotoEmbedder, portrait: Path, assets: Path
) -> None:
    image = Image.open(portrait)
    seeds = [saved(image, kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "JPEG2000")]
    good = [sorted(folder.iterdir())[1] for folder in sorted((assets / "faces" / "raw250").iterdir())[:8]]
    expected = {path: photos.faces(path) for path in good}
    before = stubs(photo_server)
    wrong: list[str] = []

    def attack(seed: int) -> None:
        rng = random.Random(seed)
        for number in range(MUTATIONS // 3):
            try:
                photos.faces(mutated(rng, seeds))
            except InvalidFaces:
                pass
            except BackendUnavailable as exc:
                wrong.append(f"mutation {seed}/{number}: {exc}")
            if number % 4 == 0:
                path = rng.choice(good)
                if not _same(photos.faces(path), expected[path]):
                    wrong.append(f"{path.name} got other faces")

    threads = [threading.Thread(target=attack, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert stubs(photo_server) == before, "an instance died and was started again"
    for pid in before:
        assert peak_mib(pid) < MEMORY_MIB


def test_the_other_instances_go_on_where_one_is_killed(
    photo_server: TritonProcess,
    photos: PhotoEmbedder,
    start_triton: Callable[..., TritonProcess],
    portrait: Path,
    demo_repository: Path,
) -> None:
    # Triton 2.51 does not start it again: a request that meets it fails after a second, and our client sends it again.
    expected = photos.faces(portrait)
    server = start_triton(demo_repository, ["arcface", "photo_faces"], exit_timeout_s=2)
    os.kill(min(stubs(server)), signal.SIGKILL)
    with PhotoEmbedder(server.grpc_url) as patient:
        answers = list(patient.faces_stream([portrait] * 24, retry_for_s=30))
    assert len(answers) == 24
    assert all(_same(faces, expected) for faces in answers)


def mutated(rng: random.Random, seeds: list[bytes]) -> bytes:
    """A photo with some bytes changed, left out, or repeated."""
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        at = rng.randrange(len(data)) if rng.random() < 0.5 else rng.randrange(min(len(data), 600))
        action = rng.random()
        if action < 0.6:
            data[at] = rng.choice((0, 255, 127, 128, rng.randrange(256)))
        elif action < 0.8:
            del data[at : at + rng.randrange(1, 400)]
        else:
            data[at:at] = data[at : at + rng.randrange(1, 400)]
        if len(data) < 16:
            break
    return bytes(data)


def stubs(server: TritonProcess) -> set[int]:
    """Process ids of the instances of photo_faces."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes().split(b"\0")
            group = int((process / "stat").read_text().rsplit(")", 1)[1].split()[2])
        except OSError:
            continue
        if group == server.pid and len(line) > 1 and b"photo_faces" in line[1]:
            found.add(int(process.name))
    return found


def peak_mib(pid: int) -> float:
    """The most memory that a process had, in MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def _same(found: list[Face] | InvalidFaces, expected: list[Face]) -> bool:
    if isinstance(found, InvalidFaces) or len(found) != len(expected):
        return False
    return all(
        np.allclose(a.landmarks, b.landmarks, atol=1e-3) and a.embedding @ b.embedding > 0.999
        for a, b in zip(found, expected, strict=True)
    )
