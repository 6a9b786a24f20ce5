"""What `serve` checks before each start, and that it starts again whatever ends a server that has served."""

from __future__ import annotations

import contextlib
import json
import shutil
from functools import partial
from pathlib import Path

import pytest
from google.protobuf import text_format
from google.protobuf.json_format import MessageToDict

from arcface_build.errors import ServerFailed
from arcface_build.repository.assemble import assemble
from arcface_build.repository.versions import served_manifest
from arcface_build.serving import prepare as preparing
from arcface_build.serving import run
from arcface_build.serving.binary import TritonBinary
from arcface_build.serving.ports import free_ports
from arcface_build.serving.process import TritonProcess
from arcface_build.serving.request import ServeRequest
from arcface_build.serving.watch import Signs, faces_under_way
from arcface_build.variants.choose import VariantChoice
from arcface_clients.checks.parity import measure_parity
from arcface_clients.config.schema import EmbeddingConfig
from arcface_clients.errors import ArcFaceError, DeadlineExceeded, GateFailed, InferenceFailed, Missing, WrongUse
from arcface_clients.faces.synthetic import synthetic_faces
from arcface_clients.triton.admin_key import key_folders
from conftest import REPO, copy_repository
from test_assemble import judged
from tiny_model import write_model


class Listener:
    """An audience that keeps what it is told."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.lines: list[str] = []
        self.refused: list[str] = []
        self.lives = 0
        self.watched: list[object] = []  # the signs by which servers are watched

    def notice(self, text: str) -> None:
        self.lines.append(text)

    chosen = notice

    def warned(self, text: str) -> None:
        self.warnings.append(text)

    def proved(self, *_: object) -> None:
        pass

    def failed(self, why: str, instead: str | None) -> None:
        self.refused.append(why)

    def serving(self, server: TritonProcess) -> None:
        """Crash in the first life; in the next one somebody presses Ctrl-C."""
        self.lives += 1
        assert len(self.watched) == self.lives, "what is lost before it is watched is not noticed"
        if self.lives > 1:
            raise KeyboardInterrupt
        server._child.kill()

    def importing(self) -> contextlib.AbstractContextManager[object]:
        raise AssertionError("there are weights")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    repository = copy_repository(tmp_path)
    assemble(write_model(tmp_path / "models" / "tiny"), repository)
    return repository


def serve(repository: Path, audience: Listener, **asked: object) -> bool:
    request = ServeRequest(
        repository, repository.parent / "models", synthetic_faces(2), ports=free_ports(), reference=False, **asked
    )
    return run.serve(request, EmbeddingConfig(), audience, run.Interrupt())


def test_a_server_that_dies_while_it_is_proved_again_is_started_again_and_no_variant_is_chosen_anew(
    triton_binary, repository, monkeypatch
):
    audience, chosen, proofs = Listener(), [], []

    def prove(url: str, *rest: object, **options: object) -> object:
        proofs.append(url)
        if len(proofs) == 2:  # a client sends again what ended the life before
            servers[-1]._child.kill()
            servers[-1]._child.wait()
        return measure_parity(url, *rest, **options)

    def choose(*_: object) -> str:
        chosen.append(served_manifest(repository))
        return "fp32, the only one"

    servers, make = [], run._server
    monkeypatch.setattr(run, "_server", lambda *all_of_it: servers.append(make(*all_of_it)) or servers[-1])
    monkeypatch.setattr(run, "Signs", lambda *of: audience.watched.append(Signs(*of)) or audience.watched[-1])
    monkeypatch.setattr(run, "measure_parity", prove)
    monkeypatch.setattr(preparing, "take_best_variant", choose)
    assert serve(repository, audience), audience.warnings
    assert (audience.lives, len(proofs), len(chosen)) == (2, 3, 1)
    crashed, unproved = audience.warnings
    assert crashed.startswith("RESTART in 1 s: tritonserver ended by itself by SIGKILL")
    assert unproved.startswith("RESTART in 2 s: it was not proved: tritonserver ended by itself by SIGKILL")


class Gone:
    """A server that has ended, or that hangs."""

    own_url, log_path, killed = "127.0.0.1:1", Path("log"), False

    def __init__(self, status: int | None) -> None:
        self.status = status

    def wait(self, timeout_s: float) -> int | None:
        return self.status

    def kill(self) -> None:
        self.killed = True


@pytest.mark.parametrize(
    ("raised", "status", "becomes", "words"),
    [
        (DeadlineExceeded("no answer after 120 s"), None, ServerFailed, "it was not proved: no answer after 120 s"),
        (DeadlineExceeded("no answer after 120 s"), -11, ServerFailed, "tritonserver ended by itself by SIGSEGV"),
        (InferenceFailed("NaN"), None, InferenceFailed, "NaN"),
        (GateFailed("drift"), None, GateFailed, "drift"),
    ],
    ids=["hangs", "ended", "answers wrongly", "drifts"],
)
def test_only_a_server_that_does_not_answer_its_proof_is_started_again(monkeypatch, raised, status, becomes, words):
    def fails(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr(run, "measure_parity", fails)
    asked = ServeRequest(Path(), Path(), synthetic_faces(1))
    ready, server = preparing.Prepared(None, None, (), False, (), {}, None), Gone(status)
    with pytest.raises(becomes, match=words):
        run._prove(server, asked, ready)
    assert server.killed == (becomes is ServerFailed)


def variant_of_another_host(repository: Path) -> None:
    sidecar = judged("int8", 0.005, "openvino-fp8")
    choice = VariantChoice("serving.onnx", "int8", "openvino-fp8", "", sidecar)
    assemble(repository.parent / "models" / "tiny", repository, choice)
    shutil.rmtree(repository.parent / "models")  # copied from the host that installed it
    configs = repository / "arcface_onnx" / "configs"
    shutil.copyfile(configs / "onnx.pbtxt", configs / "tuned.pbtxt")


@pytest.mark.parametrize(
    "door",
    [{}, {"variant": "installed"}, {"backend": "tuned"}, {"backend": "onnx", "sm": "8.6"}, {"sm": "8.6"}],
    ids=["auto", "installed", "tuned", "onnx on a GPU host", "no plan on a GPU host"],
)
def test_a_variant_that_passed_its_gate_elsewhere_is_refused_at_every_door(
    triton_binary, repository, monkeypatch, door
):
    variant_of_another_host(repository)
    monkeypatch.setattr(preparing, "gpu_sm", partial(lambda sm: sm, door.pop("sm", None)))
    with pytest.raises(Missing, match="arcface_onnx holds int8 of tiny, which may not run on this host: it is set up"):
        serve(repository, Listener(), once=True, **door)


@pytest.mark.parametrize(
    ("door", "why"),
    [
        (
            {"backend": "tuned"},
            r"with backend onnx \(asked for\): configs/tuned\.pbtxt was measured with the",
        ),
        ({"backend": "reference"}, r"with backend reference \(asked for\): InsightFace computes in fp32"),
        ({"backend": "onnx", "sm": "8.6"}, "variants are for the CPU, and this host has a GPU of SM 8.6"),
        ({"sm": "8.6"}, r"with backend onnx \(no plan for SM 8\.6 .*\): variants are for the CPU"),
    ],
    ids=["tuned", "reference", "onnx on a GPU host", "no plan on a GPU host"],
)
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_precision_that_cannot_be_heeded_is_wrong_use_and_never_ignored(
    triton_binary, repository, monkeypatch, precision, door, why
):
    configs = repository / "arcface_onnx" / "configs"
    shutil.copyfile(configs / "onnx.pbtxt", configs / "tuned.pbtxt")
    monkeypatch.setattr(preparing, "gpu_sm", partial(lambda sm: sm, {**door}.get("sm")))
    monkeypatch.setattr(preparing, "find_spec", lambda name: name)
    asked = {key: value for key, value in door.items() if key != "sm"}
    with pytest.raises(WrongUse, match=f"--variant {precision} cannot be heeded {'.*' * (why[0] == 'v')}{why}"):
        serve(repository, Listener(), variant=precision, **asked)


@pytest.mark.parametrize("fault", ["log", "program"])
def test_a_start_that_fails_leaves_no_key_no_link_and_no_port_taken(tmp_path, monkeypatch, fault):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    links = tmp_path / "tmp"
    links.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(links))
    log, ports = tmp_path / "tritonserver.log", free_ports()
    if fault == "log":
        log.write_text("of the server before")
        (tmp_path / "tritonserver.previous.log" / "in the way").mkdir(parents=True)
    else:
        monkeypatch.setattr("arcface_build.serving.process.launcher", lambda _, **_options: [str(tmp_path / "nowhere")])
    blank = tmp_path / "a blank"
    blank.mkdir()
    for _ in range(2):  # the ports were given back
        server = TritonProcess(TritonBinary(Path("/bin/true")), blank, [], log_path=log, ports=ports)
        with pytest.raises(ServerFailed, match="cannot write the server's log" if fault == "log" else "cannot execute"):
            server.start()
        assert key_folders()[0].parent == tmp_path and list(key_folders()[0].iterdir()) == []
        assert list(links.iterdir()) == []


class Configured:
    """A server that only tells its configuration."""

    def __init__(self, config: object) -> None:
        self.config = config

    def ask(self, path: str, timeout_s: float) -> object:
        assert path == "/v2/models/photo_faces/config"
        return self.config


def test_patience_with_photos_follows_the_configuration_that_is_served():
    from tritonclient.grpc import model_config_pb2

    text = (REPO / "model_repository" / "photo_faces" / "config.pbtxt").read_text()
    for count, faces in ((4, 512), (11, 300)):
        changed = text.replace("count: 4 ", f"count: {count} ").replace('"512"', f'"{faces}"')
        config = text_format.Parse(changed, model_config_pb2.ModelConfig())
        told = json.loads(json.dumps(MessageToDict(config, preserving_proto_field_name=True)))
        assert faces_under_way(Configured(told)) == count * faces
    with pytest.raises(ServerFailed, match="does not tell how photo_faces is configured"):
        faces_under_way(Configured({"instance_group": None}))


def test_an_error_of_the_weights_is_raised_where_no_backend_is_left(triton_binary, repository):
    (repository / "arcface_onnx" / "1" / "model.onnx").write_bytes(b"another")
    audience = Listener()
    with pytest.raises(ArcFaceError, match="arcface_onnx/1 is not what was installed"):
        serve(repository, audience, variant="installed")
    assert audience.refused == []
