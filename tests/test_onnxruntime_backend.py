"""backends/onnxruntime behind a real tritonserver: what it reads from config.pbtxt, and that requests stay apart."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
import tritonclient.grpc as triton
from onnx import TensorProto, helper

from arcface_build.errors import ServerFailed
from arcface_clients.triton.address import Address, Connection
from arcface_clients.triton.admin_key import admin_headers


def lookup_model() -> onnx.ModelProto:
    """index int64 [N,1] → row float32 [N,3] of a table of four rows: an index outside fails the whole run."""
    table = helper.make_tensor("table", TensorProto.FLOAT, [4, 3], np.arange(12, dtype=np.float32))
    nodes = [
        helper.make_node("Gather", ["table", "index"], ["rows"], axis=0),
        helper.make_node("Squeeze", ["rows", "one"], ["row"]),
    ]
    one = helper.make_tensor("one", TensorProto.INT64, [1], [1])
    graph = helper.make_graph(
        nodes,
        "lookup",
        [helper.make_tensor_value_info("index", TensorProto.INT64, ["N", 1])],
        [helper.make_tensor_value_info("row", TensorProto.FLOAT, ["N", 3])],
        [table, one],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture
def lookup(tmp_path: Path) -> Path:
    """A repository with the model `lookup`, which waits 100 ms to batch what arrives together."""
    folder = tmp_path / "repository" / "lookup"
    (folder / "1").mkdir(parents=True)
    onnx.save(lookup_model(), folder / "1" / "lookup.onnx")
    (folder / "config.pbtxt").write_text(
        'name: "lookup"\nbackend: "onnxruntime"\ndefault_model_filename: "lookup.onnx"\nmax_batch_size: 8\n'
        "dynamic_batching { max_queue_delay_microseconds: 100000 }\n"
        'parameters { key: "intra_op_thread_count" value: { string_value: "1" } }\n'
    )
    return folder.parent


def ask(client: triton.InferenceServerClient, index: list[int]) -> np.ndarray:
    tensor = triton.InferInput("index", [len(index), 1], "INT64")
    tensor.set_data_from_numpy(np.array(index, np.int64)[:, None])
    return client.infer("lookup", [tensor]).as_numpy("row")


def test_one_bad_request_does_not_fail_its_neighbours(lookup, start_triton):
    server = start_triton(lookup, ["lookup"])
    with triton.InferenceServerClient(server.grpc_url) as client, ThreadPoolExecutor(3) as pool:
        asked = [[1], [9], [2, 3]]
        answers = [pool.submit(ask, client, index) for index in asked]
        assert answers[0].result().tolist() == [[3, 4, 5]]
        assert answers[2].result().tolist() == [[6, 7, 8], [9, 10, 11]]
        with pytest.raises(triton.InferenceServerException, match=r"onnxruntime: .*out of data bounds"):
            answers[1].result()
        statistics = client.get_inference_statistics("lookup").model_stats[0]
        assert statistics.execution_count < statistics.inference_count, (
            "they were never in one batch: nothing was tested"
        )


def test_inputs_outputs_and_threads_come_from_the_file_and_the_config(lookup, start_triton):
    server = start_triton(lookup, ["lookup"])
    with triton.InferenceServerClient(server.grpc_url) as client:
        config = client.get_model_config("lookup").config
    assert [(i.name, list(i.dims)) for i in config.input] == [("index", [1])]
    assert [(o.name, list(o.dims)) for o in config.output] == [("row", [3])]
    assert config.platform == "onnxruntime_onnx"
    assert ": 1/lookup.onnx on CPUExecutionProvider, 1 threads" in server.log_path.read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda f: (f / "1" / "lookup.onnx").unlink(),
            r"lookup: .*no weights at .*1/lookup\.onnx\. Install some: arcface",
        ),
        (
            lambda f: (f / "1" / "lookup.onnx").write_bytes(b"no"),
            r"lookup: ONNX Runtime [\d.]+ cannot load .*lookup\.onnx",
        ),
        (
            lambda f: append(
                f, 'optimization { execution_accelerators { cpu_execution_accelerator [ { name: "tensorrt" } ] } }'
            ),
            r"lookup: no accelerator 'tensorrt' in this ONNX Runtime \(it has .*\)\. Install the wheel",
        ),
    ],
    ids=["no-weights", "not-onnx", "absent-accelerator"],
)
def test_a_model_that_cannot_load_says_why_in_one_sentence(lookup, start_triton, change, message):
    change(lookup / "lookup")
    with pytest.raises(ServerFailed, match=message):
        start_triton(lookup, ["lookup"])


INDEX = 'input [ { name: "index" data_type: TYPE_INT64 dims: [ 1 ] } ]\n'
ROW = 'output [ { name: "row" data_type: TYPE_FP32 dims: [ 3 ] } ]\n'
# What config.pbtxt adds to `lookup` → None where the native backend loads it, else why it does not. The rules are those
# of its sources (release 24.10: CompareDimsSupported, ValidateInputs, ValidateOutputs, AutoCompleteMaxBatch).
CONFIGS = {
    "complete": (INDEX + ROW, None),
    "inputs-left-out": (ROW, None),
    "outputs-left-out": (INDEX, None),
    "another-input": (INDEX.replace("index", "face"), "no input 'face': expected one of index"),
    "another-output": (ROW.replace("row", "embedding"), "no output 'embedding': expected one of row"),
    "one-input-more": (INDEX + INDEX.replace("index", "more"), r"states 2 inputs, .*lookup\.onnx has 1 \(index\)"),
    "dtype-of-an-input": (INDEX.replace("INT64", "INT32"), "input 'index' is TYPE_INT64 in .* says TYPE_INT32"),
    "dtype-of-an-output": (ROW.replace("FP32", "FP16"), "output 'row' is TYPE_FP32 in .* says TYPE_FP16"),
    "width-of-an-input": (INDEX.replace("[ 1 ]", "[ 2 ]"), r"input 'index' has shape \[-1, 1\] .* says \[-1, 2\]"),
    "open-input": (INDEX.replace("[ 1 ]", "[ -1 ]"), r"input 'index' has shape \[-1, 1\] .* says \[-1, -1\]"),
    "width-of-an-output": (ROW.replace("[ 3 ]", "[ 4 ]"), r"output 'row' has shape \[-1, 3\] .* says \[-1, 4\]"),
    "open-output": (ROW.replace("[ 3 ]", "[ -1 ]"), r"output 'row' has shape \[-1, 3\] .* says \[-1, -1\]"),
    "rank-of-an-output": (ROW.replace("[ 3 ]", "[ 3, 1 ]"), r"output 'row' has shape \[-1, 3\] .* says \[-1, 3, 1\]"),
    "execution-mode-2": (
        'parameters { key: "execution_mode" value: { string_value: "2" } }',
        "execution_mode is '2': expected 0",
    ),
    "execution-mode-1": ('parameters { key: "execution_mode" value: { string_value: "1" } }', None),
    "graph-level-2": ("optimization { graph { level: 2 } }", None),
}
UNBATCHED_INDEX, UNBATCHED_ROW = INDEX.replace("[ 1 ]", "[ -1, 1 ]"), ROW.replace("[ 3 ]", "[ -1, 3 ]")
UNBATCHED = {
    "complete": (UNBATCHED_INDEX + UNBATCHED_ROW, None),
    "open-input": (UNBATCHED_INDEX.replace("-1", "2") + UNBATCHED_ROW, None),  # the file leaves it open
    "closed-output": (
        UNBATCHED_INDEX + UNBATCHED_ROW.replace("-1", "2"),
        r"output 'row' has shape \[-1, 3\] .* says \[2, 3\]",
    ),
    # Half a config is completed, and completing it makes the model a batched one.
    "batch-in-the-dims": (
        UNBATCHED_ROW,
        r"output 'row' has shape \[-1, 3\] .* says \[-1, -1, 3\], the first for max",
    ),
    "nothing": ("", None),
}


def test_a_config_loads_exactly_where_the_native_backend_loads_it(lookup, start_triton):
    expected = {}
    for batch, configs in ((8, CONFIGS), (0, UNBATCHED)):
        for name, (text, why_not) in configs.items():
            model = f"{name}-{batch}"
            expected[model] = why_not
            folder = lookup / model
            shutil.copytree(lookup / "lookup" / "1", folder / "1")
            (folder / "config.pbtxt").write_text(
                f'name: "{model}"\nbackend: "onnxruntime"\ndefault_model_filename: "lookup.onnx"\n'
                f'max_batch_size: {batch}\nparameters {{ key: "intra_op_thread_count" '
                f'value: {{ string_value: "1" }} }}\n{text}'
            )
    server = start_triton(lookup, ["lookup"])
    key = admin_headers(Connection(Address.parse(server.grpc_url)))
    with triton.InferenceServerClient(server.grpc_url) as client:
        for model, why_not in expected.items():
            if why_not is None:
                client.load_model(model, headers=key)
                assert client.is_model_ready(model), model
            else:
                with pytest.raises(triton.InferenceServerException, match=why_not):
                    client.load_model(model, headers=key)
        completed = client.get_model_config("nothing-0").config
    assert completed.max_batch_size == 4 and completed.HasField("dynamic_batching")
    assert [list(tensor.dims) for tensor in (*completed.input, *completed.output)] == [[1], [3]]


def append(folder: Path, text: str) -> None:
    with (folder / "config.pbtxt").open("a") as file:
        file.write(text)


def test_openvino_is_used_when_the_config_names_it(lookup, start_triton):
    import onnxruntime

    if "OpenVINOExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has no OpenVINO (onnxruntime-openvino has it)")
    append(
        lookup / "lookup",
        'optimization { execution_accelerators { cpu_execution_accelerator [ { name: "openvino" '
        'parameters { key: "precision" value: "bf16" } } ] } }',
    )
    server = start_triton(lookup, ["lookup"])
    with triton.InferenceServerClient(server.grpc_url) as client:
        assert ask(client, [0, 3]).tolist() == [[0, 1, 2], [9, 10, 11]]
    assert "on OpenVINOExecutionProvider" in server.log_path.read_text()
