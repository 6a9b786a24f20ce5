"""Rewrites 3×3 convolutions by Winograd's method, as batched matrix products that every ONNX runtime has.

An m×m tile of the output is computed from (m+2)×(m+2) inputs and as many products, where the direct method takes 9·m²
(Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2015; matrices by the Cook-Toom method):
    y = A[(G g Gᵀ) ∘ (B d Bᵀ)]Aᵀ      g: 3×3 kernel, d: (m+2)×(m+2) input
All tiles, faces and channels go through one product a position, and feature maps stay *rows* between two such
convolutions: [rows, faces, channels], the pixels of a tile ordered so that the next convolution reads whole rows. The
last rows are always 0: what it reads beyond the border. Sums and PRelu work on rows too and leave 0 what is 0;
BatchNormalization goes into the kernels and into a bias that is another one at the borders.

The file keeps the 3×3 kernels, one row a position; a runtime makes (m+2)² of 9 values when it loads. So a session needs
4 to 5.4 times the memory for the weights of these layers. Results differ from the direct method by rounding.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from arcface_build.graph import Step
from arcface_build.graph.fold_batchnorm import affine_of, bias_of
from arcface_build.graph.index import GraphIndex, attribute, drop_unused, shapes

if TYPE_CHECKING:
    import onnx

POINTS = {4: (0, 1, -1, 2, -2), 5: (0, 1, -1, 2, -2, 0.5)}  # by m: where the polynomials are evaluated, beside infinity
FEWEST_CHANNELS = 128  # with 64 the transforms cost what the products save (docs/variants.md)


def winograd(model: onnx.ModelProto, fewest_channels: int = FEWEST_CHANNELS) -> Step:
    """Rewrite, in place, 3×3 convolutions of stride 1 over square feature maps with that many channels in and out."""
    rewrite = _Rewrite(model, fewest_channels)
    count, of = rewrite.run()
    if not count:
        return Step("winograd", model, False, f"none of {of} Conv is 3×3 with {fewest_channels} channels or more")
    return Step("winograd", model, True, f"{count} of {of} Conv by Winograd's method")


def tile_of(size: int) -> int:
    """The side m of output tiles, for a feature map of size × size, that takes the fewest products."""
    return min(POINTS, key=lambda m: (tiles_across(size, m) * (m + 2), m))


def tiles_across(size: int, tile: int) -> int:
    """Tiles in a row of the map; the last one may reach beyond it."""
    return -(-size // tile)


@cache
def transforms(tile: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A⊗A, G⊗G and B⊗B, float64: matrices that work on whole tiles, flattened row by row.

    With the points p and f(i) = Π(p(i) − p(j)) over j ≠ i: A[k,i] = p(i)^k; G[i,k] = p(i)^k / f(i); row i of B holds
    the coefficients of Π(x − p(j)), j ≠ i. The last column of A and rows of G and B are those of infinity.
    """
    points = np.array(POINTS[tile], np.float64)
    size = tile + 2
    a, g, b = np.zeros((tile, size)), np.zeros((size, 3)), np.zeros((size, size))
    for i, point in enumerate(points):
        others = np.delete(points, i)
        a[:, i] = point ** np.arange(tile)
        g[i] = point ** np.arange(3) / np.prod(point - others)
        b[i, :-1] = np.polynomial.polynomial.polyfromroots(others)
    a[-1, -1] = g[-1, -1] = 1
    b[-1] = np.polynomial.polynomial.polyfromroots(points)
    return np.kron(a, a), np.kron(g, g), np.kron(b, b)


def bias_by_border(weight: np.ndarray, bias: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """What a padded 3×3 convolution adds to W·x if it reads x + shift: float64 [9, out], for `border_of_row`.

    Beyond the border it reads 0, not the shift, so fewer of its weights meet the shift there.
    """
    within = (slice(1, 3), slice(0, 3), slice(0, 2))
    met = [weight[:, :, v, h].astype(np.float64).sum(axis=(2, 3)) @ shift for v in within for h in within]
    return bias + np.stack(met)


class _Layout:
    """Where the pixels of a size × size map are among its rows: row (i·m + j)·t² + p·t + q is pixel (m·p + i, m·q + j).

    t tiles across; rows of pixels beyond the map exist and mean nothing. The t² rows after all these are 0.
    """

    def __init__(self, size: int) -> None:
        self.size, self.tile = size, tile_of(size)
        self.across = tiles_across(size, self.tile)
        self.zeros = (self.tile * self.across) ** 2  # the first of them
        self.rows = self.zeros + self.across**2

    def row_of_pixel(self) -> np.ndarray:
        """[size, size]"""
        y, x = np.mgrid[: self.size, : self.size]
        m, t = self.tile, self.across
        return ((y % m) * m + x % m) * t * t + (y // m) * t + x // m

    def pixel_of_row(self) -> np.ndarray:
        """[rows]; size² where there is none."""
        pixels = np.full(self.rows, self.size**2, np.int64)
        pixels[self.row_of_pixel().reshape(-1)] = np.arange(self.size**2)
        return pixels

    def border_of_row(self) -> np.ndarray:
        """[rows]: 3·v + h for a pixel in the first (0), an inner (1) or the last (2) line v and column h; 9 beyond."""
        part = np.ones(self.size, np.int64)
        part[0], part[-1] = 0, 2
        borders = np.full(self.rows, 9, np.int64)
        borders[self.row_of_pixel().reshape(-1)] = (3 * part[:, None] + part).reshape(-1)
        return borders

    def rows_of_tiles(self) -> np.ndarray:
        """[(m+2)² · t²]: for each position of an input tile its row in each tile; a row of 0 beyond the border."""
        m, t, size = self.tile, self.across, self.size
        padded = np.full((m * t + 2, m * t + 2), self.zeros, np.int64)
        padded[1 : size + 1, 1 : size + 1] = self.row_of_pixel()
        start = m * np.arange(t)
        at = [padded[np.ix_(start + i, start + j)] for i in range(m + 2) for j in range(m + 2)]
        return np.stack(at).reshape(-1)


class _Rewrite:
    """One pass over a graph; `rows` holds each tensor that exists as rows, by its name in the original graph.

    `affine` holds slope and shift of those whose BatchNormalization is left to the convolutions that read them.
    """

    def __init__(self, model: onnx.ModelProto, fewest_channels: int) -> None:
        self.graph, self.fewest_channels = model.graph, fewest_channels
        self.known, self.index = shapes(model), GraphIndex(model.graph)
        self.nodes: list[onnx.NodeProto] = []
        self.rows: dict[str, str] = {}
        self.affine: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self.only_rows: set[str] = set()
        self.constants: dict[str, str] = {}

    def run(self) -> tuple[int, int]:
        """Convolutions rewritten, and all of them."""
        convolutions = [node for node in self.graph.node if node.op_type == "Conv"]
        chosen = {node.output[0] for node in convolutions if self.suits(node)}
        for node in list(self.graph.node):
            made = self.convolution(node) if node.output[0] in chosen else self.between(node, chosen)
            if made:
                self.rows[node.output[0]] = made
                self.only_rows.add(node.output[0])
                continue
            for name in node.input:
                self.as_map(name)
            self.nodes.append(type(node).FromString(node.SerializeToString()))
        for name in self.index.outputs:
            self.as_map(name)
        if chosen:
            del self.graph.node[:]
            self.graph.node.extend(self.nodes)
            drop_unused(self.graph)
        return len(chosen), len(convolutions)

    def suits(self, node: onnx.NodeProto) -> bool:
        """3×3, stride 1, padded by 1, not grouped, over square maps with channels enough."""
        shape, out = self.known.get(node.input[0], []), self.known.get(node.output[0], [])
        weight = self.index.constant(node.input[1])
        if weight is None or weight.shape[2:] != (3, 3) or len(shape) != 4 or shape[1:2] != [weight.shape[1]]:
            return False
        usual = {"strides": [1, 1], "dilations": [1, 1], "pads": [0] * 4, "group": 1, "auto_pad": b"NOTSET"}
        stated = {name: attribute(node, name, value) for name, value in usual.items()}
        if stated != usual | {"pads": [1] * 4}:
            return False
        square = isinstance(shape[2], int) and 1 < shape[2] == shape[3] and out[2:] == shape[2:]
        bias = bias_of(self.index, node, len(weight))
        return bias is not None and square and min(weight.shape[:2]) >= self.fewest_channels

    def convolution(self, node: onnx.NodeProto) -> str:
        """The nodes of one convolution, from rows to rows."""
        y, layout = node.output[0], self.layout(node.input[0])
        weight = self.index.constant(node.input[1])
        bias = None if weight is None else bias_of(self.index, node, len(weight))
        if weight is None or bias is None:  # `suits` has seen them
            raise AssertionError(y)
        channels_out, channels = weight.shape[:2]
        slope, shift = self.affine.get(node.input[0], (np.ones(channels), np.zeros(channels)))
        biases = bias_by_border(weight, bias, shift)
        weight = weight * slope.reshape(1, -1, 1, 1)
        across, kernel, into = transforms(layout.tile)
        positions, key = len(into), f"{layout.size}"
        tiles = self.constant(f"winograd_tiles_{key}", layout.rows_of_tiles())
        x = self.emit("Gather", [self.as_rows(node.input[0]), tiles], f"{y}.tiles", axis=0)
        x = self.emit("Reshape", [x, self.shape(positions, -1)], f"{y}.positions")
        b = self.constant(f"winograd_b_{layout.tile}", into.astype(np.float32))
        x = self.emit("MatMul", [b, x], f"{y}.transformed")
        x = self.emit("Reshape", [x, self.shape(positions, -1, channels)], f"{y}.by_channel")
        nine = self.constant(f"{y}.kernel", weight.transpose(2, 3, 1, 0).reshape(9, -1).astype(np.float32))
        g = self.constant(f"winograd_g_{layout.tile}", kernel.astype(np.float32))
        u = self.emit("MatMul", [g, nine], f"{y}.kernel_transformed")
        u = self.emit("Reshape", [u, self.shape(positions, channels, channels_out)], f"{y}.kernel_by_channel")
        x = self.emit("MatMul", [x, u], f"{y}.products")
        x = self.emit("Reshape", [x, self.shape(positions, -1)], f"{y}.product_positions")
        across = np.vstack([across, np.zeros(positions)])  # the rows that stay 0
        a = self.constant(f"winograd_a_{layout.tile}", across.astype(np.float32))
        x = self.emit("MatMul", [a, x], f"{y}.pixels")
        x = self.emit("Reshape", [x, self.shape(layout.rows, -1, channels_out)], f"{y}.sums")
        return self.emit("Add", [x, self.by_border(f"{y}.biases", biases, layout)], f"{y}.rows")

    def between(self, node: onnx.NodeProto, chosen: set[str]) -> str | None:
        """A node that works on rows as it does on maps; None if it shall stay what it is."""
        y = node.output[0]
        rows = self.rows.get(node.input[0]) if node.input else None
        users = self.index.users.get(y, [])
        if node.op_type == "BatchNormalization" and len(self.known.get(y, [])) == 4:
            affine = affine_of(self.index, node)
            before = bool(users) and all(user.output[0] in chosen for user in users) and y not in self.index.outputs
            if affine is None or not (rows or before):
                return None
            if before:
                self.affine[y] = affine
                return self.as_rows(node.input[0])
            slope = self.constant(f"{y}.slope", affine[0].astype(np.float32))
            shift = self.by_border(f"{y}.shifts", np.tile(affine[1], (9, 1)), self.layout(y))
            return self.emit("Add", [self.emit("Mul", [rows or "", slope], f"{y}.scaled"), shift], f"{y}.rows")
        if not rows:
            return None
        if node.op_type == "PRelu":
            slopes = self.index.constant(node.input[1])
            if slopes is None or slopes.ndim < 3 or slopes.shape[-2:] != (1, 1):
                return None
            # Three dimensions: OpenVINO takes a single one for the channels of NCHW, here the faces.
            return self.emit("PRelu", [rows, self.constant(f"{y}.slope", slopes.reshape(1, 1, -1))], f"{y}.rows")
        same = self.known.get(node.input[-1]) == self.known.get(node.input[0])
        if node.op_type == "Add" and same and len(self.known.get(y, [])) == 4:
            return self.emit("Add", [rows, self.as_rows(node.input[1])], f"{y}.rows")
        return None

    def as_rows(self, name: str) -> str:
        """A feature map [faces, channels, size, size] as rows."""
        if name not in self.rows:
            layout, channels = self.layout(name), self.known[name][1]
            x = self.emit("Transpose", [name], f"{name}.channels_last", perm=[0, 2, 3, 1])
            x = self.emit("Reshape", [x, self.shape(-1, layout.size**2, int(channels or 0))], f"{name}.in_order")
            x = self.emit("Transpose", [x], f"{name}.pixels_first", perm=[1, 0, 2])
            x = self.emit("Pad", [x, self.shape(0, 0, 0, 1, 0, 0)], f"{name}.padded")
            order = self.constant(f"winograd_order_{layout.size}", layout.pixel_of_row())
            self.rows[name] = self.emit("Gather", [x, order], f"{name}.rows", axis=0)
        return self.rows[name]

    def as_map(self, name: str) -> None:
        """Make the feature map itself of what exists only as rows."""
        if name in self.only_rows:
            self.only_rows.remove(name)
            layout = self.layout(name)
            size, channels = layout.size, int(self.known[name][1] or 0)
            place = self.constant(f"winograd_place_{size}", layout.row_of_pixel().reshape(-1))
            x = self.emit("Gather", [self.rows[name], place], f"{name}.pixels_placed", axis=0)
            x = self.emit("Transpose", [x], f"{name}.faces_first", perm=[1, 0, 2])
            x = self.emit("Reshape", [x, self.shape(-1, size, size, channels)], f"{name}.lines")
            self.emit("Transpose", [x], name, perm=[0, 3, 1, 2])

    def by_border(self, name: str, values: np.ndarray, layout: _Layout) -> str:
        """[rows, 1, channels] of values [9, channels] for `border_of_row`, and 0 beyond; made when a runtime loads."""
        table = np.vstack([values, np.zeros_like(values[:1])])[:, None].astype(np.float32)
        borders = self.constant(f"winograd_borders_{layout.size}", layout.border_of_row())
        return self.emit("Gather", [self.constant(name, table), borders], f"{name}.rows", axis=0)

    def layout(self, name: str) -> _Layout:
        return _Layout(int(self.known[name][2] or 0))

    def shape(self, *values: int) -> str:
        return self.constant("winograd_shape_" + "_".join(map(str, values)), np.array(values, np.int64))

    def constant(self, name: str, value: np.ndarray) -> str:
        if name not in self.constants:
            self.constants[name] = self.index.add_constant(name, value)
        return self.constants[name]

    def emit(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        from onnx.helper import make_node

        self.nodes.append(make_node(op, inputs, [output], name=output, **attributes))
        return output
