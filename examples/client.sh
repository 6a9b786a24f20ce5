#!/usr/bin/env bash
# Embed aligned faces with curl alone: raw pixels out, JSON in.
#
# examples/client.sh faces.bgr [http://localhost:8000]
#
# faces.bgr: 112×112 pixels of three bytes, B G R, one face after the other; ImageMagick: convert crop.png bgr:faces.bgr
set -euo pipefail

faces=$1 url=${2:-http://localhost:8000}
size=$(wc -c <"$faces") face=$((112 * 112 * 3))
count=$((size / face))
if [ "$count" -eq 0 ] || [ $((count * face)) -ne "$size" ]; then
  echo "$faces has $size bytes: expected a multiple of $face, aligned crops of 112×112 pixels" >&2
  exit 2
fi

# Triton's binary tensors: a JSON header, whose length a request header tells, and the pixels behind it.
printf -v header '{"inputs": [{"name": "face", "datatype": "UINT8", "shape": [%d, 112, 112, 3],
  "parameters": {"binary_data_size": %d}}], "outputs": [{"name": "embedding"}, {"name": "contract"}]}' "$count" "$size"
{ printf '%s' "$header" && cat "$faces"; } |
  curl --silent --show-error --fail-with-body --data-binary @- \
    --header "Inference-Header-Content-Length: ${#header}" --header "Content-Type: application/octet-stream" \
    "$url/v2/models/arcface/infer"
echo
