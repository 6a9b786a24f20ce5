"""What this GPU reaches at best, for any Python that has torch: square matrix products, and copies.

    python torch_peak.py SIZE SECONDS WARM_UP_S

Imports only torch. Prints one JSON object per line: the versions, then one for each figure with `between`, the times of
time.monotonic at its beginning and end. A network's share of the matrix product's peak is compared with this, not with
a data sheet.
"""

import itertools
import json
import sys
import time

import torch

COPY_BYTES = 1 << 30


def main(size, seconds, warm_up_s):
    """Print the figures; one that fails prints its error."""
    device = torch.cuda.get_device_properties(0)
    _tell(torch=torch.__version__, cuda=torch.version.cuda, device=device.name, sms=device.multi_processor_count)
    for kind, dtype in (("fp16", torch.float16), ("tf32", torch.float32), ("fp32", torch.float32)):
        _measure("gemm", kind, lambda kind=kind, dtype=dtype: _gemm(kind, dtype, size, seconds, warm_up_s))
    for kind in ("within the GPU", "to the GPU", "to the host"):
        _measure("copy", kind, lambda kind=kind: _copy(kind, size, seconds, warm_up_s))


def _tell(**facts):
    print(json.dumps(facts), flush=True)


def _measure(what, kind, figure):
    started = time.monotonic()
    try:
        facts = figure()
    except Exception as exc:  # the other figures are still worth having
        facts = {"error": f"{type(exc).__name__}: {exc}"[:400]}
    _tell(what=what, kind=kind, between=[started, time.monotonic()], **facts)


def _gemm(kind, dtype, size, seconds, warm_up_s):
    """TFLOP/s of a square product of random matrices; zeros would draw less power and clock higher."""
    torch.backends.cuda.matmul.allow_tf32 = kind == "tf32"
    a, b = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
    ms = _median_ms(lambda: torch.mm(a, b), seconds, warm_up_s)
    return {"size": size, "ms": ms, "tflops": 2 * size**3 / ms / 1e9}


def _copy(kind, size, seconds, warm_up_s):
    """GB/s (10⁹ bytes); within the GPU each byte counts twice, because it is read and written."""
    count = min(COPY_BYTES, 16 * size * size)
    there = torch.empty(count, device="cuda", dtype=torch.uint8)
    if kind == "within the GPU":
        other = torch.empty_like(there)
        ms = _median_ms(lambda: other.copy_(there), seconds, warm_up_s)
        return {"bytes": count, "ms": ms, "gb_per_s": 2 * count / ms / 1e6}
    here = torch.empty(count, dtype=torch.uint8, pin_memory=True)
    source, target = (here, there) if kind == "to the GPU" else (there, here)
    ms = _median_ms(lambda: target.copy_(source, non_blocking=True), seconds, warm_up_s)
    return {"bytes": count, "ms": ms, "gb_per_s": count / ms / 1e6}


def _median_ms(run, seconds, warm_up_s):
    """Median milliseconds between CUDA events, at least 10 runs after the warm-up."""
    end = time.monotonic() + warm_up_s
    run()
    while time.monotonic() < end:
        run()
        torch.cuda.synchronize()
    marks, end = [_mark()], time.monotonic() + seconds
    while len(marks) <= 10 or (time.monotonic() < end and len(marks) < 2000):
        run()
        marks.append(_mark())
        if len(marks) % 10 == 0:
            torch.cuda.synchronize()  # else the loop would queue far more than `seconds`
    torch.cuda.synchronize()
    between = sorted(first.elapsed_time(second) for first, second in itertools.pairwise(marks))
    return between[len(between) // 2]


def _mark():
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]))
