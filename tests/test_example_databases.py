"""The examples that keep embeddings in a database find whom an exact search finds, and refuse another model's faces."""

from __future__ import annotations

import json
import os
import pwd
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from arcface_build.serving.process import TritonProcess
from arcface_clients.bulk.saved import read_saved
from arcface_clients.errors import ContractMismatch, WrongUse
from arcface_clients.faces.synthetic import synthetic_faces
from conftest import REPO
from deadlines import HANG_S

EXAMPLES = REPO / "examples"
Search = Callable[..., subprocess.CompletedProcess[str]]


def run(*words: object, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, words)], cwd=folder, capture_output=True, text=True, timeout=HANG_S
    )


@dataclass(frozen=True)
class Embedded:
    """What `arcface embed` wrote of three synthetic people, four views of each, and of three more views."""

    folder: Path
    people: Path  # .parquet
    unknown: Path  # .npz
    foreign: Path  # the same as `unknown`, by another model
    nearest: dict[str, str]  # unknown path → the path that an exact search finds


@pytest.fixture(scope="module")
def embedded(server: TritonProcess, tmp_path_factory: pytest.TempPathFactory) -> Embedded:
    cv2 = pytest.importorskip("cv2")
    pytest.importorskip("pyarrow")
    folder = tmp_path_factory.mktemp("databases")
    rng = np.random.default_rng(0)
    for number, face in enumerate(synthetic_faces(3)):
        for view in range(5):
            noisy = (face.astype(np.int16) + rng.integers(-2, 3, face.shape)).clip(0, 255).astype(np.uint8)
            path = folder / ("unknown" if view == 4 else "people") / f"person-{number}" / f"view-{view}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), noisy)
    for source, output in (("people", "people.parquet"), ("unknown", "unknown.npz")):
        done = run("-m", "arcface_build", "embed", source, "-o", output, "--url", server.grpc_url, folder=folder)
        assert done.returncode == 0, done.stderr
    known, asked = read_saved(folder / "people.parquet"), read_saved(folder / "unknown.npz")
    with np.load(folder / "unknown.npz") as columns:
        np.savez(folder / "foreign.npz", **{**columns, "contract_id": np.array("f" * 64)})
    best = (asked.embeddings @ known.embeddings.T).argmax(axis=1)
    nearest = {path: known.paths[row] for path, row in zip(asked.paths, best, strict=True)}
    files = (folder / name for name in ("people.parquet", "unknown.npz", "foreign.npz"))
    return Embedded(folder, *files, nearest)


def check(embedded: Embedded, example: str, where: object) -> None:
    """An answer, a refusal to store and to search foreign faces, and the same answer again."""

    def search(people: Path, unknown: Path) -> subprocess.CompletedProcess[str]:
        return run(EXAMPLES / example, people, unknown, where, folder=embedded.folder)

    def finds() -> None:
        done = search(embedded.people, embedded.unknown)
        assert done.returncode == 0, done.stderr
        found = dict(re.findall(r"^(.+): (.+), distance 0\.\d+$", done.stdout, re.MULTILINE))
        assert found == embedded.nearest

    finds()
    refused = search(embedded.foreign, embedded.foreign)
    assert refused.returncode == 1
    assert "ContractMismatch: these embeddings are of ffffffffffff, those to compare them with" in refused.stderr
    finds()


def test_faiss_search_finds_them_and_refuses_a_foreign_contract(embedded: Embedded, tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    check(embedded, "faiss_search.py", tmp_path / "people.faiss")


def test_qdrant_search_finds_them_and_refuses_a_foreign_contract(embedded: Embedded, tmp_path: Path) -> None:
    pytest.importorskip("qdrant_client")
    check(embedded, "qdrant_search.py", tmp_path / "qdrant")


def test_pgvector_search_finds_them_and_refuses_a_foreign_contract(embedded: Embedded, postgres: str) -> None:
    pytest.importorskip("psycopg")
    check(embedded, "pgvector_search.py", postgres)


def test_data_set_to_pgvector_stores_each_part_once_and_goes_on(
    embedded: Embedded, server: TritonProcess, postgres: str
) -> None:
    psycopg = pytest.importorskip("psycopg")
    words = ("embed", "people", "-o", "set/", "--unit-rows", 5, "--url", server.grpc_url)
    assert run("-m", "arcface_build", *words, folder=embedded.folder).returncode == 0

    def store() -> subprocess.CompletedProcess[str]:
        return run(EXAMPLES / "data_set_to_pgvector.py", "set/", postgres, folder=embedded.folder)

    assert store().stdout == "3 parts stored, 0 were there\n"
    with psycopg.connect(postgres, autocommit=True) as database:
        known = read_saved(embedded.people)
        last = list(known.paths[5:])  # of the parts that a run that was killed left undone
        database.execute("DELETE FROM embedded_face WHERE path = ANY(%s)", [last])
        database.execute("DELETE FROM stored_part WHERE name NOT LIKE '%%00000000.parquet'", [])
        assert store().stdout == "2 parts stored, 1 were there\n"
        rows = dict(database.execute("SELECT path, embedding::text FROM embedded_face").fetchall())
        assert sorted(rows) == sorted(known.paths)
        assert database.execute("SELECT count(*) FROM embedded_face").fetchone() == (len(known.paths),)
        for path, row in zip(known.paths, known.embeddings, strict=True):
            np.testing.assert_allclose(json.loads(rows[path]), row, atol=1e-4)
        database.execute("UPDATE contract SET id = 'f'")
        refused = store()
        assert refused.returncode == 1
        assert "ContractMismatch" in refused.stderr


def postgres_with_pgvector() -> Path | None:
    """Where a PostgreSQL with pgvector is installed: the system's, else that of the wheel `pgserver`."""
    for extension in sorted(Path("/usr/share/postgresql").glob("*/extension/vector.control"), reverse=True):
        return Path("/usr/lib/postgresql") / extension.parents[1].name
    spec = find_spec("pgserver")
    return Path(spec.origin).parent / "pginstall" if spec and spec.origin else None


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """A PostgreSQL of the test's own, reached by a socket in its folder; its URL."""
    installed = postgres_with_pgvector()
    if installed is None:
        pytest.skip("no PostgreSQL with pgvector: apt-get install postgresql-15-pgvector, or pip install pgserver")
    # A short path, as a socket's may have 107 letters; and one that a user other than root can reach.
    with tempfile.TemporaryDirectory(prefix="pg-", dir="/tmp") as name:
        folder = Path(name)
        user = None
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root
            user = next(name for name in ("postgres", "nobody") if name in {entry.pw_name for entry in pwd.getpwall()})
            if installed.name == "pginstall":  # a virtual environment may be root's alone
                for part in installed.parents[1].glob("pgserver*"):  # and its libraries are in a folder beside it
                    shutil.copytree(part, folder / part.name)
                installed = folder / "pgserver" / "pginstall"
            (folder / "data").mkdir()
            folder.chmod(0o755)
            for path in (folder, folder / "data"):
                shutil.chown(path, user)

        def call(program: str, *words: str) -> None:
            done = subprocess.run(
                [str(installed / "bin" / program), *words], cwd=folder, user=user, capture_output=True, text=True
            )
            assert done.returncode == 0, f"{program}: {done.stdout}{done.stderr}"

        data, log = str(folder / "data"), str(folder / "log")
        call("initdb", "--pgdata", data, "--username", "faces", "--auth", "trust", "--no-sync")
        listening = f"-k {folder} -c listen_addresses='' -c fsync=off"
        call("pg_ctl", "--pgdata", data, "--log", log, "--wait", "--options", listening, "start")
        try:
            yield f"postgresql:///postgres?host={folder}&user=faces"
        finally:
            call("pg_ctl", "--pgdata", data, "--wait", "--mode", "fast", "stop")


def test_saved_embeddings_are_the_same_from_either_form(embedded: Embedded) -> None:
    known, asked = read_saved(embedded.people), read_saved(embedded.unknown)
    assert known.contract_id == asked.contract_id
    assert (len(known.paths), known.embeddings.shape, asked.embeddings.shape) == (12, (12, 512), (3, 512))
    np.testing.assert_allclose(np.linalg.norm(known.embeddings, axis=1), 1, atol=1e-5)
    with pytest.raises(ContractMismatch):
        known.of_contract(None)


@pytest.mark.parametrize("name", ["a.parquet", "a.npz"])
def test_a_damaged_file_is_refused_in_words(tmp_path: Path, name: str) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(b"PK nothing")
    with pytest.raises(WrongUse, match=f"{name} is not a (Parquet|NumPy) file, or truncated"):
        read_saved(tmp_path / name)


def test_a_parquet_file_of_something_else_is_refused(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"embedding": [1.0]}), tmp_path / "a.parquet")
    with pytest.raises(WrongUse, match="is a Parquet file, but not of embeddings"):
        read_saved(tmp_path / "a.parquet")
