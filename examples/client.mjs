// Embed aligned faces from JavaScript: fetch alone, binary tensors both ways; the same in a browser and in Node.
//
// node examples/client.mjs faces.bgr [http://localhost:8000]
//
// faces.bgr: 112×112 pixels of three bytes, B G R, one face after the other. From a canvas: bgrFromRgba(imageData.data).

const FACE_BYTES = 112 * 112 * 3;

/** Pixels of a canvas (RGBA) as the model wants them (BGR). */
export function bgrFromRgba(rgba) {
  const bgr = new Uint8Array((rgba.length / 4) * 3);
  for (let from = 0, to = 0; from < rgba.length; from += 4, to += 3) {
    [bgr[to], bgr[to + 1], bgr[to + 2]] = [rgba[from + 2], rgba[from + 1], rgba[from]];
  }
  return bgr;
}

/** Uint8Array of N faces → {embeddings: N Float32Arrays of unit length, contract: first 32 digits of the contract id}. */
export async function embed(faces, url = "http://localhost:8000") {
  const count = faces.length / FACE_BYTES;
  if (!Number.isInteger(count) || count === 0) {
    throw new Error(`${faces.length} bytes: expected a multiple of ${FACE_BYTES}, aligned crops of 112×112 pixels`);
  }
  const face = { name: "face", datatype: "UINT8", shape: [count, 112, 112, 3] };
  const header = new TextEncoder().encode(
    JSON.stringify({
      inputs: [{ ...face, parameters: { binary_data_size: faces.length } }],
      outputs: ["embedding", "contract"].map((name) => ({ name, parameters: { binary_data: true } })),
    }),
  );
  const answer = await fetch(`${url}/v2/models/arcface/infer`, {
    method: "POST",
    headers: { "Inference-Header-Content-Length": String(header.length), "Content-Type": "application/octet-stream" },
    body: new Blob([header, faces]),
  });
  if (!answer.ok) throw new Error(`${answer.status}: ${await answer.text()}`);
  const body = await answer.arrayBuffer();
  let offset = Number(answer.headers.get("Inference-Header-Content-Length"));
  const tensors = {};
  for (const { name, parameters } of JSON.parse(new TextDecoder().decode(body.slice(0, offset))).outputs) {
    tensors[name] = body.slice(offset, (offset += parameters.binary_data_size)); // little-endian, as every browser's host
  }
  const rows = new Float32Array(tensors.embedding);
  const width = rows.length / count;
  return {
    embeddings: Array.from({ length: count }, (_, i) => rows.subarray(i * width, (i + 1) * width)),
    contract: Array.from(new Uint32Array(tensors.contract, 0, 4), (word) => word.toString(16).padStart(8, "0")).join(""),
  };
}

if (globalThis.process?.argv[1]?.endsWith("client.mjs")) {
  const { readFile } = await import("node:fs/promises");
  const [file, url] = process.argv.slice(2);
  const { embeddings, contract } = await embed(new Uint8Array(await readFile(file)), url);
  console.log(JSON.stringify({ contract, embeddings: embeddings.map((row) => Array.from(row)) }));
}
