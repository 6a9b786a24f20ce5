"""Proves and measures plans on this GPU in stages, within a time budget; writes <gpu>.json and <gpu>.md.

Each stage is a process of its own: one that crashes costs its stage, and leaves its last words in the report. The
report is written after every step, and a later command with the same state folder goes on where this one stopped.
Nothing is estimated.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

from arcface_build.plans.build import tensorrt_version
from arcface_build.plans.gpu import Gpu, find_gpus
from arcface_clients.atomic import new_file, write_json
from arcface_clients.errors import Missing
from arcface_clients.plans.manifest import now_utc
from arcface_tools.gpu_check.check import ENDED, Stopped, read_report
from arcface_tools.gpu_check.checkout import ROOT
from arcface_tools.gpu_check.report import to_markdown
from arcface_tools.gpu_check.settings import Settings, named
from arcface_tools.gpu_check.stage import EXIT_STOP, STAGES

LEAST_S = 10.0  # a stage that would have less than this is not started
END_S = 20.0  # a stage that outlasts its time may take this long to write its report
MOST_LOG_BYTES = 12 << 20


def main(argv: list[str] | None = None) -> int:
    """Run the stages; 0 with a report, 3 if nothing can be measured here, 143 after SIGTERM."""
    arguments = _parser().parse_args(argv)
    if arguments.rehearse:
        from arcface_tools.gpu_check.rehearsal import rehearse

        return rehearse(arguments)
    try:
        gpu, version = find_gpus()[0], tensorrt_version()
    except Missing as exc:
        print(f"Missing: {exc}", file=sys.stderr)
        return exc.exit_code
    run = Run(arguments, gpu, version)
    signal.signal(signal.SIGTERM, _stop)
    try:
        code = run.stages(arguments.stage or range(len(STAGES)))
    except Stopped:
        print(f"ended by SIGTERM; what was measured: {run.target}", file=sys.stderr)
        code = 128 + signal.SIGTERM
    finally:
        run.publish()
    if code == 0:
        print(f"written: {run.target} and {run.target.with_suffix('.md').name}")
    return code


class Run:
    """One command: the state folder, the time, and where the report goes."""

    def __init__(self, arguments: argparse.Namespace, gpu: Gpu, tensorrt: str) -> None:
        """Continue the report of the state folder if it is of this GPU and TensorRT, else begin one."""
        self._deadline = time.monotonic() + arguments.budget_s
        self.state: Path = arguments.state.resolve()
        name = re.sub(r"[^a-z0-9]+", "-", gpu.name.lower().removeprefix("nvidia ")).strip("-")
        out = arguments.out or Path(os.environ.get("OUT") or ROOT / "docs" / "measured")
        self.target: Path = out.resolve() / f"{name}.json"
        for folder in (self.state / "logs", self.target.parent):
            folder.mkdir(parents=True, exist_ok=True)
        host: dict[str, Any] = {
            "gpu": gpu.name, "sm": gpu.sm, "driver": gpu.driver, "cuda": gpu.cuda, "memory_bytes": gpu.memory_bytes,
            "tensorrt": tensorrt, "python": sys.version.split()[0], "cpus": os.cpu_count(),
        }  # fmt: skip
        if not self._continues(host):
            self._set_aside()
            write_json(self.state / "report.json", {"created": now_utc(), "commands": [], "host": host, "stages": {}})
        _settings(arguments).write(self.state)
        report = read_report(self.state)
        report["commands"].append(" ".join(["scripts/gpu-check", *sys.argv[1:]]))
        report["host"] = host  # without the Python that had torch on the machine before
        report["faces"] = {"count": arguments.faces, "origin": "synthetic"}
        write_json(self.state / "report.json", report)

    def stages(self, numbers: Any) -> int:
        """Run these stages, as far as the time allows; 0, or EXIT_STOP with a sentence."""
        for number in numbers:
            left_s = self._deadline - time.monotonic()
            if left_s < LEAST_S:
                self._note(number, "not_started", f"{max(left_s, 0):.0f} s of the budget were left")
                continue
            print(f"stage {number}: {STAGES[number].replace('_', ' ')}", flush=True)
            code = self._stage(number, left_s)
            self.publish()
            if code == EXIT_STOP:
                print(f"Stopped: {read_report(self.state)['stopped']}", file=sys.stderr)
                return EXIT_STOP
        return 0

    def publish(self) -> None:
        """Copy the report to its place, write its page, and pack the logs."""
        report = read_report(self.state)
        write_json(self.target, report)
        with new_file(self.target.with_suffix(".md")) as temporary:
            temporary.write_text(to_markdown(report))
        logs = self.target.with_name(f"{self.target.stem}-logs.tar.gz")
        with new_file(logs) as temporary, tarfile.open(temporary, "w:gz") as packed:
            packed.add(self.state / "logs", "logs", filter=_not_too_large)

    def _continues(self, host: dict[str, Any]) -> bool:
        """Whether the state folder has a report of this GPU, driver and TensorRT."""
        file = self.state / "report.json"
        if not file.is_file():
            return False
        before = read_report(self.state)["host"]
        return all(before.get(key) == host[key] for key in ("gpu", "driver", "tensorrt"))

    def _set_aside(self) -> None:
        """Keep the report of another GPU, driver or TensorRT that this one would replace."""
        file = self.state / "report.json"
        if file.is_file():
            kept = self.state / f"report-{read_report(self.state)['created'].replace(':', '-')}.json"
            file.replace(kept)
            print(
                f"the report of {self.state} is of another GPU, driver or TensorRT: kept as {kept.name}",
                file=sys.stderr,
            )

    def _stage(self, number: int, left_s: float) -> int:
        """Run one stage in a process of its own; what it said last is in the report if it did not end by itself."""
        log = self.state / "logs" / f"stage-{number}.log"
        line = [sys.executable, "-X", "faulthandler", "-m", "arcface_tools.gpu_check.stage"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        environment["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # the order of nvidia-smi
        environment.setdefault("CUDA_MODULE_LOADING", "LAZY")
        with log.open("w") as errors:
            child = subprocess.Popen(
                [*line, str(self.state), str(number), f"{left_s:.1f}"], stderr=errors, env=environment
            )
        try:
            code = child.wait(timeout=left_s)
        except subprocess.TimeoutExpired:
            code = _end(child)
        except BaseException:
            _end(child)
            self._note_running_step(number)
            raise
        if code not in (0, EXIT_STOP):
            ended = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            said = log.read_text(errors="replace").strip()[-4000:]
            self._note(number, "died", f"the stage ended with {ended}; it said last:\n{said or 'nothing'}")
        return code

    def _note(self, number: int, key: str, words: str) -> None:
        report = read_report(self.state)
        report["stages"].setdefault(str(number), {"title": STAGES[number].replace("_", " "), "steps": {}})[key] = words
        write_json(self.state / "report.json", report)

    def _note_running_step(self, number: int) -> None:
        """A signal may reach the stage before its step can note it, or while it cannot: the step is named here."""
        report = read_report(self.state)
        for step in report["stages"].get(str(number), {}).get("steps", {}).values():
            if step.pop("running", False):
                step["why"] = ENDED
        write_json(self.state / "report.json", report)


def _end(child: subprocess.Popen[bytes]) -> int:
    """SIGTERM, so that the stage writes what it has and ends what it started; then SIGKILL."""
    child.terminate()
    try:
        return child.wait(timeout=END_S)
    except subprocess.TimeoutExpired:
        child.kill()
        return child.wait()


def _stop(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # one is enough: unwinding may take a moment
    raise Stopped


def _not_too_large(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """Refused plans lie among the logs; they are too large to carry."""
    return member if member.size <= MOST_LOG_BYTES and not member.name.endswith(".refused") else None


def _settings(arguments: argparse.Namespace) -> Settings:
    return Settings(
        networks=tuple(named(arguments.networks)),
        batches=tuple(sorted(arguments.batches)),
        opt_batch=arguments.opt_batch,
        faces=arguments.faces,
        sample_s=arguments.sample_s,
        warm_up_s=arguments.warm_up_s,
        replays=arguments.replays,
        callers=arguments.callers,
        gemm_size=arguments.gemm_size,
        torch_python=arguments.torch_python,
        external_tactics=not arguments.no_external_tactics,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/gpu-check",
        description="Prove and measure plans on this GPU, in stages, within a time budget; writes <gpu>.json and .md.",
        epilog="Example, where a machine is given for ten minutes at a time: scripts/gpu-check --state state --stage 0 "
        "--stage 1 --stage 2; then --stage 3, and so on. A finished step is not run again.",
    )
    default = Settings(networks=())
    numbers = ", ".join(f"{number} {name.replace('_', ' ')}" for number, name in enumerate(STAGES))
    add = parser.add_argument
    add("--stage", type=int, action="append", choices=range(len(STAGES)), metavar="N", help=f"only this: {numbers}")
    add("--state", type=Path, default=ROOT / "gpu-check-state", help="folder of models, plans, logs and the report")
    add(
        "--out", type=Path, help="folder of the published report [$OUT or docs/measured; a rehearsal: the state folder]"
    )
    add("--budget-s", type=float, default=560.0, help="the command ends after about this [560]")
    add(
        "--networks",
        nargs="+",
        default=["demo-r100", "demo-r50", "demo-r18", "demo-mobile"],
        metavar="[NAME=]SOURCE",
        help="sources as for arcface import; the first is measured in full [demo-r100 demo-r50 demo-r18 demo-mobile]",
    )
    add("--batches", nargs="+", type=int, default=default.batches, help="batch sizes [1 8 32 64 128]")
    add("--opt-batch", type=int, default=default.opt_batch, help="the batch that kernels are tuned for [64]")
    add("--faces", type=int, default=default.faces, help="faces that drift is measured on [400]")
    add("--sample-s", type=float, default=default.sample_s, help="seconds of one measurement [0.7]")
    add("--warm-up-s", type=float, default=default.warm_up_s, help="seconds before each measurement [0.5]")
    add("--replays", type=int, default=default.replays, help="the fewest runs of one measurement [200]")
    add("--callers", type=int, default=default.callers, help="requests in flight through the server [8]")
    add("--gemm-size", type=int, default=default.gemm_size, help="side of the matrices of the peak [8192]")
    add("--torch-python", help="a Python with torch and CUDA [the first found on PATH]")
    add("--no-external-tactics", action="store_true", help="where cuBLAS and cuDNN are only stubs")
    add("--rehearse", action="store_true", help="all stages on stand-ins, on a host without a GPU, in two minutes")
    return parser


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
