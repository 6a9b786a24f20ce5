"""Chooses what to serve on a CPU: the fastest candidate by what was measured on this host, and why it was that one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from arcface_build.variants.candidates import PLAIN, Candidate, candidates
from arcface_build.variants.fastest import fastest, lead, outruns
from arcface_build.variants.measure import drift_here, measure
from arcface_build.variants.speeds import Goal, Speed, SpeedTable, host_key, keep_speeds, kept_speeds
from arcface_build.variants.untried import offer, untried
from arcface_clients.engines.runtimes import first_line
from arcface_clients.errors import DependencyMissing, GateFailed
from arcface_clients.evidence.drift import DRIFT_LIMITS
from arcface_clients.evidence.gate import judge_record


@dataclass(frozen=True)
class Wanted:
    """What is asked for.

    Attributes:
        goal: "throughput" (faces/s at full batch) or "latency" (a lone face).
        precision: this one, unmeasured; None: the fastest.
        remeasure: do not believe what was measured earlier.
    """

    goal: Goal = "throughput"
    precision: str | None = None
    remeasure: bool = False


FASTEST = Wanted()


@dataclass(frozen=True)
class VariantChoice:
    """What to serve on this CPU.

    Attributes:
        file: the ONNX, relative to the model folder.
        precision: fp32, bf16 or int8.
        runtime: one of `arcface_clients.engines.runtimes.RUNTIMES`.
        reason: one line for people.
        sidecar: the variant's; None for fp32.
        measured: goal, figures and runner-up, for the version's manifest; None where nothing was measured.
        offer: a line for people about a variant that would be faster and is not made yet; empty if none is known.
        form: "Winograd" where the file computes convolutions by that method.
    """

    file: str
    precision: str
    runtime: str
    reason: str
    sidecar: dict[str, Any] | None = None
    measured: dict[str, Any] | None = None
    offer: str = ""
    form: str = ""

    def to_json(self) -> dict[str, Any]:
        """A JSON object with the field names as keys."""
        return asdict(self)

    @property
    def plain(self) -> bool:
        """Whether it is what would be served without a choice."""
        return (self.precision, self.runtime, self.form) == PLAIN

    def accelerator_pbtxt(self) -> str:
        """The `optimization` block for config.pbtxt; empty for ONNX Runtime's own kernels."""
        if self.runtime == "onnxruntime":
            return ""
        return (
            'optimization { execution_accelerators { cpu_execution_accelerator [ { name: "openvino" '
            f'parameters {{ key: "precision" value: "{self.runtime.removeprefix("openvino-")}" }} }} ] }} }}\n'
        )


def choose(
    model_dir: Path,
    limits: Mapping[str, float] | None,
    here: Sequence[str],
    told_precision: bool = True,
    wanted: Wanted = FASTEST,
    say: Callable[[str], None] = lambda text: None,
) -> VariantChoice:
    """The fastest of a model's files and runtimes that passed its gate; measured on this host unless it already was.

    Args:
        model_dir: models/NAME/.
        limits: largest drift by precision; None keeps the limits that the variants were judged by.
        here: runtimes of what will serve it (`arcface_clients.engines.runtimes.RUNTIMES`), the preferred one first.
        told_precision: whether OpenVINO is told in which precision to compute; see `able_runtimes`.
        wanted: the goal, or a precision that is obeyed without measuring.
        say: told before seconds are spent on measuring.

    Raises:
        GateFailed: the precision that is wanted may not be served here, or nothing may.
    """
    found, why_not = candidates(model_dir, limits, here, told_precision)
    of_today = {**DRIFT_LIMITS, **(limits or {})}
    if wanted.precision is not None:
        return _asked_for(wanted.precision, found, why_not, model_dir, of_today)
    missing = untried(model_dir, here, told_precision)
    table = _table(model_dir, found, missing, wanted.remeasure, say)
    by_key = {one.key: one for one in found}
    why_not |= table.failed
    why_not |= _refused([one for one in table.speeds if one.key in by_key], of_today)
    usable = [speed for speed in table.speeds if speed.key in by_key and speed.name not in why_not]
    if not usable:
        reasons = "; ".join(f"{name}: {why}" for name, why in why_not.items())
        raise GateFailed(f"{model_dir.name} is not served: {reasons}")
    if len(table.speeds) == 1:
        only = by_key[usable[0].key]
        return _chosen(only, f"{only.name}, the only one that may run here", why_not)
    taken, runner_up = fastest(usable, wanted.goal)
    told = {
        "goal": wanted.goal,
        "host": host_key(),
        "full_batch": table.full_batch,
        "runner_up": runner_up.name if runner_up else None,
        "memory_bytes": taken.memory,
        "speeds": [speed.told() for speed in usable],
    }
    offers = [
        offer(model_dir.name, speed.precision, lead(speed, taken, wanted.goal))
        for speed in sorted(
            (one for one in table.speeds if one.key not in by_key), key=lambda one: -median(one.rounds(wanted.goal))
        )
    ]
    reason = _why(taken, runner_up, usable, table.full_batch, wanted.goal)
    choice = _chosen(by_key[taken.key], reason, why_not)
    return replace(choice, measured=told, offer=next(filter(None, offers), ""))


def _refused(speeds: Sequence[Speed], limits: Mapping[str, float]) -> dict[str, str]:
    """Name → why, of those that need more memory than there is, that this host computes differently from the reference,
    or of which nobody measured it.
    """
    verdicts = {speed.name: speed.too_large or _judge_here(speed.drift, speed.precision, limits) for speed in speeds}
    return {name: why for name, why in verdicts.items() if why}


def _judge_here(drift: float | None, precision: str, limits: Mapping[str, float]) -> str:
    """Why what this host computes is not the reference's; empty if it is. OpenVINO was seen to be off by 0.3."""
    verdict = judge_record({"max_drift": drift}, precision, limits)
    return "" if verdict.passed else f"this CPU computes something else ({verdict.why}, on golden faces)"


def _asked_for(
    precision: str,
    found: Sequence[Candidate],
    why_not: Mapping[str, str],
    model_dir: Path,
    limits: Mapping[str, float],
) -> VariantChoice:
    """The first of this precision that this host computes as the reference did; the rest are not measured."""
    wrong: dict[str, str] = {}
    for one in (one for one in found if one.precision == precision):
        try:
            drift = drift_here(model_dir, one)
            why = "" if drift is None else _judge_here(drift, precision, limits)
        except DependencyMissing:  # a runtime that only the server has: it is compared when that has started
            why = ""
        except Exception as exc:  # another runtime may do
            why = first_line(exc)
        if not why:
            return _chosen(one, f"{one.name}, as asked for", wrong)
        wrong[one.name] = why
    left_out = [why for name, why in why_not.items() if name.split()[0] == precision]
    because = "; ".join(list(wrong.values()) or left_out) or "no runtime here computes it"
    raise GateFailed(
        f"{precision} of {model_dir.name} is not served: {because}. "
        f"Next: arcface quantize {model_dir.name} --precision {precision}, or leave the choice: --variant auto"
    )


def _table(
    model_dir: Path,
    found: Sequence[Candidate],
    missing: Sequence[Candidate],
    remeasure: bool,
    say: Callable[[str], None],
) -> SpeedTable:
    """What was measured of these on such a host, else what is measured now."""
    host = host_key()
    kept = None if remeasure else kept_speeds(model_dir, host)
    if kept and (have := kept.of(found, missing)):
        return have
    say(
        f"measuring {len(found) + len(missing)} ways to run {model_dir.name} on this CPU, once: seconds, "
        "or a minute or two for a large model"
    )
    table = measure(model_dir, found, missing)
    if table.speeds and not table.failed:
        keep_speeds(model_dir, host, table)
    return table


def _chosen(one: Candidate, reason: str, why_not: Mapping[str, str]) -> VariantChoice:
    passed = f"; it passed its gate with drift {one.drift:.2g}" if one.drift is not None else ""
    others = "".join(f"; not {name}: {why}" for name, why in why_not.items())
    return VariantChoice(one.file, one.precision, one.runtime, reason + passed + others, one.sidecar, form=one.form)


def _why(taken: Speed, runner_up: Speed | None, usable: Sequence[Speed], full_batch: int, goal: Goal) -> str:
    """What was measured, in one line: against the runner-up, and against what is served where nothing is chosen."""
    plain = next((speed for speed in usable if (speed.precision, speed.runtime, speed.form) == PLAIN), None)
    others = dict.fromkeys(speed for speed in (runner_up, plain) if speed is not None and speed is not taken)
    against = (
        f"{lead(taken, other, goal):.2f} × {other.name}" if outruns(taken, other, goal) else f"level with {other.name}"
        for other in others
    )
    rate = median(taken.rounds(goal))
    figure = f"{1000 / rate:.3g} ms a face" if goal == "latency" else f"{rate:.3g} faces/s"
    batch = 1 if goal == "latency" else full_batch
    return f"{taken.name}: {', '.join((figure, *against))} (measured on this CPU at batch {batch}, for {goal})"
