"""Captures what is put on a CUDA stream as a graph, which is then launched in one call."""

import ctypes

_THREAD_LOCAL = 1  # cudaStreamCaptureModeThreadLocal


def capture(runtime, stream, run):
    """The graph of what `run` puts on the stream; it must be true that TensorRT accepted that.

    Raises:
        RuntimeError: TensorRT did not accept it.
        polygraphy's exception: CUDA refused the capture.
    """
    stream, graph, executable = ctypes.c_void_p(stream), ctypes.c_void_p(), ctypes.c_void_p()
    _call(runtime, "cudaStreamBeginCapture", stream, ctypes.c_int(_THREAD_LOCAL))
    try:
        ran = run()
    finally:  # the stream is unusable while it captures
        status = runtime.handle.cudaStreamEndCapture(stream, ctypes.byref(graph))
    runtime.check(status)
    if not ran:
        raise RuntimeError("TensorRT refused a run during the capture")
    # Its plain form has other arguments in CUDA 11 than in 12; this one is the same since 11.4.
    _call(runtime, "cudaGraphInstantiateWithFlags", ctypes.byref(executable), graph, ctypes.c_ulonglong(0))
    _call(runtime, "cudaGraphDestroy", graph)
    return executable


def launch(runtime, stream, graph):
    """Run a graph on the stream."""
    _call(runtime, "cudaGraphLaunch", graph, ctypes.c_void_p(stream))


def destroy(runtime, graphs):
    """Free graphs that were captured."""
    for graph in graphs:
        _call(runtime, "cudaGraphExecDestroy", graph)


def _call(runtime, name, *arguments):
    runtime.check(getattr(runtime.handle, name)(*arguments))
