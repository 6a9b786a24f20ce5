"""backends/onnxruntime behind a real tritonserver: what it reads from config.pbtxt, and that requests stay apart."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
import tritonclient.grpc as triton
from onnx import TensorProto, helper

from arcface_build.errors import ServerFailed


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
            r"lookup: .*no weights at .*1/lookup\.onnx\. Put some there: arcface",
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
