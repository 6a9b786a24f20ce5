"""`arcface serve` as its user runs it: what stops it before it starts, the table, and a stop that leaves nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import onnx
import pytest

from arcface_build.errors import ServerFailed
from arcface_build.host_memory import launch_limit
from arcface_build.repository.assemble import assemble
from arcface_build.repository.hand_written import MEMORY
from arcface_build.repository.install import install
from arcface_build.repository.versions import served_manifest
from arcface_build.serving.binary import TritonBinary, _compose_backends, find_tritonserver
from arcface_build.serving.command_line import arguments
from arcface_build.serving.exposure import Exposure
from arcface_build.serving.launcher import launcher
from arcface_build.serving.ports import PortLock, Ports, free_ports
from arcface_build.serving.process import TritonProcess
from arcface_build.serving.reasons import reason_in_log, reason_of_end
from arcface_build.serving.run import Interrupt
from arcface_build.serving.watch import watch
from arcface_clients.engines.onnx_contract import CONSTANT
from conftest import REPO, copy_repository
from deadlines import HANG_S, wait_until
from tiny_model import write_model

MAIN = "import sys; from arcface_build.cli import main; main(sys.argv[1:])"


STARTED: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def nothing_is_left_of_a_failed_test():
    yield
    while STARTED:
        process = STARTED.pop()
        process.kill()
        process.communicate()


def serve(repository: Path, *options: str, **environment: str) -> subprocess.Popen[str]:
    ports = free_ports()
    line = [sys.executable, "-c", MAIN, "serve", "--model-repository", str(repository)]
    line += ["--http-port", str(ports.http), "--grpc-port", str(ports.grpc), "--metrics-port", str(ports.metrics)]
    STARTED.append(
        subprocess.Popen(
            [*line, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
        )
    )
    return STARTED[-1]


def processes_of(repository: Path) -> list[str]:
    """Command lines of running processes that name this repository."""
    lines = [p.read_bytes().replace(b"\0", b" ").decode() for p in Path("/proc").glob("[0-9]*/cmdline") if readable(p)]
    return [line for line in lines if str(repository) in line]


def readable(path: Path) -> bool:
    try:
        return bool(path.read_bytes())
    except OSError:
        return False


@pytest.fixture
def own_repository(tmp_path, demo_repository) -> Path:
    """A repository that no other server of this session reads, so that its processes can be told apart."""
    return Path(shutil.copytree(demo_repository, tmp_path / "model_repository"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_it_serves_until_a_signal_and_leaves_no_process(triton_binary, own_repository, number):
    process = serve(own_repository)
    shown = []
    for line in process.stdout:
        shown.append(line)
        if line.startswith("Ctrl-C"):
            break
    text = "".join(shown)
    assert "\nbackend onnx: no " in text
    assert "arcface_onnx" in text and "passed (fp32: drift" in text
    assert "TritonEmbedder(" in text
    assert processes_of(own_repository)
    process.send_signal(number)
    rest, errors = process.communicate(timeout=HANG_S)
    assert process.returncode == 0, errors
    assert "stopped: no process is left" in rest
    assert processes_of(own_repository) == []


def test_a_signal_is_not_lost_where_python_drops_its_exception(monkeypatch):
    interrupt, server = Interrupt(), Asleep()

    class Finalised:
        def __del__(self):
            interrupt(signal.SIGTERM, None)

    monkeypatch.setattr(sys, "unraisablehook", lambda dropped: None)
    Finalised()  # the KeyboardInterrupt that is raised in there reaches nobody
    with pytest.raises(KeyboardInterrupt):
        watch(server, server, interrupt)


class Asleep:
    """A server that never ends by itself."""

    def wait(self, timeout_s: float) -> None:
        time.sleep(timeout_s / 100)

    def beats(self) -> bool:
        return True


def test_the_server_ends_when_serve_is_killed(triton_binary, own_repository):
    process = serve(own_repository, "--no-reference")
    for line in process.stdout:
        if line.startswith("Ctrl-C"):
            break
    process.kill()
    process.communicate(timeout=HANG_S)
    wait_until(lambda: processes_of(own_repository) == [], "processes are left", 30)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
@pytest.mark.parametrize("moment", ["importing the demo network", "backend onnx"])
def test_a_signal_before_it_serves_is_130_and_leaves_nothing(triton_binary, tmp_path, own_repository, moment, number):
    fresh = moment.startswith("importing")
    repository = copy_repository(tmp_path / "fresh") if fresh else own_repository
    process = serve(repository, "--once", "--json")
    for line in process.stderr:
        if moment in line:
            break
    time.sleep(0.4)
    process.send_signal(number)
    output, errors = process.communicate(timeout=HANG_S)
    assert (process.returncode, output) == (130, ""), errors
    assert errors.endswith("interrupted\n") and "Traceback" not in errors
    assert processes_of(repository) == []
    if fresh:
        left = [path for path in (tmp_path / "fresh").rglob(".*") if path.name not in (".gitkeep", MEMORY)]
        assert left == [] and not (tmp_path / "fresh" / "models" / "demo-mobile").exists()


def test_a_second_signal_ends_a_server_that_does_not_stop(tmp_path):
    deaf = tmp_path / "tritonserver"
    deaf.write_text("#!/bin/sh\ntrap '' TERM\necho deaf\nwhile :; do sleep 1; done\n")
    deaf.chmod(0o755)
    process = TritonProcess(TritonBinary(deaf), tmp_path, [], log_path=tmp_path / "log", ports=free_ports()).start()
    while "deaf" not in (tmp_path / "log").read_text():
        time.sleep(0.02)
    (prefix,) = re.findall(r"shm-region-prefix-name=(\w+)", processes_of(tmp_path)[0])
    region = Path("/dev/shm") / f"{prefix}1"
    region.touch()  # as a python backend's does
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        process.stop()
    assert processes_of(tmp_path) == [] and not region.exists()


def test_a_server_whose_starter_is_gone_does_not_start(tmp_path):
    line = [*launcher(1, parent=1), "/bin/touch", str(tmp_path / "started")]
    subprocess.run(line, check=True, start_new_session=True)
    assert not (tmp_path / "started").exists()


def test_once_with_json_prints_one_object_and_the_choice(triton_binary, own_repository, tmp_path):
    repository = tmp_path / "a (größer)" / "model_repository"  # Triton hands paths to a shell without quotes
    repository.parent.mkdir()
    own_repository.rename(repository)
    output, errors = serve(repository, "--once", "--json", "--backend", "reference").communicate(timeout=HANG_S)
    told = json.loads(output)
    assert told["backend"] == "reference" and told["reason"] == "asked for"
    assert [row["model"] for row in told["parity"]["rows"]] == ["arcface_reference", "arcface"]
    assert "tritonserver" in errors


def test_a_busy_port_is_named_before_any_work(demo_repository):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        process = serve(demo_repository, "--grpc-port", str(port))
        _, errors = process.communicate(timeout=HANG_S)
    assert process.returncode == 3
    assert errors == (
        f"ServerFailed: port {port} (grpc) is in use on 127.0.0.1. Stop what listens there (ss -ltnp | grep {port}), "
        f"or take another: arcface serve --grpc-port {port + 10}\n"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--http-port", "8700", "--grpc-port", "8701", "--metrics-port", "8701"),
            "WrongUse: expected three different ports, got http 8700, grpc 8701, metrics 8701. "
            "Next: arcface serve --help\n",
        ),
        (("--grpc-port", "70000"), "Invalid value for '--grpc-port': 70000 is not in the range 1<=x<=65535.\n"),
        (
            ("--host", "nowhere.invalid"),
            "Expected an IPv4 address of this host (ip -4 address), 127.0.0.1 for it alone, or 0.0.0.0 for all\n",
        ),
        (
            ("--host", "::1"),
            "Expected an IPv4 address of this host (ip -4 address), 127.0.0.1 for it alone, or 0.0.0.0 for all\n",
        ),
        (
            ("--host", "0.0.0.0"),
            "WrongUse: gRPC on 0.0.0.0 would carry faces and embeddings readably through the network. Encrypt it "
            "(--tls-cert FILE --tls-key FILE), or say that this network is trusted: --insecure\n",
        ),
        (
            ("--http-host", "0"),
            "WrongUse: HTTP on 0.0.0.0 would carry faces and embeddings readably through the network: Triton's HTTP "
            "has no TLS. Use gRPC (--host), or say that this network is trusted: --insecure\n",
        ),
        (
            ("--", "--grpc-addr=0.0.0.0"),
            "WrongUse: --grpc-addr after -- is refused: who reaches the server is not decided there. Use --host\n",
        ),
        (
            ("--faces", "no such folder"),
            "WrongUse: no face could be read from no such folder: expected aligned 112×112 crops.\n",
        ),
    ],
)
def test_wrong_options_are_refused_before_any_work(demo_repository, options, message):
    process = serve(demo_repository, *options)
    output, errors = process.communicate(timeout=HANG_S)
    assert (process.returncode, output) == (2, "")
    assert errors.endswith(message)


def test_a_repository_without_weights_is_refused_where_the_demo_is_not_wanted(tmp_path):
    process = serve(copy_repository(tmp_path), "--no-demo")
    _, errors = process.communicate(timeout=HANG_S)
    assert process.returncode == 3
    assert errors == (
        "Missing: no weights in the model repository. "
        "Next: arcface import demo (for trying), or arcface import YOUR.onnx\n"
    )


def test_tensorrt_without_gpu_says_what_is_there_and_what_to_do(demo_repository):
    process = serve(demo_repository, "--backend", "tensorrt", PATH="/nowhere")
    _, errors = process.communicate(timeout=HANG_S)
    assert process.returncode == 3
    assert errors == (
        "Missing: cannot serve tensorrt: no GPU here (plans: none). "
        "Next: arcface plan build --precision fp16, on such a GPU\n"
    )


def install_broken(repository: Path, weights: bytes) -> None:
    """Install these weights as if they had passed every gate."""
    (repository.parent / "broken.onnx").write_bytes(weights)
    manifest = served_manifest(repository) or {}
    install(repository, "arcface_onnx", {"model.onnx": repository.parent / "broken.onnx"}, manifest)


def test_broken_weights_are_reported_with_the_models_own_reason(triton_binary, own_repository):
    install_broken(own_repository, b"\x08\x08truncated")
    process = serve(own_repository, "--no-reference", "--once")
    _, errors = process.communicate(timeout=HANG_S)
    assert process.returncode == 3
    assert errors.startswith(
        "ServerFailed: tritonserver ended while starting with status 1: arcface_onnx: ONNX Runtime"
    )


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (install_broken, "arcface_onnx: ONNX Runtime"),
        (
            lambda repository, weights: (repository / "arcface_onnx" / "1" / "model.onnx").write_bytes(weights),
            "arcface_onnx/1 is not what was installed: model.onnx was changed: expected sha256 ",
        ),
    ],
    ids=["cannot-be-loaded", "changed-by-hand"],
)
def test_weights_that_cannot_be_served_are_replaced_by_the_reference_and_loudly(
    triton_binary, own_repository, spoil, reason
):
    spoil(own_repository, b"\x08\x08truncated")
    process = serve(own_repository)
    shown = "".join(iter(process.stdout.readline, "Ctrl-C stops it.\n"))
    process.terminate()
    _, errors = process.communicate(timeout=HANG_S)
    assert reason in errors and "serving reference instead" in errors
    assert "arcface  " in shown and process.returncode == 0


def test_a_reference_that_was_changed_is_named_and_keeps_no_backend_from_serving(triton_binary, own_repository):
    (own_repository / "arcface_reference" / "1" / "source.onnx").write_bytes(b"another")
    process = serve(own_repository)
    shown = "".join(iter(process.stdout.readline, "Ctrl-C stops it.\n"))
    process.terminate()
    _, errors = process.communicate(timeout=HANG_S)
    assert "arcface_reference/1 is not what was installed: source.onnx was changed" in errors
    assert "serving onnx without the reference instead" in errors
    assert "arcface doctor 127.0.0.1:" in shown and "arcface parity" not in shown
    assert process.returncode == 0


def without_contract(graph: onnx.GraphProto) -> None:
    """Take out the constant that names the contract, and what is made of it."""
    gone = {CONSTANT}
    for tensor in [tensor for tensor in graph.initializer if tensor.name in gone]:
        graph.initializer.remove(tensor)
    for node in list(graph.node):
        if gone & set(node.input):
            gone |= set(node.output)
            graph.node.remove(node)


def test_weights_of_an_older_import_are_named_with_the_command_that_imports_them_again(triton_binary, own_repository):
    model = onnx.load(own_repository / "arcface_onnx" / "1" / "model.onnx")
    del model.graph.output[1:]
    without_contract(model.graph)
    install_broken(own_repository, model.SerializeToString())
    process = serve(own_repository, "--no-reference", "--once")
    _, errors = process.communicate(timeout=HANG_S)
    assert process.returncode == 3
    assert re.search(
        "the weights in arcface_onnx come from an older import: they have no output '(norm|contract)'. "
        "Import the same source again: arcface import SOURCE",
        errors,
    )


def test_serve_mends_what_a_killed_command_left_and_names_demo_weights(triton_binary, own_repository):
    overlay = own_repository / "arcface_onnx" / "configs" / "onnx.pbtxt"
    right = overlay.read_text()
    assert 'parameters { key: "demo" value: { string_value: "true" } }' in right
    overlay.write_text("# of another version\n")
    process = serve(own_repository, "--no-reference", "--once")
    output, errors = process.communicate(timeout=HANG_S)
    assert process.returncode == 0, errors
    assert f"mended: {overlay} does not describe the version to be served" in output
    assert "DEMO WEIGHTS: random numbers that recognise nobody. Next: arcface import YOUR.onnx" in output
    assert overlay.read_text() == right


def test_a_stricter_limit_in_the_configuration_acts_in_the_startup_check(triton_binary, own_repository, monkeypatch):
    monkeypatch.setenv("ARCFACE_COMPARISON__MAX_DRIFT__FP32", "1e-17")
    process = serve(own_repository, "--once")
    table, errors = process.communicate(timeout=HANG_S)
    assert process.returncode == 1, errors
    assert "FAILED (fp32: drift" in table


def test_a_reference_that_does_not_load_costs_the_comparison_and_not_the_service(triton_binary, own_repository):
    (model,) = own_repository.glob("arcface_reference/*/model.py")
    model.write_text("raise MemoryError\n")
    process = serve(own_repository, "--once")
    table, errors = process.communicate(timeout=HANG_S)
    assert process.returncode == 0, errors
    told = rf"arcface_reference: it needs more memory than the {launch_limit() / 2**30:.1f} GB that its process may"
    assert told in errors and "serving onnx without the reference instead" in errors
    measured = table.split("mean cosine")[1]  # before it, what serve mended names every model
    assert "golden rows (fp32: drift" in measured and "arcface_reference" not in measured


def test_a_backend_that_drifts_is_replaced_by_the_reference_and_loudly(triton_binary, tmp_path):
    repository = copy_repository(tmp_path)
    assemble(write_model(tmp_path / "models" / "drifting", error=0.5), repository)
    process = serve(repository)
    shown = []
    for line in process.stdout:
        shown.append(line)
        if line.startswith("Ctrl-C"):
            break
    process.terminate()
    _, errors = process.communicate(timeout=HANG_S)
    assert "VALIDATION FAILED: arcface_onnx FAILED (fp32: drift" in errors
    assert "serving reference instead" in errors
    last = "".join(shown).split("arcface_reference")[-1]
    assert "arcface_onnx" not in last and "arcface  " in last
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        (
            "tritonserver: error while loading shared libraries: libb64.so.0d: cannot open shared object file\n",
            "it needs libb64.so.0d, which this host has not. Install it, or use the NGC container: docker-compose up",
        ),
        (
            "/x/tritonserver: /lib/libc.so.6: version `GLIBC_2.35' not found (required by /x/tritonserver)\n",
            "it needs GLIBC_2.35, which this host has not. Install it, or use the NGC container: docker-compose up",
        ),
        (
            "/x/bin/tritonserver: unrecognized option '--no-such'\nUsage: tritonserver [options]\n",
            "unrecognized option '--no-such' (log: {log})",
        ),
        (
            "E1120 16:25:08.1 4778 model_repository_manager.cc:1460] \"Poll failed for model directory 'arcface_onnx': "
            'failed to read text proto from /m/arcface_onnx/configs/onnx.pbtxt"\n'
            "error: creating server: Invalid argument - load failed for model 'arcface'\n",
            "arcface_onnx: failed to read text proto from /m/arcface_onnx/configs/onnx.pbtxt (log: {log})",
        ),
        (
            "E1122 17:47:15.0 1310 model_lifecycle.cc:642] \"failed to load 'arcface_onnx' version 2: Internal: "
            'MemoryError: <EMPTY MESSAGE>\\n\\nAt:\\n  /x/onnx/__init__.py(169): _load_bytes\\n"\n',
            f"arcface_onnx: it needs more memory than the {launch_limit() / 2**30:.1f} GB that its process may "
            "take here (log: {log})",
        ),
        ("", "no reason in its output (log: {log})"),
    ],
)
def test_the_reason_is_taken_from_the_servers_log(tmp_path, log, reason):
    path = tmp_path / "tritonserver.log"
    path.write_text(log)
    assert reason_in_log(path) == reason.format(log=path)


def test_a_server_that_was_killed_says_so(tmp_path):
    assert reason_of_end(-9, tmp_path / "log") == f"by SIGKILL (out of memory? Next: dmesg) (log: {tmp_path}/log)"
    assert reason_of_end(1, tmp_path / "log") == f"with status 1: no reason in its output (log: {tmp_path}/log)"


@pytest.mark.parametrize(
    ("help_text", "options"),
    [("  --allow-client-shm <boolean>\n", ("--allow-client-shm=true",)), ("  --http-port <integer>\n", ())],
)
def test_shared_memory_is_allowed_where_the_server_on_path_refuses_it_by_default(
    tmp_path, monkeypatch, help_text, options
):
    server = tmp_path / "tritonserver"
    server.write_text(f"#!/bin/sh\nprintf '%s' '{help_text}' >&2\nexit 1\n")
    server.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    binary = find_tritonserver()
    assert binary.options == options
    assert set(options) <= set(arguments(binary, "repository", ["arcface"], "onnx", free_ports(), Exposure()))


def test_backends_are_composed_whole_by_servers_that_start_for_the_first_time_at_once(
    triton_binary, tmp_path, monkeypatch
):
    wheel = triton_binary.path.parents[1]
    stub = wheel / "python_backend_stubs" / f"3.{sys.version_info.minor}" / "triton_python_backend_stub"
    meet = threading.Barrier(4)

    def compose(round_: int) -> list[str]:
        meet.wait()
        folder = _compose_backends(wheel, REPO / "backends")
        made = folder / "python" / stub.name
        assert os.access(made, os.X_OK)
        assert made.read_bytes() == stub.read_bytes()
        return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))

    for round_ in range(4):
        monkeypatch.setattr("arcface_build.serving.binary._composed", lambda name, n=round_: tmp_path / str(n) / name)
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(compose, [round_] * 4)) == [["onnxruntime", "python", "tensorrt"]] * 4


def test_two_serves_of_one_moment_do_not_prove_each_others_server(triton_binary, own_repository, tmp_path):
    other = Path(shutil.copytree(own_repository, tmp_path / "other" / "model_repository"))
    ports = free_ports()
    options = ["--http-port", str(ports.http), "--grpc-port", str(ports.grpc), "--metrics-port", str(ports.metrics)]
    options += ["--once", "--json", "--no-reference"]
    both = [serve(repository, *options) for repository in (own_repository, other)]
    said = [process.communicate(timeout=HANG_S) for process in both]
    states = sorted(process.returncode for process in both)
    assert states in ([0, 3], [0, 0]), said  # [0, 0]: the machine was so slow that they followed each other
    for process, (output, errors) in zip(both, said, strict=True):
        if process.returncode == 3:
            assert output == "" and "is in use on 127.0.0.1" in errors


def test_a_server_that_was_there_first_is_not_taken_for_ours(triton_binary, own_repository, tmp_path, monkeypatch):
    def process(name: str, ports: Ports) -> TritonProcess:
        return TritonProcess(
            triton_binary, own_repository, ["arcface_onnx"], ports=ports, log_path=tmp_path / f"{name}.log"
        )

    def no_lock(self: PortLock, ports: Ports, hosts: dict[str, str]) -> None:
        self._sockets = []

    with process("first", free_ports()) as first:
        first.wait_ready()
        # As if it had begun to listen after our look at the port, and were nobody who knows our lock.
        monkeypatch.setattr(Ports, "check_free", lambda self, hosts: None)
        monkeypatch.setattr("arcface_build.serving.process.PortLock.__init__", no_lock)
        with (
            process("second", Ports(first.ports.http, free_ports().grpc, free_ports().metrics)) as second,
            pytest.raises(ServerFailed, match=r"tritonserver ended while starting .*[Ss]ocket"),
        ):
            second.wait_ready()
        assert first.pid is not None
