"""An object store in S3 or MinIO through boto3, which does retries, multipart and progress; maps its errors to ours."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from arcface_build.errors import StoreUnreachable
from arcface_build.store.local import disk_error
from arcface_build.store.objects import Progress, Stored
from arcface_clients.errors import ArcFaceError, Missing, WrongUse
from arcface_clients.extras import how_to_get
from arcface_clients.s3 import S3Options

_PART_BYTES = 16 << 20  # plans are 10..300 MB: a few parallel parts, far from S3's limit of 10,000
_CREDENTIALS = "Check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_PROFILE: aws sts get-caller-identity"


class S3Store:
    """Objects `prefix/name` of one bucket. Nothing is contacted until the first call; safe to use from threads."""

    def __init__(self, bucket: str, prefix: str = "", options: S3Options | None = None) -> None:
        if not bucket:
            raise WrongUse("the S3 URL names no bucket: expected s3://bucket/prefix.")
        self.bucket = bucket
        self.prefix = prefix.strip("/")
        self.options = options or S3Options()
        self.url = f"s3://{bucket}/{self.prefix}".rstrip("/")

    def stored(self, prefix: str = "") -> list[Stored]:
        """Objects whose names begin with `prefix`, sorted."""
        base = f"{self.prefix}/" if self.prefix else ""
        with self._errors("list"):
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=base + prefix)
            items = [item for page in pages for item in page.get("Contents", [])]
        return sorted(Stored(i["Key"][len(base) :], i["Size"], i["LastModified"].timestamp()) for i in items)

    def read(self, name: str, limit_bytes: int) -> bytes | None:
        """The beginning of an object, or None; a connection cut mid-response is retried like any other failure."""
        with self._errors(f"read {_short(name)}"):
            for attempt in range(self.options.max_attempts):
                try:
                    answer = self._client.get_object(Bucket=self.bucket, Key=self._key(name))
                    with contextlib.closing(answer["Body"]) as body:  # read it all if allowed: only then is it verified
                        return body.read(None if answer["ContentLength"] <= limit_bytes else limit_bytes)
                except self._client.exceptions.NoSuchKey:
                    return None
                except self._cut:  # boto3 retries a request, but not reading its body
                    if attempt + 1 == self.options.max_attempts:
                        raise
        return None

    def download(self, name: str, file: Path, progress: Progress | None = None) -> bool:
        """Fetch an object into `file` in parallel parts; parts whose connection is cut are fetched again."""
        with self._errors(f"download {_short(name)}", file):
            for attempt in range(self.options.max_attempts):
                try:
                    with file.open("wb") as target:
                        self._client.download_fileobj(
                            self.bucket, self._key(name), target, Callback=progress, Config=self._transfer
                        )
                    return True
                except self._client.exceptions.ClientError as exc:
                    if _code(exc) in ("404", "NoSuchKey"):
                        return False
                    raise
                except self._changed:
                    if attempt + 1 == self.options.max_attempts:
                        raise
        return False

    def upload(self, file: Path, name: str, progress: Progress | None = None) -> None:
        """Upload a file, in parts if it is large; S3 shows it only when it is complete."""
        with self._errors(f"upload {_short(name)}"):
            self._client.upload_file(str(file), self.bucket, self._key(name), Callback=progress, Config=self._transfer)

    def create(self, name: str, data: bytes) -> bool:
        """Conditional put (If-None-Match: *): of two uploaders one wins, and the other gets False.

        A retry after a lost response may find the object that it wrote itself; that counts as written.
        """
        with self._errors(f"create {_short(name)}"):
            for _ in range(self.options.max_attempts):
                try:
                    self._client.put_object(Bucket=self.bucket, Key=self._key(name), Body=data, IfNoneMatch="*")
                    return True
                except self._client.exceptions.ClientError as exc:
                    if _code(exc) == "PreconditionFailed":
                        return self.read(name, len(data) + 1) == data
                    if _code(exc) != "ConditionalRequestConflict":  # another put is in progress: try again
                        raise
        raise StoreUnreachable(
            f"{self.url}: could not create {_short(name)}: another upload of it is still in progress. Try again later."
        )

    def delete(self, name: str) -> None:
        """Remove an object; a missing one is no error."""
        with self._errors(f"delete {_short(name)}"):
            self._client.delete_object(Bucket=self.bucket, Key=self._key(name))

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name

    @cached_property
    def _client(self) -> Any:
        try:
            import boto3
            from botocore.config import Config
        except ImportError as exc:
            raise Missing(f"an S3 plan store needs boto3. Next: {how_to_get('boto3')}") from exc
        options = self.options
        config = Config(
            connect_timeout=options.connect_timeout_s,
            read_timeout=options.read_timeout_s,
            retries={"total_max_attempts": options.max_attempts, "mode": "standard"},
            s3={"addressing_style": "path" if options.is_path_style else "auto"},
        )
        with self._errors("configure"):
            session = boto3.session.Session(region_name=options.region)
            region = session.region_name or os.environ.get("AWS_REGION") or "us-east-1"
            return session.client("s3", endpoint_url=options.endpoint, region_name=region, config=config)

    @cached_property
    def _transfer(self) -> Any:
        from boto3.s3.transfer import TransferConfig

        return TransferConfig(
            multipart_threshold=_PART_BYTES,
            multipart_chunksize=_PART_BYTES,
            max_concurrency=4,
            num_download_attempts=self.options.max_attempts,
        )

    @property
    def _cut(self) -> tuple[type[Exception], ...]:
        from botocore import exceptions as aws

        return (aws.IncompleteReadError, aws.ReadTimeoutError, aws.ResponseStreamingError, http.client.IncompleteRead)

    @property
    def _changed(self) -> type[Exception]:
        from botocore.exceptions import FlexibleChecksumError

        return FlexibleChecksumError

    @contextmanager
    def _errors(self, doing: str, file: Path | None = None) -> Iterator[None]:
        """Map all errors of boto3 and the disk to StoreUnreachable, with the next step."""
        from boto3.exceptions import Boto3Error
        from botocore import exceptions as aws
        from s3transfer.exceptions import RetriesExceededError

        try:
            yield
        except ArcFaceError:  # already ours
            raise
        except RetriesExceededError as exc:
            raise self._unreachable(
                doing, f"the connection was cut each time ({type(exc.last_exception).__name__})", _NETWORK
            ) from exc
        except aws.ClientError as exc:
            raise self._unreachable(doing, *_explain(exc, self.bucket)) from exc
        except Boto3Error as exc:  # upload_file puts the cause into its text and __context__
            cause = exc.__context__
            reason = _explain(cause, self.bucket) if isinstance(cause, aws.ClientError) else (str(exc), _NETWORK)
            raise self._unreachable(doing, *reason) from exc
        except (aws.NoCredentialsError, aws.PartialCredentialsError, aws.ProfileNotFound) as exc:
            raise self._unreachable(doing, f"no usable credentials ({exc})", _CREDENTIALS) from exc
        except aws.FlexibleChecksumError as exc:
            raise self._unreachable(doing, f"the response was corrupted each time ({exc})", _NETWORK) from exc
        except aws.BotoCoreError as exc:
            raise self._unreachable(doing, f"{exc}", _NETWORK) from exc
        except ValueError as exc:  # from botocore if the endpoint is not a URL
            raise WrongUse(
                f"S3 endpoint is {self.options.endpoint!r} ({exc}): expected a URL such as http://minio:9000."
            ) from exc
        except OSError as exc:
            raise disk_error(exc, str(file.parent if file else self.url)) from exc

    def _unreachable(self, doing: str, reason: str, step: str) -> StoreUnreachable:
        at = f" at {self.options.endpoint}" if self.options.endpoint else ""
        return StoreUnreachable(f"{self.url}{at}: could not {doing}: {reason.rstrip('.')}. {step}")


_NETWORK = "Check the endpoint and the network, or try again later: curl -I ENDPOINT"


def _short(name: str) -> str:
    """An object's name with digests shortened to 12 digits, for messages."""
    return re.sub(r"([0-9a-f]{12})[0-9a-f]{52}", r"\1", name)


def _code(exc: Any) -> str:
    return str(exc.response.get("Error", {}).get("Code", ""))


def _explain(exc: Any, bucket: str) -> tuple[str, str]:
    """What an S3 error code means, and what to do about it."""
    code, status = _code(exc), exc.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    text = f"{code}: {exc.response.get('Error', {}).get('Message', '')}".rstrip(": ")
    if code == "NoSuchBucket":
        return f"there is no bucket {bucket!r} ({text})", f"Create it: aws s3 mb s3://{bucket}"
    if code in ("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken") or status == 401:
        return f"the credentials were refused ({text})", _CREDENTIALS
    if code in ("AccessDenied", "AllAccessDisabled", "403") or status == 403:
        return (
            f"access was denied ({text})",
            "The key needs s3:ListBucket, s3:GetObject, s3:PutObject and s3:DeleteObject. " + _CREDENTIALS,
        )
    if code == "PermanentRedirect" or status == 301:
        return f"the bucket is in another region ({text})", "Set AWS_DEFAULT_REGION or storage.region"
    if (status is not None and status >= 500) or code in ("SlowDown", "503"):
        return (
            f"the server answered {status} each time ({text})",
            "Try again later; storage.retries sets the number of attempts",
        )
    return f"the server answered {status} ({text})", _NETWORK
