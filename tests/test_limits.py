"""What a host may lack is said in one sentence: shared memory, open files, a way past a proxy."""

from __future__ import annotations

import json
import os
import resource
import shlex
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from ctypes.util import find_library
from functools import partial
from pathlib import Path

import pytest

from arcface_build.allocator import PRELOAD, SETTINGS, with_jemalloc
from arcface_build.errors import ServerFailed
from arcface_build.host_memory import launch_limit, processes_killed, server_memory_limit, usable_memory
from arcface_build.imports import child
from arcface_build.serving.binary import TritonBinary
from arcface_build.serving.choose import BackendChoice
from arcface_build.serving.command_line import CONNECTIONS
from arcface_build.serving.launcher import launcher
from arcface_build.serving.limits import few_open_files, need_shared_memory
from arcface_build.serving.ports import free_ports
from arcface_build.serving.prepare import Prepared
from arcface_build.serving.process import TritonProcess
from arcface_build.serving.reasons import for_want_of_memory
from arcface_build.serving.run import _without_what_failed
from arcface_build.serving.server_runtimes import ServerRuntimes
from arcface_clients import TritonEmbedder
from arcface_clients.errors import ServerUnreachable
from arcface_clients.faces.synthetic import synthetic_faces
from odd_models import CONFIG, write_model

SERVE = "from arcface_build.cli import main; import sys; main(sys.argv[1:])"


def serve_in(mount: str, repository: Path) -> subprocess.CompletedProcess[str]:
    """`arcface serve --once` in a mount namespace of its own, with another /dev/shm."""
    if os.geteuid() or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("needs root and a mount namespace (unshare -m)")
    line = [sys.executable, "-c", SERVE, "serve", "--once", "--no-reference", "--model-repository", str(repository)]
    line += [f"--{name}-port={port}" for name, port in free_ports().named().items()]
    script = f'{mount} && exec "$@"'
    return subprocess.run(["unshare", "-m", "sh", "-c", script, "sh", *line], capture_output=True, text=True)


@pytest.mark.skipif(shutil.which("unshare") is None, reason="no unshare(1)")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "size=4m",
            "ServerFailed: /dev/shm has 4.0 MB free; expected 16 MB or more, and Triton's Python backends",
        ),
        ("ro", "ServerFailed: /dev/shm may not be written, and Triton's Python backends pass faces through it."),
    ],
)
def test_a_small_or_read_only_dev_shm_is_one_sentence(triton_binary, demo_repository, options, message):
    done = serve_in(f"mount -t tmpfs -o {options} tmpfs /dev/shm", demo_repository)
    assert done.returncode == 3
    assert done.stderr.startswith(message) and done.stderr.count("\n") == 1, done.stderr
    assert "--shm-size=1g" in done.stderr


@pytest.mark.skipif(shutil.which("unshare") is None, reason="no unshare(1)")
def test_an_overlay_that_lies_is_named_where_it_cannot_be_mended_and_is_not_served(
    triton_binary, demo_repository, tmp_path
):
    repository = Path(shutil.copytree(demo_repository, tmp_path / "model_repository"))
    overlay = repository / "arcface_onnx" / "configs" / "onnx.pbtxt"
    contract = json.loads((repository / "arcface_onnx" / "1" / "manifest.json").read_text())["contract_id"]
    overlay.write_text(overlay.read_text().replace(contract, "2" * 64))
    here = shlex.quote(str(tmp_path))
    done = serve_in(f"mount --bind {here} {here} && mount -o remount,ro,bind {here}", repository)
    assert done.returncode == 2
    assert f"{overlay} does not describe the version to be served; mend it where it may be written" in done.stdout
    assert "answered with rows of contract" in done.stderr and "expected 222222222222" in done.stderr


def test_shared_memory_that_is_not_there_is_named(tmp_path):
    need_shared_memory(tmp_path)
    with pytest.raises(ServerFailed, match=f"there is no {tmp_path}/none, and Triton's Python backends"):
        need_shared_memory(tmp_path / "none")


@pytest.mark.parametrize("own", [None, 1 << 30], ids=["no limit of its own", "a lower one"])
def test_a_server_may_take_half_of_the_hosts_memory_or_what_its_user_said(own):
    ask = "import resource; print(*resource.getrlimit(resource.RLIMIT_DATA))"
    line = [*launcher(1), sys.executable, "-c", ask]
    lower = partial(resource.setrlimit, resource.RLIMIT_DATA, (own or resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    told = subprocess.run(line, check=True, start_new_session=True, capture_output=True, preexec_fn=lower).stdout
    assert told.split() == [str(own or launch_limit()).encode()] * 2


@pytest.mark.parametrize(
    ("usable_gb", "expected_gb"),
    [(64, 32), (24, 12), (16, 8), (12, 8), (8, 6), (4, 3)],
    ids=lambda gb: f"{gb} GB",
)
def test_a_small_host_leaves_a_server_more_than_half_and_triton_what_it_reserves(monkeypatch, usable_gb, expected_gb):
    monkeypatch.setattr("arcface_build.host_memory.usable_memory", lambda: usable_gb << 30)
    assert server_memory_limit() == expected_gb << 30
    assert launch_limit() == max(expected_gb, 4) << 30


@pytest.mark.parametrize(
    ("own", "files", "expected_gb"),
    [
        ("0::/", {"memory.max": "max\n"}, None),
        ("0::/", {"memory.max": f"{4 << 30}\n"}, 4),
        ("0::/a/b", {"a/memory.max": f"{2 << 30}", "a/b/memory.max": f"{3 << 30}"}, 2),
        ("0::/of/the/host", {"memory.max": f"{4 << 30}"}, 4),
        ("0::/a/../../..", {"../memory.max": "1"}, None),
        ("4:memory:/docker/1\n0::/", {"memory/memory.limit_in_bytes": f"{5 << 30}"}, 5),
        ("4:cpu,memory:/a", {"memory/a/memory.limit_in_bytes": f"{5 << 30}"}, 5),
        ("4:memory:/", {"memory/memory.limit_in_bytes": "9223372036854771712"}, None),
        ("1:name=systemd:/a", {"memory.max": "1"}, None),
        ("", {}, None),
    ],
)
def test_the_limit_of_a_container_counts_as_its_memory(tmp_path, own, files, expected_gb):
    cgroups, told = tmp_path / "cgroups" / "here", tmp_path / "own"
    for name, text in files.items():
        (cgroups / name).parent.mkdir(parents=True, exist_ok=True)
        (cgroups / name).write_text(text)
    told.write_text(own)
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert usable_memory(cgroups, told) == min(physical, expected_gb << 30 if expected_gb else physical)
    assert usable_memory(cgroups, tmp_path / "none") == physical


def test_the_limit_of_a_real_control_group_is_read():
    name = f"arcface-test-{os.getpid()}"
    groups = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    paths = [Path(f"/sys/fs/cgroup/memory{path}") for _, kinds, path in groups if kinds == "memory"]
    if not paths or os.geteuid():
        pytest.skip("needs root and a version 1 control group for memory")
    group = paths[0] / name
    try:
        group.mkdir()
    except OSError as exc:
        pytest.skip(f"may not make a control group: {exc}")
    try:
        (group / "memory.limit_in_bytes").write_text(str(1 << 30))
        ask = "from arcface_build import host_memory; from arcface_build.imports import child"
        ask += "; print(host_memory.server_memory_limit(), host_memory.launch_limit(), child.memory_limit())"
        join = f"echo $$ > {group}/cgroup.procs && exec {sys.executable} -c '{ask}'"
        done = subprocess.run(["sh", "-c", join], check=True, capture_output=True, text=True)
        assert [int(told) for told in done.stdout.split()] == [3 << 28, 4 << 30, int(child.MEMORY_SHARE * (1 << 30))]
    finally:
        group.rmdir()


@pytest.mark.parametrize("own", [None, 900 << 20])
def test_a_session_that_leaves_a_server_too_little_memory_is_told_before_it_ends_without_a_word(own):
    ask = "from arcface_build.serving.limits import little_memory; print(little_memory())"
    lower = partial(resource.setrlimit, resource.RLIMIT_DATA, (own or resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    told = subprocess.run(
        [sys.executable, "-c", ask], check=True, capture_output=True, text=True, preexec_fn=lower
    ).stdout
    assert told.startswith("each process of the server may take 0.9 GB (ulimit -d): expected 4 GB" if own else "\n")


def test_a_low_soft_limit_of_files_is_raised_for_the_server_and_a_low_hard_one_is_said(tmp_path, start_triton):
    write_model(tmp_path / "repository", "good")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
    try:
        server = start_triton(tmp_path / "repository", ["good"], config_name="")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert resource.prlimit(server.pid, resource.RLIMIT_NOFILE) == (hard, hard)
    assert few_open_files(wanted=2) == ""
    code = "from arcface_build.serving.limits import few_open_files; print(few_open_files())"
    told = subprocess.run(
        ["sh", "-c", 'ulimit -n 64; exec "$@"', "sh", sys.executable, "-c", code], capture_output=True, text=True
    )
    assert told.stdout == (
        "this session may open 64 files, and each connection takes one: more clients than that are not answered. "
        "Next: ulimit -n 1024 (as an administrator), or LimitNOFILE= of the service\n"
    )


def test_a_peer_that_says_nothing_more_is_cut_off_and_clients_outlive_their_connection(tmp_path, start_triton):
    write_model(tmp_path / "repository", "good")
    quick = [f"{option.partition('=')[0]}=1000" if option.split("=")[1].isdigit() else option for option in CONNECTIONS]
    server = start_triton(tmp_path / "repository", ["good"], config_name="", extra=quick)
    faces = synthetic_faces(2)
    with (
        TritonEmbedder(server.grpc_url, "good", retry_for_s=0) as embedder,
        socket.create_connection(("127.0.0.1", server.ports.grpc)) as silent,
    ):
        silent.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00")
        silent.settimeout(20)
        until = time.monotonic() + 20
        open_ = True
        while open_ and time.monotonic() < until:
            assert embedder.encode(faces).shape == (2, 64)
            silent.settimeout(0.2)
            try:
                open_ = bool(silent.recv(4096))
            except TimeoutError:
                continue
            except ConnectionResetError:
                open_ = False
        assert not open_
        assert embedder.encode(faces).shape == (2, 64)


def test_the_proxy_that_stands_between_is_named_without_its_password(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://user:secret@127.0.0.1:9")
    for name in ("grpc_proxy", "https_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with (
        TritonEmbedder("192.0.2.7:8001", retry_for_s=0, timeout_s=5) as embedder,
        pytest.raises(ServerUnreachable) as refused,
    ):
        embedder.ensure_ready()
    assert "It was asked for through http_proxy=127.0.0.1:9; to go past that: no_proxy=192.0.2.7." in str(refused.value)
    assert "secret" not in str(refused.value)
    with (
        TritonEmbedder("127.0.0.1:9", retry_for_s=0) as embedder,
        pytest.raises(ServerUnreachable) as refused,
    ):
        embedder.ensure_ready()
    assert "proxy" not in str(refused.value)


def test_jemalloc_is_preloaded_where_it_is_and_nobody_said_otherwise(monkeypatch):
    monkeypatch.setattr("arcface_build.allocator.find_library", lambda name: f"lib{name}.so.2")
    assert with_jemalloc({"HOME": "/"}) == {"HOME": "/", PRELOAD: "libjemalloc.so.2", **SETTINGS}
    assert with_jemalloc({"MALLOC_CONF": "narenas:2"}) == {"MALLOC_CONF": "narenas:2", PRELOAD: "libjemalloc.so.2"}
    assert with_jemalloc({PRELOAD: ""}) == {PRELOAD: ""}
    assert with_jemalloc({PRELOAD: "libasan.so"}) == {PRELOAD: "libasan.so"}
    monkeypatch.setattr("arcface_build.allocator.find_library", lambda name: None)
    assert with_jemalloc({"HOME": "/"}) == {"HOME": "/"}


BURST, KEPT_MB = 300, 80  # 722 MB of faces from 300 callers; seen right after it: 60 to 340 MB more than before


@pytest.mark.skipif(find_library("jemalloc") is None, reason="jemalloc is not installed: apt-get install libjemalloc2")
def test_a_burst_over_the_wire_is_given_back_though_nobody_asks_again(tmp_path, start_triton):
    config = CONFIG.format(width=64, contract="odd").replace("max_batch_size: 8", "max_batch_size: 64")
    write_model(tmp_path / "repository", "slow", config=config)
    server = start_triton(tmp_path / "repository", ["slow"], config_name="")
    assert "libjemalloc" in Path(f"/proc/{server.pid}/maps").read_text()
    threads = {name.read_text().strip() for name in Path(f"/proc/{server.pid}/task").glob("*/comm")}
    assert "jemalloc_bg_thd" in threads
    faces = synthetic_faces(64)

    def ask(_: int = 0) -> bool:
        with TritonEmbedder(server.grpc_url, "slow", shared_memory=False, timeout_s=60) as embedder:
            return embedder.encode(faces).shape == (64, 64)

    assert ask()
    before = resident_mb(server.pid)
    with ThreadPoolExecutor(BURST) as callers:
        assert all(callers.map(ask, range(BURST)))
    until = time.monotonic() + 60
    while (kept := resident_mb(server.pid) - before) > KEPT_MB and time.monotonic() < until:
        time.sleep(0.5)  # jemalloc's own threads give back, over ten seconds
    assert kept <= KEPT_MB, kept


def resident_mb(pid: int) -> float:
    """Memory of the process's own, without what it shares with its stubs."""
    (line,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1e3


def test_a_server_whose_process_the_kernel_killed_while_it_started_says_so(tmp_path, monkeypatch):
    (vmstat := tmp_path / "vmstat").write_text("pgfault 9\noom_kill 3\noom_kill_other 5\n")
    assert processes_killed(vmstat) == 3 and processes_killed(tmp_path / "none") == 0
    for before, after in ((3, 3), (3, 4)):
        counted = iter((before, after))
        monkeypatch.setattr("arcface_build.serving.process.processes_killed", lambda counted=counted: next(counted))
        server = TritonProcess(TritonBinary(Path("/bin/false")), tmp_path, [], log_path=tmp_path / "log")
        with server, pytest.raises(ServerFailed) as failed:
            server.wait_ready(30)
        assert ("the kernel killed a process for want of memory meanwhile" in str(failed.value)) == (after > before)


@pytest.mark.parametrize(
    ("why", "lesser"),
    [
        ("arcface_reference: bad weights", "without the reference"),
        (f"ended by SIGSEGV; {for_want_of_memory()}", "without the reference"),
        ("photo_faces: no such file", "without photos"),
        ("arcface_onnx: bad weights", None),
    ],
)
def test_what_embeddings_do_not_depend_on_is_left_out_where_it_fails(why, lesser):
    choice = BackendChoice("onnx", "asked for")
    ready = Prepared(TritonBinary(Path("/bin/true")), choice, ("onnx",), True, ("photo_faces",), {}, ServerRuntimes)
    left = _without_what_failed(ready, "onnx", why)
    assert (left and left[1]) == lesser
    if left:
        again = _without_what_failed(left[0], "onnx", why)
        assert again is None, "it is not left out twice"
