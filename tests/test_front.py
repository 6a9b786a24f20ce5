"""Preprocessing inside a graph: understood in each form it is written, or asked about; never a wrong vector."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from arcface_build.errors import SourceRefused
from arcface_build.imports import front as measured
from arcface_build.imports.importing import import_model
from arcface_build.imports.preprocessing import Stated, decide_preprocessing
from arcface_build.imports.proof_faces import ProofFaces
from arcface_build.imports.source import known_models, resolve
from arcface_clients.contract import Preprocessing
from arcface_clients.errors import WrongUse
from arcface_clients.faces.synthetic import synthetic_faces
from fronts import FORMS, IMAGENET, Form, Front, diagonal, model_of
from tiny_nets import tiny_net

FACES = synthetic_faces(6)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def body() -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(tiny_net().SerializeToString(), providers=["CPUExecutionProvider"])


def intended(body: onnxruntime.InferenceSession, meant: Preprocessing) -> np.ndarray:
    """The embedding that the author of a form meant: numpy, then the body alone."""
    ordered = FACES[..., ::-1] if meant.color == "rgb" else FACES
    seen = ((ordered.astype(np.float64) - meant.mean) / meant.std).transpose(0, 3, 1, 2)
    return unit(body.run(None, {"input.1": seen.astype(np.float32)})[0])


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.what)
def test_each_form_gives_the_intended_embedding_or_the_question(
    form: Form, tmp_path: Path, body: onnxruntime.InferenceSession
) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(model_of(form), str(path))
    source = resolve(str(path), tmp_path, known=known_models())
    if form.asked:
        with pytest.raises(SourceRefused, match=r"^net\.onnx: cannot tell the preprocessing: .*--color") as caught:
            import_model(source, tmp_path / "models" / "net", ProofFaces(FACES, "synthetic"))
        assert form.asked in str(caught.value)
        return
    manifest = import_model(source, tmp_path / "models" / "net", ProofFaces(FACES, "synthetic"))
    serving = onnxruntime.InferenceSession(
        str(tmp_path / "models/net/serving.onnx"), providers=["CPUExecutionProvider"]
    )
    got = serving.run(None, {"face": FACES})[0]
    assert (got * intended(body, form.meant)).sum(axis=1).min() >= 0.99999
    network = manifest.preprocessing["network"]
    assert network["color"] == form.meant.color
    np.testing.assert_allclose(network["mean"], form.meant.mean, atol=0.1)
    np.testing.assert_allclose(network["std"], form.meant.std, atol=0.1)


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("border", [1, 3, -2])
def test_a_border_that_is_added_or_cut_does_not_hide_the_map(border: int, before: bool) -> None:
    written = Front()
    pads = written.ints(0, 0, border, border, 0, 0, border, 0)
    if before:
        written.one("Pad", pads)
    written.sub(127.5).div(127.5)
    if not before:
        written.one("Pad", pads)
    seen = measured.Front(written.model()).pixel_map()
    assert seen.channels == (0, 1, 2)
    np.testing.assert_allclose(seen.ends, [[-1] * 3, [1] * 3], atol=1e-4)


def test_two_branches_that_see_pixels_differently_are_asked_about() -> None:
    written = Front().sub(127.5).div(127.5)
    model = written.model()
    first = next(node for node in model.graph.node if node.op_type == "Conv")
    second = helper.make_node("Conv", ["pixels", first.input[1]], ["beside"], pads=[1] * 4, strides=[2, 2])
    users = [node for node in model.graph.node if first.output[0] in node.input]
    model.graph.node.insert(list(model.graph.node).index(first) + 1, second)
    both = helper.make_node("Add", [first.output[0], "beside"], ["both"])
    model.graph.node.insert(list(model.graph.node).index(first) + 2, both)
    for node in users:
        node.input[:] = ["both" if name == first.output[0] else name for name in node.input]
    with pytest.raises(SourceRefused, match="does not map each channel by itself"):
        decide_preprocessing(measured.Front(model), "net.onnx")


def test_the_documentation_lists_each_form_and_what_becomes_of_it() -> None:
    page = (Path(__file__).parent.parent / "docs" / "import.md").read_text()
    listed = dict(re.findall(r"^\| (.+?) \| (asks|(?:rgb|bgr), mean .+?) \|$", page, re.MULTILINE))
    assert {what: told == "asks" for what, told in listed.items()} == {form.what: bool(form.asked) for form in FORMS}


def folded(meant: Preprocessing, *, bias: bool, batch_norm: bool = True) -> onnx.ModelProto:
    """The body with its normalisation multiplied into the first convolution."""
    net = tiny_net()
    weights = {tensor.name: tensor for tensor in net.graph.initializer}
    first, behind = net.graph.node[0], net.graph.node[1]
    weight = numpy_helper.to_array(weights[first.input[1]]).astype(np.float64)
    own = np.random.default_rng(5).normal(0, 0.1, len(weight)) if bias else np.zeros(len(weight))
    if not batch_norm:  # folded, too: then the bias is the BatchNormalization's
        scale, beta, mean, variance = (numpy_helper.to_array(weights[name]) for name in behind.input[1:])
        slope = scale / np.sqrt(variance + 2e-5)
        weight, own = weight * slope[:, None, None, None], beta + (own - mean) * slope
        for node in net.graph.node:
            node.input[:] = [first.output[0] if name == behind.output[0] else name for name in node.input]
        net.graph.node.remove(behind)
    weight = weight / np.reshape(meant.std, (1, 3, 1, 1))
    own = own - (weight * np.reshape(meant.mean, (1, 3, 1, 1))).sum(axis=(1, 2, 3))
    weights[first.input[1]].CopyFrom(numpy_helper.from_array(weight.astype(np.float32), first.input[1]))
    net.graph.initializer.append(numpy_helper.from_array(own.astype(np.float32), "first_bias"))
    first.input.append("first_bias")
    return net


@pytest.mark.parametrize("meant", [Preprocessing(), IMAGENET], ids=["127.5", "ImageNet"])
@pytest.mark.parametrize(("bias", "batch_norm"), [(False, True), (True, True), (False, False)])
def test_normalisation_multiplied_into_the_first_convolution_is_asked_about(
    meant: Preprocessing, bias: bool, batch_norm: bool
) -> None:
    front = measured.Front(folded(meant, bias=bias, batch_norm=batch_norm))
    with pytest.raises(SourceRefused, match=r"the first convolution takes a grey level of \d+ away.*--mean 0 --std 1"):
        decide_preprocessing(front, "net.onnx")
    stated = Stated("rgb", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    assert decide_preprocessing(front, "net.onnx", stated).fed == Preprocessing("rgb", (0, 0, 0), (1, 1, 1))


def test_no_network_that_is_fed_normalised_pixels_looks_folded(assets: Path) -> None:
    plain = Preprocessing("rgb", (0, 0, 0), (1, 1, 1))
    for seed in range(50):
        assert measured.Front(tiny_net(seed=seed)).folded_mean is None
    for bias, batch_norm in ((True, True), (False, False)):
        assert measured.Front(folded(plain, bias=bias, batch_norm=batch_norm)).folded_mean is None
    for path in (assets / "models").glob("*.onnx"):
        assert measured.Front(onnx.load(str(path))).folded_mean is None


@pytest.mark.parametrize(
    ("written", "sees"),
    [
        (lambda: Front().sub(127.5), "-128.5..-126.5"),
        (lambda: Front().div(255), "-0.003922..0.003922"),
        (lambda: Front().div(127.5), "-0.007843..0.007843"),
        (lambda: Front().mul(2).sub(127.5), "-129.5..-125.5"),
    ],
)
def test_a_stated_preprocessing_that_the_graph_does_in_part_is_refused(written: Callable[[], Front], sees: str) -> None:
    stated = Stated("rgb", (127.5,) * 3, (127.5,) * 3)
    with pytest.raises(WrongUse, match=re.escape(f"the network would see pixels as {sees}")):
        decide_preprocessing(measured.Front(written().model()), "net.onnx", stated)


@pytest.mark.parametrize("mean_std", [(0, 1), (0, 255), (127.5, 1), (127.5, 255), (0, 128)])
def test_a_stated_preprocessing_that_some_network_wants_is_taken(mean_std: tuple[float, float]) -> None:
    mean, std = ((float(value),) * 3 for value in mean_std)
    assert decide_preprocessing(measured.Front(Front().model()), "net.onnx", Stated("rgb", mean, std)).fed.std == std


STEPS = (
    lambda front, rng: front.one("Identity"),
    lambda front, rng: front.cast(TensorProto.FLOAT),
    lambda front, rng: front.add(rng.normal(0, 60)),
    lambda front, rng: front.sub(rng.normal(0, 60, 3)),
    lambda front, rng: front.mul(float(rng.choice([-1, 1]) * 2.0 ** rng.integers(-8, 3))),
    lambda front, rng: front.div(rng.uniform(0.5, 200, 3)),
    lambda front, rng: front.one("Neg"),
    lambda front, rng: front.gather(order=tuple(int(i) for i in rng.permutation(3))),
    lambda front, rng: front.slice_backwards(),
    lambda front, rng: front.split_swap(),
    lambda front, rng: front.reshape(-1, 3, 112, 112),
    lambda front, rng: front.transpose(0, 2, 3, 1).transpose(0, 3, 1, 2),
    lambda front, rng: front.batch_norm(rng.normal(0, 80, 3), rng.uniform(0.2, 120, 3), scale=rng.uniform(0.5, 2)),
    lambda front, rng: front.conv(rng.normal(0, 0.1, (3, 1, 1, 1)), rng.normal(0, 1, 3), group=3),
    lambda front, rng: front.conv(diagonal(rng.uniform(0.004, 1)), rng.normal(0, 1, 3)),
    lambda front, rng: front.clip(*sorted(rng.normal(0, 200, 2))),
    lambda front, rng: front.cast(TensorProto.UINT8).cast(TensorProto.FLOAT),
)


def composed(seed: int) -> Iterator[Front]:
    """Ten random fronts."""
    rng = np.random.default_rng([seed, 7])
    for _ in range(10):
        written = Front()
        for _ in range(rng.integers(1, 6)):
            STEPS[rng.integers(len(STEPS))](written, rng)
        yield written


def run_front(written: Front, pixels: np.ndarray) -> np.ndarray:
    """What ONNX Runtime makes of pixels, without any code of the import."""
    value = helper.make_tensor_value_info
    ends = [value("pixels", TensorProto.FLOAT, ["N", 3, 112, 112])], [value(written.name, TensorProto.FLOAT, None)]
    graph = helper.make_graph(written.nodes, "front", *ends, written.weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"pixels": pixels})[0]


@pytest.mark.parametrize("seed", range(30))
def test_a_random_front_is_measured_as_it_is_or_found_to_be_no_map(seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (2, 3, 112, 112)).astype(np.float32)
    for written in composed(seed):
        front = measured.Front(written.model())
        seen, got = front.pixel_map(), run_front(written, pixels)
        if seen is None:  # only these two can bend a line
            assert {"Clip", "Cast"} & set(front.ops), front.ops
            continue
        expected = pixels[:, list(seen.channels)] * per_channel(seen.scale) + per_channel(seen.shift)
        span = np.abs(np.multiply(seen.scale, 255)).max()
        assert np.abs(got - expected).max() <= 2e-4 * max(np.abs(got).max(), span)


@pytest.mark.parametrize("seed", range(30))
def test_a_random_front_that_ends_normalised_feeds_the_network_what_was_meant_or_is_asked_about(seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (2, 3, 112, 112)).astype(np.float32)
    understood = 0
    for written in composed(seed):
        ends = run_front(written, np.stack([np.zeros_like(pixels[0]), np.full_like(pixels[0], 255)]))[..., 0, 0]
        if np.abs(ends[1] - ends[0]).min() < 1e-2:
            continue
        written.sub(ends.mean(axis=0)).div((ends[1] - ends[0]) / 2)  # 0..255 become −1..1, whatever stands before
        try:
            decision = decide_preprocessing(measured.Front(written.model()), "net.onnx")
        except SourceRefused as exc:
            assert "--color" in str(exc)
            continue
        understood += 1
        meant = Preprocessing(decision.network["color"]).apply(pixels.astype(np.uint8).transpose(0, 2, 3, 1))
        got = run_front(written, decision.fed.apply(pixels.astype(np.uint8).transpose(0, 2, 3, 1)))
        assert np.abs(got - meant).max() <= 2e-3
        assert decision.network["color"] == "rgb"
    assert understood


def per_channel(values: object) -> np.ndarray:
    return np.reshape(values, (3, 1, 1))
