"""Searches for the best settings of arcface_onnx on this host in duels between real servers.

Two servers at a time are measured, interleaved. A challenger replaces the champion only if it wins in nearly every
round, so that chance does not decide; at the end the champion must beat the shipped config in the same manner.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from arcface_build.bench.interleaved import MIN_ROUNDS, Spread

LEAF = "arcface_onnx"
LEAST_GAIN = 0.02


@dataclass(frozen=True)
class Settings:
    """The settings to search. `threads` is ONNX Runtime's intra-op threads per instance; 0: cores / instances."""

    instances: int = 1
    threads: int = 0
    queue_delay_us: int = 0
    max_batch: int = 64

    def __str__(self) -> str:
        """For tables."""
        threads = f"{self.threads} threads" if self.threads else "all its threads"
        return f"{self.instances} × {threads}, delay {self.queue_delay_us} µs, max batch {self.max_batch}"


@dataclass(frozen=True)
class Duel:
    """One comparison: throughput of challenger over champion within a round, and both latencies (p95, ms)."""

    champion: Settings
    challenger: Settings
    ratio: Spread
    champion_p95_ms: float
    challenger_p95_ms: float
    champion_faces_per_s: float
    challenger_faces_per_s: float
    disturbed: bool = False  # other processes used the CPU in nearly every round, so nobody wins

    def won(self, latency_limit_ms: float | None) -> bool:
        """Whether the challenger is better: faster in nearly every round, or the only one within the latency limit."""
        if self.disturbed or self.ratio.count < MIN_ROUNDS:
            return False
        if latency_limit_ms is not None:
            fits, fitted = self.challenger_p95_ms <= latency_limit_ms, self.champion_p95_ms <= latency_limit_ms
            if fits != fitted:
                return fits
            if not fits:
                return self.challenger_p95_ms < (1 - LEAST_GAIN) * self.champion_p95_ms
        return self.ratio.low > 1 and self.ratio.median >= 1 + LEAST_GAIN

    def to_json(self) -> dict[str, Any]:
        """A JSON object with the field names as keys."""
        return asdict(self)


def stages(cores: int, batch: int) -> Iterator[Callable[[Settings], list[Settings]]]:
    """The challengers of one stage: instances with threads, then the queue delay, then the largest batch."""
    counts = sorted({1, 2, cores} - {0})
    pairs = sorted({(n, max(1, cores // n)) for n in counts} | {(1, max(1, cores - 1)), (2, 1)})
    yield lambda best: [replace(best, instances=n, threads=t) for n, t in pairs]
    yield lambda best: [replace(best, queue_delay_us=delay) for delay in (0, 500, 2000)]
    yield lambda best: [replace(best, max_batch=size) for size in (16, 32) if batch <= size < best.max_batch]


def search(
    shipped: Settings,
    cores: int,
    batch: int,
    duel: Callable[[Settings, Settings], Duel],
    latency_limit_ms: float | None = None,
) -> tuple[Settings, list[Duel]]:
    """Compare challengers with the champion, stage by stage, then the champion with the shipped settings.

    Returns:
        The settings to use (the shipped ones if nothing beat them), and all duels.
    """
    champion, duels, met = shipped, [], {_same(shipped, cores)}
    for stage in stages(cores, batch):
        for challenger in stage(champion):
            if _same(challenger, cores) in met:
                continue
            met.add(_same(challenger, cores))
            duels.append(duel(champion, challenger))
            if duels[-1].won(latency_limit_ms):
                champion = challenger
    if champion != shipped:
        duels.append(duel(shipped, champion))
        if not duels[-1].won(latency_limit_ms):
            champion = shipped
    return champion, duels


def read_settings(config: str) -> Settings:
    """Settings that a config.pbtxt states."""
    parsed = _parse(config)
    return Settings(
        instances=sum(group.count or 1 for group in parsed.instance_group) or 1,
        threads=int(parsed.parameters["intra_op_thread_count"].string_value or 0)
        if "intra_op_thread_count" in parsed.parameters
        else 0,
        queue_delay_us=parsed.dynamic_batching.max_queue_delay_microseconds,
        max_batch=parsed.max_batch_size,
    )


def with_settings(config: str, settings: Settings, note: str = "") -> str:
    """A config.pbtxt with these settings, warm-up batches included; `note` becomes a comment on top."""
    from google.protobuf import text_format

    parsed = _parse(config)
    if not parsed.instance_group:
        parsed.instance_group.add(kind=0)
    for group in parsed.instance_group:
        group.count = settings.instances
    if settings.threads:
        parsed.parameters["intra_op_thread_count"].string_value = str(settings.threads)
    parsed.dynamic_batching.max_queue_delay_microseconds = settings.queue_delay_us
    return _with_max_batch(parsed, settings.max_batch, note, text_format)


def with_max_batch(config: str, max_batch: int, note: str = "") -> str:
    """An ensemble's config.pbtxt with the largest batch of the model inside it."""
    from google.protobuf import text_format

    return _with_max_batch(_parse(config), max_batch, note, text_format)


def small_repository(repository: Path, settings: Settings, folder: Path) -> Path:
    """A repository that holds only arcface_onnx with these settings; the weights are linked, not copied."""
    from arcface_build.repository.versions import served_folder

    version = served_folder(repository, LEAF)
    target = folder / LEAF
    target.mkdir(parents=True)
    (target / version.name).symlink_to(version)
    (target / "config.pbtxt").write_text(with_settings(base_config(repository), settings))
    return folder


def base_config(repository: Path) -> str:
    """The config served by default: the build's overlay if there is one."""
    overlay = repository / LEAF / "configs" / "onnx.pbtxt"
    return (overlay if overlay.is_file() else repository / LEAF / "config.pbtxt").read_text()


def write_tuned(repository: Path, settings: Settings, note: str) -> Sequence[Path]:
    """Write configs/tuned.pbtxt of arcface_onnx, and of the ensembles where the largest batch changed."""
    from arcface_clients.atomic import new_file

    shipped = read_settings(base_config(repository))
    texts = {LEAF: with_settings(base_config(repository), settings, note)}
    for name in ("arcface", "arcface_parity"):
        (repository / name / "configs" / "tuned.pbtxt").unlink(missing_ok=True)  # of an earlier tuning
        if settings.max_batch < shipped.max_batch:  # an ensemble may not accept more than the model inside it
            texts[name] = with_max_batch((repository / name / "config.pbtxt").read_text(), settings.max_batch, note)
    written = []
    for name, text in texts.items():
        path = repository / name / "configs" / "tuned.pbtxt"
        with new_file(path) as temporary:
            temporary.write_text(text)
        written.append(path)
    return written


def _with_max_batch(parsed: Any, max_batch: int, note: str, text_format: Any) -> str:
    parsed.max_batch_size = max_batch
    for warmup in parsed.model_warmup:
        warmup.batch_size = min(warmup.batch_size, max_batch)
    comment = "".join(f"# {line}\n" for line in note.splitlines())
    return comment + text_format.MessageToString(parsed)


def _parse(config: str) -> Any:
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    return text_format.Parse(config, model_config_pb2.ModelConfig())


def _same(settings: Settings, cores: int) -> Settings:
    """Settings with 0 threads resolved, so that equal ones are tried only once."""
    return replace(settings, threads=settings.threads or max(1, cores // settings.instances))
