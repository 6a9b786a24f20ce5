# arcface-triton in a container; no weights inside.
#   docker build --target cpu -t arcface-triton:cpu .     the wheel's Triton, InsightFace, every command: serve, parity, drift
#   docker build --target gpu -t arcface-triton:gpu .     NGC's Triton with its native backends; builds TensorRT plans
# A package mirror or a company's certificates: --secret id=pip.conf,src=pip.conf
ARG CPU_BASE=python:3.11-slim-bookworm
# The one place where the version is pinned: plans load only under the TensorRT of this image (26.05 is the last with TensorRT 10).
ARG TRITON_VERSION=26.05
ARG GPU_BASE=nvcr.io/nvidia/tritonserver:${TRITON_VERSION}-py3

FROM ${CPU_BASE} AS wheel
COPY . /src
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    python3 -m venv /build && /build/bin/pip wheel --no-cache-dir -q --no-deps --wheel-dir /dist /src


FROM ${CPU_BASE} AS cpu
# libpython for the server's Python stub where Python comes from Debian; libb64 for perf_analyzer (arcface bench), jemalloc for the server
RUN apt-get update -qq \
    && apt-get install -y -qq --no-install-recommends libb64-0d libjemalloc2 \
        $(test -e /usr/bin/python3 && python3 -c 'import sys; print("libpython%d.%d" % sys.version_info[:2])') \
    && rm -rf /var/lib/apt/lists/*
COPY --from=wheel /dist /dist
COPY constraints.txt /dist/
# InsightFace without its requirements: it wants a second ONNX Runtime and an OpenCV that needs a display.
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    python3 -m venv /opt/arcface \
    && /opt/arcface/bin/pip install --no-cache-dir -q -c /dist/constraints.txt onnxruntime-openvino \
        "$(echo /dist/*.whl)[triton,tools,images,heif,http,reference-needs,store,evidence,bulk]" \
    && /opt/arcface/bin/pip install --no-cache-dir -q -c /dist/constraints.txt --no-deps insightface
ENV VIRTUAL_ENV=/opt/arcface PATH=/opt/arcface/bin:$PATH HOME=/srv/arcface
# Composes the server's backends now: later nobody may write there. And the folder that a volume is mounted on.
RUN python -c 'from arcface_build.serving.binary import find_tritonserver; find_tritonserver()' \
    && useradd --uid 1000 --no-create-home --home-dir /srv/arcface arcface \
    && install -d -o 1000 -g 1000 /srv/arcface
WORKDIR /srv/arcface
USER 1000:1000
EXPOSE 8000 8001 8002
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=6 \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://localhost:8000/v2/health/ready', timeout=4)"]
CMD ["arcface", "serve"]


FROM ${GPU_BASE} AS gpu
USER root
RUN apt-get update -qq \
    && apt-get install -y -qq --no-install-recommends python3-venv libb64-0d libjemalloc2 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=wheel /dist /dist
COPY constraints.txt /dist/
# TensorRT's Python package in the version of the server; NVIDIA's images name theirs in TRT_VERSION and CUDA_VERSION.
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    python3 -m venv /opt/arcface \
    && /opt/arcface/bin/pip install --no-cache-dir -q -c /dist/constraints.txt 'numpy<2' \
        "$(echo /dist/*.whl)[gpu,images,heif,http,reference-needs,store,evidence,bulk]" \
        "tensorrt-cu${CUDA_VERSION%%.*}==$(echo "$TRT_VERSION" | cut -d. -f1-3).*" \
    && /opt/arcface/bin/pip install --no-cache-dir -q -c /dist/constraints.txt --no-deps insightface
ENV VIRTUAL_ENV=/opt/arcface PATH=/opt/arcface/bin:$PATH HOME=/srv/arcface
RUN install -d -o 1000 -g 1000 /srv/arcface
WORKDIR /srv/arcface
# NGC's own user `triton-server`
USER 1000:1000
EXPOSE 8000 8001 8002
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s --retries=6 \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://localhost:8000/v2/health/ready', timeout=4)"]
CMD ["arcface", "serve"]
