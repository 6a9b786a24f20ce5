"""Add, remove, search, save, load; and what happens when two contracts meet."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path

import numpy as np
import pytest

from arcface_clients.errors import ContractMismatch, InvalidEmbeddings
from arcface_clients.people.gallery import Gallery, Match
from arcface_clients.people.vectors import cosine_distances

CONTRACT, OTHER = "a" * 64, "b" * 64


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(3)


@pytest.fixture
def gallery(rng: np.random.Generator) -> Gallery:
    """30 people with one to four embeddings each."""
    filled = Gallery(CONTRACT)
    for person in range(30):
        direction = rng.normal(size=32)
        filled.add(f"person {person}", direction + 0.3 * rng.normal(size=(1 + person % 4, 32)), CONTRACT)
    return filled


def test_search_names_each_person_once_nearest_first(gallery: Gallery, rng: np.random.Generator) -> None:
    query = rng.normal(size=(5, 32))
    rows, owners = gallery._rows[: len(gallery)], gallery._owner[: len(gallery)]
    distances = cosine_distances(query, rows)
    for matches, distance in zip(gallery.search(query, k=7), distances, strict=True):
        best = sorted((distance[owners == person].min(), f"person {person}") for person in range(30))
        assert [match.identity for match in matches] == [name for _, name in best[:7]]
        assert [match.distance for match in matches] == pytest.approx([d for d, _ in best[:7]], abs=1e-6)


def test_search_by_embedding_may_name_a_person_twice(gallery: Gallery) -> None:
    own = gallery._rows[gallery._owner == gallery._number["person 3"]][0]
    assert [match.identity for match in gallery.search(own, k=3, per_identity=False)[0]] == ["person 3"] * 3
    assert gallery.search(own, k=1)[0] == [Match("person 3", pytest.approx(0, abs=1e-6))]


def test_a_removed_person_is_not_found_and_may_come_back(gallery: Gallery, rng: np.random.Generator) -> None:
    before = len(gallery)
    own = gallery._rows[gallery._owner == gallery._number["person 7"]][0].copy()
    assert gallery.remove("person 7", "nobody") == 4
    assert len(gallery) == before - 4
    assert "person 7" not in gallery.identities()
    assert gallery.search(own, k=30)[0][0].distance > 0.1
    assert "person 7" not in [match.identity for match in gallery.search(own, k=30)[0]]
    gallery.add("person 7", own, CONTRACT)
    assert gallery.search(own, k=1)[0][0].identity == "person 7"
    assert gallery.identities()["person 7"] == 1


def test_a_file_gives_the_same_gallery_back(gallery: Gallery, rng: np.random.Generator, tmp_path: Path) -> None:
    gallery.remove("person 0", "person 9")
    gallery.save(tmp_path / "people.npz")
    again = Gallery.load(tmp_path / "people.npz", contract_id=CONTRACT)
    query = rng.normal(size=(4, 32))
    assert again.identities() == gallery.identities()
    assert again.search(query) == gallery.search(query)
    again.add("new", query[0], CONTRACT)
    assert again.search(query[0])[0][0].identity == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["people.npz"]


def test_an_empty_gallery_answers_and_is_saved(tmp_path: Path) -> None:
    empty = Gallery(CONTRACT)
    assert empty.search(np.ones((2, 512))) == [[], []]
    empty.save(tmp_path / "empty.npz")
    assert Gallery.load(tmp_path / "empty.npz").identities() == {}


def test_another_contract_is_refused_and_the_message_explains_re_enrolment(gallery: Gallery, tmp_path: Path) -> None:
    gallery.save(tmp_path / "people.npz")
    message = re.escape(
        f"this gallery holds {len(gallery)} embeddings of contract aaaaaaaaaaaa, but these are of bbbbbbbbbbbb: "
        "expected one model for both, since distances between two models mean nothing. Re-enrol: embed everybody's"
    )
    with pytest.raises(ContractMismatch, match=message):
        Gallery.load(tmp_path / "people.npz", contract_id=OTHER)
    with pytest.raises(ContractMismatch, match=message):
        gallery.add("someone", np.ones(32), OTHER)
    with pytest.raises(ContractMismatch, match=message):
        gallery.search(np.ones(32), contract_id=OTHER)
    with pytest.raises(ContractMismatch, match="states none"):
        Gallery("")


def test_wrong_widths_and_zero_rows_leave_the_gallery_as_it_was(gallery: Gallery) -> None:
    before = gallery.identities()
    with pytest.raises(InvalidEmbeddings, match="expected embeddings of 32 dimensions, got 31"):
        gallery.add("someone", np.ones((2, 31)), CONTRACT)
    with pytest.raises(InvalidEmbeddings, match="first row 1 is all zero"):
        gallery.add("someone", np.stack([np.ones(32), np.zeros(32)]), CONTRACT)
    with pytest.raises(InvalidEmbeddings, match="queries of 32 dimensions, got 31"):
        gallery.search(np.ones(31))
    with pytest.raises(InvalidEmbeddings, match="k of at least 1"):
        gallery.search(np.ones(32), k=0)
    assert gallery.identities() == before


@pytest.mark.parametrize("damage", ["truncated", "one byte", "text", "other npz", "newer", "owners"])
def test_a_file_that_is_no_whole_gallery_is_refused(gallery: Gallery, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "people.npz"
    gallery.save(path)
    whole = path.read_bytes()
    arrays = dict(np.load(path))
    if damage == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "one byte":
        middle = len(whole) // 2
        path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    elif damage == "text":
        path.write_text("not a gallery")
    elif damage == "other npz":
        np.savez(path, x=np.ones(3))
    elif damage == "newer":
        header = json.dumps({"format": "arcface-gallery", "version": 2, "contract_id": CONTRACT})
        np.savez(path, **{**arrays, "header": np.array(header)})
    else:
        np.savez(path, **{**arrays, "owner": arrays["owner"] + 1})
    with pytest.raises(InvalidEmbeddings, match="cannot be read as a gallery"):
        Gallery.load(path)


def test_searching_while_others_add_and_remove_gives_whole_answers(rng: np.random.Generator) -> None:
    gallery = Gallery(CONTRACT)
    fixed = rng.normal(size=(8, 64))
    for i, row in enumerate(fixed):
        gallery.add(f"fixed {i}", row, CONTRACT)
    stop = threading.Event()

    def churn(name: str) -> None:
        while not stop.is_set():
            gallery.add(name, np.random.default_rng(0).normal(size=(50, 64)), CONTRACT)
            gallery.remove(name)

    threads = [threading.Thread(target=churn, args=(f"guest {i}",)) for i in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(200):
            assert [matches[0].identity for matches in gallery.search(fixed, k=2)] == [f"fixed {i}" for i in range(8)]
    finally:
        stop.set()
        for thread in threads:
            thread.join()
