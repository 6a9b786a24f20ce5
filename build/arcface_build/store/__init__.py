"""Object stores behind one protocol: a local folder, and S3 or MinIO; `open_store` takes the URL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from arcface_build.store.objects import ObjectStore
from arcface_clients.errors import WrongUse
from arcface_clients.s3 import S3Options


def open_store(url: str, **s3_options: Any) -> ObjectStore:
    """The store at `s3://bucket/prefix`, `file:///folder` or a folder's path; `s3_options` are fields of `S3Options`.

    Options that are None count as not given. Nothing is contacted and nothing created until the store is used.

    Raises:
        WrongUse: another scheme, or no bucket.
        Missing: boto3 is not installed (s3:// only).
    """
    scheme, _, rest = url.partition("://")
    if url.startswith("s3://"):
        from arcface_build.store.s3 import S3Store

        bucket, _, prefix = rest.partition("/")
        return S3Store(bucket, prefix, S3Options(**{k: v for k, v in s3_options.items() if v is not None}))
    if "://" in url and scheme != "file":
        raise WrongUse(f"plan store is {url!r}: expected s3://bucket/prefix or a folder.")
    from arcface_build.store.local import LocalStore

    return LocalStore(Path(rest if scheme == "file" and rest else url).expanduser())
