"""Measures what a file does to its pixels before the network, by running its first nodes instead of guessing.

The front of a graph ends where its pixels meet the first weights that are no preprocessing: a convolution or matrix
product that gives more than three channels. Whatever stands before it (Sub, Clip, Cast, Gather, a BatchNormalization, a
depthwise Conv, …) is cut out, run on noise in 0..255, and compared with an affine map per channel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from arcface_build.graph.cut_out import ancestors, cut_out
from arcface_build.graph.index import GraphIndex
from arcface_clients.arrays import Array
from arcface_clients.contract import FACE_SIZE, Preprocessing
from arcface_clients.engines.runtimes import open_session

if TYPE_CHECKING:
    import onnx

RAW = Preprocessing("bgr", (0, 0, 0), (1, 1, 1))  # pixels as they are; no channel moves
LARGEST_BORDER = 16  # pixels that a Pad or crop in front may add or take, both sides together
FLOAT32_ERROR, FLOAT16_ERROR = 1e-4, 4e-3  # of the map's own span: what rounding may do
FEWEST_FILTERS, MOST_LEFT = 8, 0.5  # to believe in a folded mean: filters, and the part of the biases it leaves
FOLDED = (40, 220)  # grey levels that a mean of pictures can have
CONVOLUTIONS = ("Conv", "FusedConv", "NhwcFusedConv", "ConvTranspose", "ConvInteger", "QLinearConv")
PRODUCTS = ("MatMul", "Gemm", "MatMulInteger", "QLinearMatMul", "FusedMatMul")


@dataclass(frozen=True)
class PixelMap:
    """What the network sees of a pixel x in 0..255: its channel c is scale[c]·x[channels[c]] + shift[c]."""

    channels: tuple[int, int, int]
    scale: tuple[float, float, float]
    shift: tuple[float, float, float]

    @property
    def ends(self) -> Array:
        """(2,3): the values of 0 and 255 in each channel."""
        return np.array([self.shift, np.add(self.shift, np.multiply(self.scale, 255))])

    @property
    def mean(self) -> tuple[float, float, float]:
        """The pixel value that maps to 0, in the network's channel order."""
        return _three(-np.divide(self.shift, self.scale))

    @property
    def std(self) -> tuple[float, float, float]:
        """The change in pixel value that maps to a change of 1, in the network's channel order."""
        return _three(1 / np.array(self.scale))

    def is_close(self, other: PixelMap) -> bool:
        """Whether both maps are equal up to rounding."""
        return self.channels == other.channels and np.allclose(self.ends, other.ends, rtol=1e-3, atol=1e-3)

    def told(self, color: str) -> dict[str, Any]:
        """The manifest's entry (color, mean, std), if the input's channels are in the order `color`."""
        order = "".join(color[channel] for channel in self.channels)
        mean, std = ([round(value, 4) + 0.0 for value in values] for values in (self.mean, self.std))
        return {"color": order, "mean": mean, "std": std}


class Front:
    """The nodes between a graph's image input and its network, ready to run on pixels.

    `ops` names them in their order. `folded_mean` is the grey level of pixels that the network itself takes away where
    normalisation was multiplied into its first convolution, else None.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        """Find the nodes and extract them; the model itself is not changed."""
        import onnx

        index = GraphIndex(model.graph)
        self._face = index.inputs()[0]
        self.borders = _borders(index, self._face.name)
        nodes = ancestors(index, self.borders)
        self.ops = [node.op_type for node in nodes if node.op_type != "Constant"]
        self._cut = cut_out(model, index, self.borders)
        self.folded_mean = next(filter(None, (_folded_mean(index, border) for border in self.borders)), None)
        self._session: Any = None
        kinds = {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}
        casts = {item.i for node in nodes for item in node.attribute if node.op_type == "Cast" and item.name == "to"}
        self._error = FLOAT16_ERROR if kinds & (casts | {self._face.type.tensor_type.elem_type}) else FLOAT32_ERROR

    def pixel_map(self, fed: Preprocessing = RAW) -> PixelMap | None:
        """What the network sees of pixels fed as (x − mean) / std of `fed`; None if that is not affine per channel.

        The channels of `fed` are the input's, by position; its color is ignored.
        """
        if not self.borders:
            return None
        pixels = _pixels()
        blob = (pixels - np.reshape(fed.mean, (1, 3, 1, 1))) / np.reshape(fed.std, (1, 3, 1, 1))
        try:
            seen = self._run(blob)
        except Exception:  # ONNX Runtime's exceptions share no base class; a front that cannot run is not understood
            return None
        maps = [_affine(pixels, row, self._error) for border in seen for row in _rows(border, len(pixels))]
        return maps[0] if all(found and maps[0] and found.is_close(maps[0]) for found in maps) else None

    def _run(self, blob: Array) -> list[Array]:
        """Each border tensor for float64 (K,3,112,112), face by face (a fixed batch is filled with copies).

        (K·R,…) where the front makes R rows of a face, such as its mirror image: each has to be understood.
        """
        import onnx

        if not self.ops:
            return [blob]
        self._session = self._session or open_session(self._cut)
        tensor = self._face.type.tensor_type
        dims = [dim.dim_value for dim in tensor.shape.dim]
        blob = blob.astype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
        if dims[3] == 3 and dims[1] != 3:
            blob = blob.transpose(0, 2, 3, 1)
        batch = max(1, dims[0])
        seen = [self._session.run(None, {self._face.name: np.repeat(face[None], batch, axis=0)}) for face in blob]
        return [np.concatenate([faces[i] for faces in seen]) for i in range(len(self.borders))]


def _borders(index: GraphIndex, face: str) -> list[str]:
    """The tensors where pixels meet the network, in the order found."""
    found, seen, todo = [], {face}, [face]
    while todo:
        name = todo.pop()
        for node in index.users.get(name, []):
            if node.op_type in ("Shape", "Size"):  # reads no pixels
                continue
            if _is_network(index, node):
                if name not in found:
                    found.append(name)
                continue
            new = [output for output in node.output if output and output not in seen]
            seen.update(new)
            todo.extend(new)
    return found


def _is_network(index: GraphIndex, node: onnx.NodeProto) -> bool:
    """Whether the node's weights are the network's: preprocessing gives three channels, or one (grey)."""
    if node.op_type not in (*CONVOLUTIONS, *PRODUCTS):
        return False
    for name in node.input:
        dims = _dims(index, name)
        if node.op_type in CONVOLUTIONS and len(dims) == 4:
            return dims[0] > 3
        if node.op_type in PRODUCTS and len(dims) >= 2:
            return max(dims[-2:]) > 3
    return True


def _dims(index: GraphIndex, name: str) -> list[int]:
    """The shape of a constant; [] for anything else."""
    if name in index.initializers:
        return list(index.initializers[name].dims)
    value = index.constant(name) if name else None
    return [] if value is None else list(value.shape)


def _folded_mean(index: GraphIndex, border: str) -> float | None:
    """The grey level m that the first convolution subtracts: W·(x − m) is W·x + b with b = −m·ΣW.

    Its bias (less the mean that a BatchNormalization behind it takes away) is fitted by −m·ΣW, one number for all
    channels. Networks that are fed −1..1 have sums as large as their biases, so m is about 1; only a file for whole
    pixels has sums that are a hundred times smaller than its biases, and of their direction.
    """
    for node in index.users.get(border, []):
        weight = index.constant(node.input[1]) if node.op_type == "Conv" and node.input[0] == border else None
        if weight is None or weight.ndim != 4 or len(weight) < FEWEST_FILTERS:
            continue
        sums = weight.astype(np.float64).sum(axis=(1, 2, 3))
        shift: Array = np.zeros(len(sums))
        behind = index.only_user(node.output[0])
        for sign, maker, position in ((1, node, 2), (-1, behind, 3)):
            if maker is None or len(maker.input) <= position or (maker is behind and not _is_batch_norm(maker)):
                continue
            value = index.constant(maker.input[position])
            shift = shift + sign * (0 if value is None else value.astype(np.float64))
        if not (shift.any() and sums.any()):
            continue
        mean = -float(shift @ sums / (sums @ sums))
        left = np.square(shift + mean * sums).sum() / np.square(shift).sum()
        if left <= MOST_LEFT and FOLDED[0] <= mean <= FOLDED[1]:
            return mean
    return None


def _is_batch_norm(node: onnx.NodeProto) -> bool:
    return node.op_type == "BatchNormalization"


def _pixels() -> Array:
    """(4,3,112,112) float64, whole numbers in 0..255: full-range noise, dark, light, and one colour per channel.

    Their statistics differ, so that a front which normalises by the image's own mean or range is noticed.
    """
    rng = np.random.default_rng(112)
    ranges = [[(0, 256)] * 3, [(0, 90)] * 3, [(150, 256)] * 3, [(0, 60), (90, 170), (190, 256)]]
    shape = (FACE_SIZE, FACE_SIZE)
    return np.array([[rng.integers(low, high, shape) for low, high in each] for each in ranges], np.float64)


def _rows(seen: Array, faces: int) -> list[Array]:
    """`seen` (K·R,…) as R arrays (K,…): the first row made of each face, the second, and so on."""
    made = max(1, len(seen) // faces)
    return [seen[row::made] for row in range(made)]


def _affine(pixels: Array, seen: Array, error: float) -> PixelMap | None:
    """The map of `pixels` (K,3,112,112) to `seen` (K,3,h,w) or (K,h,w,3); None: there is none."""
    if seen.ndim != 4 or len(seen) != len(pixels) or 3 not in (seen.shape[1], seen.shape[3]):
        return None
    seen = seen.astype(np.float64)
    if seen.shape[1] != 3:
        seen = seen.transpose(0, 3, 1, 2)
    for given, window in _windows(pixels, seen):
        fits = [_channel(given, window[:, c], error) for c in range(3)]
        if all(fits):
            return PixelMap(*(tuple(values) for values in zip(*(fit for fit in fits if fit), strict=True)))
    return None


def _windows(pixels: Array, seen: Array) -> Iterator[tuple[Array, Array]]:
    """Possible offsets between the image and what the network sees, since the front may Pad or crop."""
    grown = [seen.shape[2] - FACE_SIZE, seen.shape[3] - FACE_SIZE]
    if max(map(abs, grown)) > LARGEST_BORDER or min(grown) * max(grown) < 0:
        return
    height, width = (min(FACE_SIZE, size) for size in seen.shape[2:])
    for top in range(abs(grown[0]) + 1):
        for left in range(abs(grown[1]) + 1):
            part = (..., slice(top, top + height), slice(left, left + width))
            yield (pixels, seen[part]) if min(grown) >= 0 else (pixels[part], seen)


def _channel(pixels: Array, seen: Array, error: float) -> tuple[int, float, float] | None:
    """(channel, scale, shift) of the channel of `pixels` (K,3,h,w) that `seen` (K,h,w) is an affine map of."""
    y = seen.reshape(-1)
    if not np.isfinite(y).all():
        return None
    for channel in range(3):
        x = pixels[:, channel].reshape(-1)
        scale = float(np.cov(x, y)[0, 1] / x.var(ddof=1))
        shift = float(y.mean() - scale * x.mean())
        if scale and np.abs(scale * x + shift - y).max() <= error * max(abs(scale) * 255, abs(shift)):
            return channel, scale, shift if abs(shift) > FLOAT32_ERROR * abs(scale) else 0.0
    return None


def _three(values: Array) -> tuple[float, float, float]:
    return float(values[0]), float(values[1]), float(values[2])
