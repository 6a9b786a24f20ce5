"""What was tried for int8: each rewriting does what its line in docs/variants.md says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from arcface_build.variants.calibrate import conv_inputs
from arcface_build.variants.int8 import Range, quantizable_layers, quantize_convolutions
from arcface_build.variants.make import load_named
from arcface_clients.arrays import FaceArray, FloatArray
from arcface_clients.engines.runtimes import open_session
from arcface_clients.evidence.drift import compare_embeddings
from arcface_clients.faces.synthetic import synthetic_faces
from arcface_tools.int8_ways import (
    _mean_errors,
    bias_corrected,
    calibrated,
    convolutions_alone,
    equalized,
    sums_in_int8,
)


@pytest.fixture(scope="module")
def serving(demo_repository: Path) -> onnx.ModelProto:
    (path,) = (demo_repository.parent / "models").glob("*/serving.onnx")
    return load_named(path)


@pytest.fixture(scope="module")
def faces() -> FaceArray:
    return synthetic_faces(8)


@pytest.fixture(scope="module")
def ranges(serving: onnx.ModelProto, faces: FaceArray) -> dict[str, Range]:
    return calibrated(serving, conv_inputs(serving), faces)


@pytest.fixture(scope="module")
def quantized(serving: onnx.ModelProto, ranges: dict[str, Range]) -> onnx.ModelProto:
    return quantize_convolutions(serving, ranges, "cpu", quantizable_layers(serving)[:1])


def embed(model: onnx.ModelProto, faces: FaceArray) -> FloatArray:
    return open_session(model).run(["embedding"], {"face": faces})[0]


def test_equalizing_channels_does_not_change_the_function(serving, faces):
    even, tensors = equalized(serving, faces)
    assert tensors > 10
    assert compare_embeddings(embed(serving, faces), embed(even, faces)).max_drift < 1e-5


def test_correcting_biases_leaves_no_mean_error_in_any_convolution(serving, quantized, faces):
    before = _mean_errors(quantized, serving, faces)
    after = _mean_errors(bias_corrected(quantized, serving, faces), serving, faces)
    assert set(before) == set(quantizable_layers(serving)[1:])
    assert max(np.abs(error).max() for error in after.values()) < 1e-3 * max(
        np.abs(error).max() for error in before.values()
    )


def test_sums_in_int8_are_rounded_for_every_reader(serving, quantized, faces):
    rounded = sums_in_int8(quantized, serving, faces)
    sums = {n.output[0] for n in serving.graph.node if n.op_type == "Add"}
    readers = {n.op_type for n in rounded.graph.node if sums.intersection(n.input)}
    assert sums and readers == {"QuantizeLinear"}
    exact = embed(serving, faces)
    assert (
        compare_embeddings(exact, embed(rounded, faces)).max_drift
        > compare_embeddings(exact, embed(quantized, faces)).max_drift
    )


def test_convolutions_alone_have_nothing_in_float_between_them(serving, faces):
    bare = convolutions_alone(serving)
    assert not {"PRelu", "BatchNormalization", "Add"}.intersection(n.op_type for n in bare.graph.node)
    assert embed(bare, faces).shape == embed(serving, faces).shape
