"""Killed before any one of its operations on files, a command leaves nothing that answers under a wrong contract.

And whatever it left, the next `assemble`, `serve` or `rollback` mends. ARCFACE_ALL_KILLS=1 takes every operation of an
import; else those on temporary files, which nobody looks at, are taken one in eight.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import onnx
import pytest
from onnx import numpy_helper

from arcface_build.imports.importing import import_model
from arcface_build.imports.proof_faces import ProofFaces
from arcface_build.imports.source import known_models, resolve
from arcface_build.repository.assemble import assemble
from arcface_build.repository.install import roll_back
from arcface_build.repository.mend import faults, mend
from arcface_build.repository.overlays import OVERLAYS
from arcface_build.repository.versions import LEAVES, served_manifest, versions
from arcface_clients.atomic import new_file, new_folder
from arcface_clients.contract import contract_prefix
from arcface_clients.faces.synthetic import synthetic_faces
from conftest import copy_repository
from kill_points import kill_before, operations
from tiny_nets import tiny_net

TEMPORARY = re.compile(r"/\.[^/]+\.\d+\.[a-z0-9_]{8}")
EVERY = 1 if os.environ.get("ARCFACE_ALL_KILLS") else 8
FACES = synthetic_faces(4, seed=3)


@dataclass(frozen=True)
class Place:
    """Where one run happens: the model repository, the models folder, and two sources."""

    folder: Path

    @property
    def repository(self) -> Path:
        return self.folder / "model_repository"

    def model(self, name: str) -> Path:
        return self.folder / "models" / name

    def import_source(self, name: str) -> None:
        source = resolve(str(self.folder / f"{name}.onnx"), self.folder, known=known_models())
        import_model(source, self.model(name), ProofFaces(FACES, "synthetic"))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Two models imported, the first of them assembled, with a variant that took hours."""
    place = Place(tmp_path_factory.mktemp("prepared"))
    copy_repository(place.folder)
    for seed, name in enumerate(("first", "second")):
        onnx.save(tiny_net(dim=64, seed=seed), place.folder / f"{name}.onnx")
        place.import_source(name)
    (place.model("first") / "variants").mkdir()
    (place.model("first") / "variants" / "int8-cpu.onnx").write_bytes(b"hours of search")
    assemble(place.model("first"), place.repository)
    return place


def assemble_second(place: Place) -> None:
    mend(place.repository)
    assemble(place.model("second"), place.repository)


def go_back(place: Place) -> None:
    mend(place.repository)
    for model in ("arcface_onnx", "arcface_reference"):
        if len(versions(place.repository / model)) > 1:
            roll_back(place.repository, model)


def import_again(place: Place) -> None:
    place.import_source("first")
    mend(place.repository)
    assemble(place.model("first"), place.repository)


SCENARIOS: dict[str, tuple[tuple[Callable[[Place], None], ...], Callable[[Place], None], str]] = {
    "assemble": ((), assemble_second, "second"),
    "rollback": ((assemble_second,), go_back, "first"),
    "import": ((), import_again, "first"),
}


def contract_of_weights(version: Path) -> str:
    """What the weights call themselves: 32 hexadecimal digits."""
    graph = onnx.load(version / "model.onnx").graph
    words = next(t for t in graph.initializer if t.name == "contract_words")
    return contract_prefix(numpy_helper.to_array(words)[0])


def wrong_contracts(repository: Path) -> list[str]:
    """Overlays with which a server would load weights of another contract than they state."""
    wrong = []
    for name in LEAVES:
        for overlay in (repository / name / "configs").glob("*.pbtxt"):
            text = overlay.read_text()
            stated = re.search(r'"contract_id" value: { string_value: "([0-9a-f]{64})"', text)
            pinned = re.search(r"versions: \[ (\d+) \]", text)
            assert stated and pinned, overlay
            version = repository / name / pinned[1]
            if name == "arcface_onnx" and (version / "model.onnx").is_file():
                if contract_of_weights(version) != stated[1][:32]:
                    wrong.append(str(overlay))
            elif (version / "manifest.json").is_file() and stated[1] not in (version / "manifest.json").read_text():
                wrong.append(str(overlay))
    return wrong


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_kill_before_any_operation_is_survived(prepared: Place, tmp_path: Path, name: str) -> None:
    before, act, expected = SCENARIOS[name]

    def fresh(label: str) -> Place:
        place = Place(tmp_path / label)
        shutil.copytree(prepared.folder, place.folder)
        for step in before:
            step(place)
        return place

    dry = fresh("dry")
    done = operations(lambda: act(dry), dry.folder)
    assert len(done) > 10
    chosen = [i for i, what in enumerate(done) if not TEMPORARY.search(what) or i % EVERY == 0]
    for position in chosen:
        place = fresh("run")
        assert kill_before(lambda: act(place), place.folder, position), done[position]  # noqa: B023
        assert wrong_contracts(place.repository) == [], done[position]
        mend(place.repository)  # what `arcface serve` does first
        assert faults(place.repository) == [], done[position]
        assert wrong_contracts(place.repository) == [], done[position]
        serving, reference = (served_manifest(place.repository, m) for m in ("arcface_onnx", "arcface_reference"))
        assert serving and reference and serving["contract_id"] == reference["contract_id"], done[position]
        if (serving["name"], name) != (expected, "rollback"):  # a rollback that came through is not done twice
            act(place)
        assert (served_manifest(place.repository) or {})["name"] == expected, done[position]
        assert faults(place.repository) == [], done[position]
        variants = list((place.folder / "models").glob("first/variants/int8-cpu.onnx"))
        assert len(variants) == 1, f"a variant was lost: {done[position]}"
        leftovers = [p for p in place.folder.rglob(".*") if TEMPORARY.search(f"/{p.name}")]
        assert leftovers == [], done[position]
        shutil.rmtree(place.folder)
    print(f"{name}: {len(chosen)} of {len(done)} operations")


def test_every_overlay_pins_the_version_that_it_describes(prepared: Place) -> None:
    for overlay in OVERLAYS:
        text = (prepared.repository / "arcface_onnx" / "configs" / f"{overlay}.pbtxt").read_text()
        assert "version_policy: { specific { versions: [ 1 ] } }" in text


@pytest.mark.parametrize("new", [new_file, new_folder])
def test_a_writer_of_another_container_or_host_is_let_finish_and_a_dead_one_is_tidied_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new: Callable[[Path], AbstractContextManager[Path]]
) -> None:
    monkeypatch.setattr("arcface_clients.atomic._prefix", lambda path: f".{path.name}.{2**22 + 1}.")  # no process here
    target, dead = tmp_path / "part", tmp_path / f".part.{2**22 + 1}.abcdefgh"
    dead.write_text("half")

    def fill(temporary: Path, text: str) -> None:
        (temporary / "text" if temporary.is_dir() else temporary).write_text(text)

    with new(target) as mine:
        assert not dead.exists()
        fill(mine, "mine")
        with new(target) as other:
            fill(other, "other")
    assert (target / "text" if target.is_dir() else target).read_text() == "mine"
    assert list(tmp_path.iterdir()) == [target]
