"""Crops from files: what is found, in which order, and what is refused with which words."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from arcface_clients.bulk.units import iter_units
from arcface_clients.errors import WrongUse
from arcface_clients.faces.images import faces_or_synthetic, find_files, load_faces
from arcface_clients.faces.synthetic import synthetic_faces

cv2 = pytest.importorskip("cv2")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two people with three crops, beside things that are no crops."""
    faces = synthetic_faces(3)
    for name, face in zip(("b/2.png", "a/1.png", "b/10.PNG"), faces, strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        assert cv2.imwrite(str(tmp_path / name), face)
    (tmp_path / "notes.txt").write_text("not an image")
    return tmp_path


def test_folder_gives_all_images_below_it_sorted(folder: Path) -> None:
    faces, names, refused = load_faces([folder])
    assert [Path(n).relative_to(folder).as_posix() for n in names] == ["a/1.png", "b/10.PNG", "b/2.png"]
    np.testing.assert_array_equal(faces, synthetic_faces(3)[[1, 2, 0]])  # PNG keeps every pixel, BGR stays BGR
    assert refused == []


def test_overlapping_sources_give_each_file_once(folder: Path) -> None:
    files = find_files([folder, f"{folder}/**/*.png", folder / "a" / "1.png"])
    assert [Path(f).name for f in files] == ["1.png", "10.PNG", "2.png"]


def test_links_to_folders_are_followed_loops_and_pipes_are_not(folder: Path, tmp_path_factory) -> None:
    linked = tmp_path_factory.mktemp("linked")
    (linked / "person").symlink_to(folder / "b")
    (linked / "person" / "back").symlink_to(linked)
    os.mkfifo(linked / "pipe.png")
    expected = [str(linked / "person" / name) for name in ("10.PNG", "2.png")]
    assert find_files([linked]) == expected
    assert [item[0] for unit in iter_units([linked], 100) for item in unit["items"]] == expected


def test_everything_in_a_folder_that_is_an_image_is_read_or_listed(folder: Path) -> None:
    from PIL import Image

    face = Image.fromarray(synthetic_faces(1)[0, :, :, ::-1])
    face.save(folder / "no_suffix", "PNG")
    face.save(folder / "c.photo", "JPEG")
    face.save(folder / "d.gif", save_all=True, append_images=[face.rotate(90)])
    face.convert("CMYK").save(folder / "e.jpg")
    (folder / "f.heic").write_bytes(b"\0\0\0\x18ftypheic and no more")
    (folder / "g.png").symlink_to(folder / "nowhere.png")
    _, names, refused = load_faces([folder])
    assert [Path(name).name for name in names] == [
        *("1.png", "10.PNG", "2.png"),
        *("c.photo", "d.gif", "e.jpg", "no_suffix"),
    ]
    reasons = {Path(crop.name).name: crop.refused for crop in refused}
    assert list(reasons) == ["f.heic", "g.png"]
    assert reasons["g.png"] == "No such file or directory"
    assert next(unit["items"] for unit in iter_units([folder], 100))[-1][0] == str(folder / "no_suffix")


@pytest.mark.parametrize("kind", ["HEIF", "AVIF"])
def test_heic_and_avif_are_decoded_where_there_is_a_decoder_and_said_where_not(kind, tmp_path, monkeypatch) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    from PIL import Image

    from arcface_clients.faces.steps import decode

    pillow_heif.register_heif_opener()
    pixels = synthetic_faces(1)[0]
    try:
        Image.fromarray(pixels[:, :, ::-1]).save(tmp_path / "a.heic", kind, quality=95)
    except (KeyError, OSError, RuntimeError) as exc:
        pytest.skip(f"no encoder for {kind} here: {exc}")
    faces, _, refused = load_faces([tmp_path])
    assert refused == []
    assert np.abs(faces[0].astype(int) - pixels.astype(int)).mean() < 6
    if kind == "HEIF":
        monkeypatch.setattr(decode, "_formats", lambda: ("JPEG", "PNG"))
        monkeypatch.setattr(decode, "_know_heif", lambda: None)
        assert "pip install pillow-heif" in load_faces([tmp_path])[2][0].refused


def test_what_cannot_be_read_is_named_with_its_reason(folder: Path) -> None:
    whole = cv2.imencode(".jpg", synthetic_faces(1)[0])[1].tobytes()
    (folder / "big.png").write_bytes(cv2.imencode(".png", np.zeros((250, 200, 3), np.uint8))[1].tobytes())
    (folder / "cut.png").write_bytes(cv2.imencode(".png", synthetic_faces(1)[0])[1].tobytes()[:40])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "good.jpg").write_bytes(whole)
    (folder / "text.jpg").write_text("not an image")
    (folder / "cut.npz").write_bytes(b"PK\x03\x04 and no more")
    faces, names, refused = load_faces([folder, "missing.png"])
    assert len(faces) == len(names) == 4
    assert {Path(c.name).name: c.refused for c in refused if not c.name.endswith(".npz")} == {
        "big.png": "expected an aligned crop of 112×112 pixels, got 200×250",
        "cut.png": "not an image that OpenCV can decode, or truncated",
        "empty.jpg": "the file is empty",
        "text.jpg": "not an image that OpenCV can decode, or truncated",
        "missing.png": "No such file or directory",
    }
    assert [c.refused.split(" (")[0] for c in refused if c.name.endswith(".npz")] == ["not a NumPy file, or truncated"]


def test_array_files_give_their_rows_with_an_index(tmp_path: Path) -> None:
    faces = synthetic_faces(2)
    np.savez(tmp_path / "a.npz", faces=faces, labels=np.arange(2))
    np.savez(tmp_path / "b.npz", anything=faces.astype(np.float32))
    np.save(tmp_path / "c.npy", faces[:1])
    np.savez(tmp_path / "d.npz", labels=np.arange(2))
    loaded, names, refused = load_faces([tmp_path])
    assert [n.removeprefix(f"{tmp_path}/") for n in names] == [
        "a.npz[0]",
        "a.npz[1]",
        "b.npz[0]",
        "b.npz[1]",
        "c.npy[0]",
    ]
    np.testing.assert_array_equal(loaded, np.concatenate([faces, faces, faces[:1]]))
    assert [c.refused for c in refused] == ["expected an array `faces` in it, found: labels"]


def test_pickled_arrays_are_never_loaded(tmp_path: Path) -> None:
    np.save(tmp_path / "evil.npy", np.array([{"run": "me"}], dtype=object), allow_pickle=True)
    _, _, refused = load_faces([tmp_path])
    assert "allow_pickle=False" in refused[0].refused


def test_grey_and_transparent_images_become_bgr(tmp_path: Path) -> None:
    grey = synthetic_faces(1)[0, :, :, 0]
    cv2.imwrite(str(tmp_path / "grey.png"), grey)
    cv2.imwrite(str(tmp_path / "rgba.png"), np.dstack([grey, grey, grey, np.full_like(grey, 9)]))
    faces, _, _ = load_faces([tmp_path])
    np.testing.assert_array_equal(faces, np.repeat(np.dstack([grey] * 3)[None], 2, axis=0))


def test_without_sources_faces_are_drawn_and_with_them_at_least_one_must_be_read(folder: Path) -> None:
    faces, names = faces_or_synthetic((), 5)
    assert (len(faces), names) == (5, None)
    (folder / "bad.jpg").write_text("not an image")
    said: list[str] = []
    faces, names = faces_or_synthetic([folder], 5, said.append)
    assert len(faces) == len(names or ()) == 3
    assert said == [f"not read: {folder}/bad.jpg: not an image that OpenCV can decode, or truncated"]
    with pytest.raises(WrongUse, match=r"no face could be read from .*bad\.jpg: expected aligned 112×112 crops"):
        faces_or_synthetic([folder / "bad.jpg"], 5)
