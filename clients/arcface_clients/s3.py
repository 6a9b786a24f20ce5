"""How an S3 store is reached, by the plan store (boto3) and by bulk jobs (pyarrow) alike.

Credentials, endpoint and region come from the usual AWS variables and files (AWS_ACCESS_KEY_ID, AWS_PROFILE,
AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL, AWS_DEFAULT_REGION, AWS_REGION …) unless given here.
"""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class S3Options:
    """How to reach the store. None: from the AWS variables, else the library's default.

    endpoint_url: for MinIO and others, "http://minio:9000". region: of the bucket; us-east-1 if not set anywhere.
    path_style: bucket in the path, not in the host name; None does so if an endpoint is given.
    max_attempts: attempts for one request, including the first. *_timeout_s: seconds without an answer.
    """

    endpoint_url: str | None = None
    region: str | None = None
    path_style: bool | None = None
    max_attempts: int = 5
    connect_timeout_s: float = 5.0
    read_timeout_s: float = 30.0

    @property
    def endpoint(self) -> str | None:
        """The URL to ask; None: AWS itself."""
        return self.endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None

    @property
    def is_path_style(self) -> bool:
        """Whether the bucket stands in the path."""
        return bool(self.endpoint) if self.path_style is None else self.path_style
