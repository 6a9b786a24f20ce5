"""Which tritonserver runs here, and with which backends: PATH first, else the one inside the nvidia-pytriton wheel."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import secrets
import shutil
import subprocess
import sys
import sysconfig
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata, util
from pathlib import Path

from arcface_build.shipped import shipped
from arcface_clients.atomic import new_folder
from arcface_clients.errors import Missing
from arcface_clients.extras import how_to_get

TOO_NEW_PYTHON = (3, 13)  # the server's Python stub needs numpy 1, which has no wheels for it


@dataclass(frozen=True)
class TritonBinary:
    """A tritonserver that can be started: its path, the environment it needs, and its backends (None: its own).

    `options` are arguments that this version wants and others do not know.
    """

    path: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    backend_directory: Path | None = None
    origin: str = ""
    options: tuple[str, ...] = ()


def find_tritonserver() -> TritonBinary:
    """The tritonserver of this host; the one of the wheel is given our python-based backends.

    Raises:
        Missing: neither PATH nor the environment has one, or what the wheel's server needs is wrong.
    """
    on_path = shutil.which("tritonserver")
    if on_path:
        return TritonBinary(
            Path(on_path), origin="on PATH, with its native backends", options=_options_of(Path(on_path))
        )
    spec = util.find_spec("pytriton")
    if spec is None or not spec.submodule_search_locations:
        if (host := f"{platform.system()} {platform.machine()}") != "Linux x86_64":
            raise Missing(
                f"no tritonserver on PATH, and the one that a wheel brings is for Linux x86_64; this is {host}. "
                "Use an image that holds one, as NGC's for arm64, or a server elsewhere: clients, import and the "
                "in-process engines run here (docs/install.md)"
            )
        if sys.version_info >= TOO_NEW_PYTHON:
            raise Missing(
                "no tritonserver on PATH, and the one that a wheel brings runs on Python 3.10 to 3.12; this is "
                f"{platform.python_version()}. Use one of those: python3.12 -m venv .venv (clients run on either)"
            )
        raise Missing(
            "no tritonserver: it is neither on PATH nor in this Python environment. "
            f"Install the wheel that holds one (Linux x86-64, glibc 2.35): {how_to_get('pytriton')}, "
            "or run inside the NGC container: docker-compose up"
        )
    package = Path(next(iter(spec.submodule_search_locations)))
    server = package / "tritonserver"
    return TritonBinary(
        path=server / "bin" / "tritonserver",
        environment=_environment(package),
        backend_directory=_compose_backends(server, shipped("backends")),
        origin=f"from nvidia-pytriton {metadata.version('nvidia-pytriton')}, with our python-based backends",
    )


def _options_of(server: Path) -> tuple[str, ...]:
    """Since 26.04 (server #8739) clients may use shared memory only with a flag, which older servers do not know."""
    known = subprocess.run([server, "--help"], capture_output=True, text=True, check=False, errors="replace")
    return ("--allow-client-shm=true",) if "--allow-client-shm" in known.stdout + known.stderr else ()


def _environment(package: Path) -> dict[str, str]:
    """Libraries for the server only, and this very environment for the Python stubs that it starts.

    Without VIRTUAL_ENV and PATH the stub takes the system's Python and finds no numpy.
    """
    # The stub links libpython, which may lie beside this Python only.
    shared_python = sysconfig.get_config_var("LIBDIR")
    libraries = [str(package.parent / "nvidia_pytriton.libs"), shared_python, os.environ.get("LD_LIBRARY_PATH")]
    return {
        "LD_LIBRARY_PATH": ":".join(filter(None, libraries)),
        "VIRTUAL_ENV": sys.prefix,
        "PATH": f"{sys.prefix}/bin:{os.environ.get('PATH', '')}",
    }


def _compose_backends(server: Path, ours: Path) -> Path:
    """A backend directory: the wheel's python backend with the stub of this Python, and links to our backends/."""
    if int(metadata.version("numpy").split(".")[0]) >= 2:
        raise Missing(
            f"numpy {metadata.version('numpy')} is installed, the Python stub of this tritonserver needs numpy < 2 "
            "(with numpy 2 its answers come back empty). Next: pip install 'numpy<2'"
        )
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = server / "python_backend_stubs" / python / "triton_python_backend_stub"
    if not stub.is_file():
        have = sorted(p.name for p in (server / "python_backend_stubs").iterdir())
        raise Missing(
            f"this tritonserver has no stub for Python {python} (it has {', '.join(have)}). Use one of those."
        )
    _check_shared_python(python)
    checkout = f"{zlib.crc32(str(ours).encode()):08x}"  # several checkouts may share an environment
    folder = _composed(f"{metadata.version('nvidia-pytriton')}-{checkout}")
    target = folder / "python"
    if not (target / stub.name).is_file():
        with new_folder(target) as making:  # whole or not at all: two servers may be started for the first time at once
            for file in (server / "backends" / "python").glob("*.*"):
                shutil.copyfile(file, making / file.name)
            shutil.copyfile(stub, making / stub.name)
            (making / stub.name).chmod(0o755)
    for backend in filter(Path.is_dir, ours.iterdir()):
        link = folder / backend.name
        if not link.is_symlink() or link.resolve() != backend.resolve():
            new = folder / f".{backend.name}.{secrets.token_hex(4)}"
            new.symlink_to(backend)
            new.replace(link)
    return folder


def _composed(name: str) -> Path:
    """Where a backend directory is or may be: with the environment's packages, else in the user's own cache."""
    share = Path(sys.prefix) / "share" / "arcface-triton"
    existing = next(folder for folder in (share / name, *(share / name).parents) if folder.exists())
    made = existing == share / name or os.access(existing, os.W_OK)
    return (share if made else Path("~/.cache/arcface-triton/backends").expanduser()) / name


def _check_shared_python(python: str) -> None:
    """The stub links libpython3.X.so: some builds of Python have none, and Debian keeps it in a package of its own."""
    name = f"libpython{python}.so.1.0"
    for place in (str(Path(sysconfig.get_config_var("LIBDIR") or "") / name), name):
        with contextlib.suppress(OSError):
            ctypes.CDLL(place)
            return
    raise Missing(
        f"{name} is nowhere to be found, and the Python stub of this tritonserver needs it. "
        f"Next: apt-get install libpython{python}, or use a Python that was built with --enable-shared"
    )
