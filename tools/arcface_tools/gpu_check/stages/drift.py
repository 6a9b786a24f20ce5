"""Stage 3: drift of each precision on all faces, and what each build cost."""

from __future__ import annotations

from functools import partial

from arcface_clients.evidence.drift import DRIFT_LIMITS
from arcface_clients.evidence.gate import judge_embeddings
from arcface_tools.gpu_check import artefacts
from arcface_tools.gpu_check.check import GpuCheck, Result
from arcface_tools.gpu_check.plan_timer import PlanTimer
from arcface_tools.gpu_check.stages.bare import facts

TITLE = "Drift and the cost of a build"
PRECISIONS = ("fp16", "fp32", "int8")


def measure(check: GpuCheck) -> None:
    """Run the steps."""
    network = check.settings.networks[0][0]
    for precision in PRECISIONS:
        check.step(f"{network} {precision}", 60, partial(_drift, check, network, precision))


def _drift(check: GpuCheck, network: str, precision: str, result: Result) -> None:
    built = artefacts.plan(check, network, precision)
    result["plan"] = facts(built)
    with PlanTimer(built.path.read_bytes()) as timer:
        embeddings = timer.embed(check.faces, built.manifest.spec.opt_batch)
    verdict = judge_embeddings(artefacts.reference(check, built.source), embeddings, precision, DRIFT_LIMITS)
    result |= {"passed": verdict.passed, "why": verdict.why, "limit": verdict.limit}
    if verdict.report is not None:
        result["drift"] = verdict.report.to_json()
