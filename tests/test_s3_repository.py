"""Triton reading the whole model repository from S3: the same answers as from the folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from arcface_clients import TritonEmbedder
from arcface_clients.faces.synthetic import synthetic_faces


def test_triton_serves_the_repository_straight_from_s3(
    demo_repository: Path, server: Any, s3_server: str, start_triton: Callable[..., Any]
) -> None:
    import boto3

    credentials = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    client = boto3.client(
        "s3",
        endpoint_url=s3_server,
        region_name="us-east-1",
        aws_access_key_id="test",
        aws_secret_access_key="test",
    )
    client.create_bucket(Bucket="repository")
    for file in sorted(p for p in demo_repository.rglob("*") if p.is_file() and "__pycache__" not in p.parts):
        client.upload_file(str(file), "repository", f"models/{file.relative_to(demo_repository).as_posix()}")
    remote = start_triton(f"s3://{s3_server}/repository/models", ["arcface"], environment=credentials)
    faces = synthetic_faces(5)
    with TritonEmbedder(remote.grpc_url) as from_s3, TritonEmbedder(server.grpc_url) as from_folder:
        assert from_s3.contract_id == from_folder.contract_id
        np.testing.assert_allclose(from_s3.encode(faces), from_folder.encode(faces), atol=1e-6)
