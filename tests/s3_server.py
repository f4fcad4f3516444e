"""A stand-in for S3 in memory, whose requests fail as asked: `with S3Server() as server`, or

    python -m tests.s3_server PORT LATENCY_MS

which serves until its standard input ends. It knows GET (ranges), HEAD, PUT (conditional ones),
DELETE, listings and uploads in parts, for one bucket; signatures are not looked at.
"""

from __future__ import annotations

import random
import re
import socket
import struct
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from types import TracebackType
from typing import Self
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.sax.saxutils import escape, unescape
from zlib import crc32

BUCKET = "acts"
_PAGE = 1000
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


@dataclass
class Faults:
    """How often, from 0 to 1, a request fails in each way."""

    error: float = 0.0  # answered 500
    dropped: float = 0.0  # reset in the middle of its body, sent or received
    cut: float = 0.0  # answered with half of the bytes, under a header that says so
    down: bool = False  # every request answered 503
    latency_s: float = 0.0  # before each answer
    seed: int = 0

    def __post_init__(self) -> None:
        self.rng, self.lock = random.Random(self.seed), threading.Lock()

    def hits(self, rate: float) -> bool:
        """Whether a request is one of those that fail."""
        with self.lock:
            return self.rng.random() < rate


@dataclass
class Bucket:
    """What is stored, and what was asked for."""

    objects: dict[str, bytes] = field(default_factory=dict)
    uploads: dict[str, dict[int, bytes]] = field(default_factory=dict)
    faults: Faults = field(default_factory=Faults)
    requests: list[tuple[str, str]] = field(default_factory=list)  # method, key
    failed: int = 0
    numbers: count[int] = field(default_factory=lambda: count(1))
    lock: threading.Lock = field(default_factory=threading.Lock)
    _etags: dict[str, tuple[bytes, str]] = field(default_factory=dict)

    def etag(self, key: str, data: bytes) -> str:
        """Of an object, computed once."""
        known = self._etags.get(key)
        if known is None or known[0] is not data:
            known = self._etags[key] = data, _etag(data)
        return known[1]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    bucket: Bucket
    # A request's small answer does not wait for the next packet.
    disable_nagle_algorithm = True

    def log_message(self, *args: object) -> None:
        pass

    def _begin(self) -> str | None:
        """The key that is asked for; None where the request has failed already."""
        parts = urlsplit(self.path)
        self.query = {k: v[0] for k, v in parse_qs(parts.query, keep_blank_values=True).items()}
        key = unquote(parts.path).removeprefix(f"/{BUCKET}").removeprefix("/")
        faults, size = self.bucket.faults, int(self.headers.get("Content-Length") or 0)
        self.bucket.requests.append((self.command, key))
        time.sleep(faults.latency_s)
        if size and faults.hits(faults.dropped):
            self.rfile.read(size // 2)
            return self._drop()
        self.body = bytearray(size)
        if size and self.rfile.readinto(self.body) != size:  # type: ignore[attr-defined]
            return self._drop()
        if faults.down or faults.hits(faults.error):
            self.bucket.failed += 1
            self._answer(503 if faults.down else 500, b"<Error><Code>InternalError</Code></Error>")
            return None
        return key

    def _drop(self) -> None:
        self.bucket.failed += 1
        self.close_connection = True
        # Closing it then resets it.
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)

    def _answer(self, code: int, data: bytes | memoryview = b"", **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _missing(self) -> None:
        self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")

    def _about(self, key: str, data: bytes) -> dict[str, str]:
        return {
            "ETag": self.bucket.etag(key, data),
            "Last_Modified": "Mon, 30 Nov 2026 00:00:00 GMT",
        }

    def do_HEAD(self) -> None:
        if (key := self._begin()) is None:
            return
        if (data := self.bucket.objects.get(key)) is None:
            self._missing()
            return
        self._answer(200, b"", Content_Length=str(len(data)), **self._about(key, data))

    def do_GET(self) -> None:
        if (key := self._begin()) is None:
            return
        if key == "":
            self._list()
            return
        if (data := self.bucket.objects.get(key)) is None:
            self._missing()
            return
        start, stop, code = 0, len(data), 200
        headers = self._about(key, data)
        if (found := _RANGE.fullmatch(self.headers.get("Range", ""))) is not None:
            first, last = found.groups()
            start = int(first) if first else max(0, len(data) - int(last))
            stop = min(len(data), int(last) + 1) if first and last else len(data)
            headers["Content_Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            code = 206
        self._send(code, memoryview(data)[start:stop], headers)

    def _send(self, code: int, part: memoryview, headers: dict[str, str]) -> None:
        faults = self.bucket.faults
        if faults.hits(faults.cut):
            self.bucket.failed += 1
            self._answer(code, part[: len(part) // 2], **headers)
        elif faults.hits(faults.dropped):
            self._answer(code, part[: len(part) // 2], Content_Length=str(len(part)), **headers)
            self._drop()
        else:
            self._answer(code, part, **headers)

    def _list(self) -> None:
        prefix, delimiter = self.query.get("prefix", ""), self.query.get("delimiter", "")
        after = self.query.get("continuation-token", self.query.get("start-after", ""))
        entries: dict[str, str] = {}
        for key, data in sorted(self.bucket.objects.items()):
            if not key.startswith(prefix):
                continue
            rest = key[len(prefix) :]
            if delimiter and delimiter in rest:
                folder = prefix + rest.partition(delimiter)[0] + delimiter
                entries[folder] = (
                    f"<CommonPrefixes><Prefix>{escape(folder)}</Prefix></CommonPrefixes>"
                )
            else:
                entries[key] = (
                    f"<Contents><Key>{escape(key)}</Key><Size>{len(data)}</Size>"
                    f"<ETag>{escape(self.bucket.etag(key, data))}</ETag>"
                    "<LastModified>2026-11-30T00:00:00.000Z</LastModified></Contents>"
                )
        left = sorted(name for name in entries if name > after)
        page = left[: min(_PAGE, int(self.query.get("max-keys", _PAGE)))]
        more = len(left) > len(page)
        token = f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>" if more else ""
        text = (
            f"<ListBucketResult><Name>{BUCKET}</Name><KeyCount>{len(page)}</KeyCount>"
            f"<IsTruncated>{str(more).lower()}</IsTruncated>{token}"
            f"{''.join(entries[name] for name in page)}</ListBucketResult>"
        )
        self._answer(200, text.encode(), Content_Type="application/xml")

    def do_PUT(self) -> None:
        if (key := self._begin()) is None:
            return
        data, bucket = bytes(self.body), self.bucket
        if (upload := self.query.get("uploadId")) is not None:
            if upload not in bucket.uploads:
                self._missing()
                return
            bucket.uploads[upload][int(self.query["partNumber"])] = data
            self._answer(200, ETag=_etag(data))
            return
        with bucket.lock:
            if key in bucket.objects and self.headers.get("If-None-Match") == "*":
                self._answer(412, b"<Error><Code>PreconditionFailed</Code></Error>")
                return
            bucket.objects[key] = data
        self._answer(200, ETag=bucket.etag(key, data))

    def do_POST(self) -> None:
        if (key := self._begin()) is None:
            return
        bucket = self.bucket
        if "uploads" in self.query:
            upload = str(next(bucket.numbers))
            bucket.uploads[upload] = {}
            text = f"<Key>{escape(key)}</Key><UploadId>{upload}</UploadId>"
            text = f"<InitiateMultipartUploadResult>{text}</InitiateMultipartUploadResult>"
        elif "delete" in self.query:
            names = re.findall(r"<Key>(.*?)</Key>", self.body.decode())
            for name in names:
                bucket.objects.pop(unescape(name), None)
            gone = "".join(f"<Deleted><Key>{name}</Key></Deleted>" for name in names)
            text = f"<DeleteResult>{gone}</DeleteResult>"
        else:
            parts = bucket.uploads.pop(self.query["uploadId"], None)
            if parts is None:
                self._missing()
                return
            data = b"".join(parts[number] for number in sorted(parts))
            bucket.objects[key] = data
            text = f"<Key>{quote(key)}</Key><ETag>{escape(bucket.etag(key, data))}</ETag>"
            text = f"<CompleteMultipartUploadResult>{text}</CompleteMultipartUploadResult>"
        self._answer(200, text.encode(), Content_Type="application/xml")

    def do_DELETE(self) -> None:
        if (key := self._begin()) is None:
            return
        if (upload := self.query.get("uploadId")) is not None:
            self.bucket.uploads.pop(upload, None)
        else:
            self.bucket.objects.pop(key, None)
        self._answer(204)


def _etag(data: bytes) -> str:
    # Not crc32c: data with theirs behind them have the same.
    return f'"{crc32(data):08x}-{len(data)}"'


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, request: object, client_address: object) -> None:
        # A client that has gone, as one that was killed.
        pass


def environment(port: int) -> dict[str, str]:
    """What a client needs to find a stand-in on a port of this host."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
    }


class S3Server:
    """The stand-in in a thread; `bucket` is what it holds."""

    def __init__(self, port: int = 0) -> None:
        self.bucket = Bucket()
        handler = type("Handler", (_Handler,), {"bucket": self.bucket})
        self.server = _Server(("127.0.0.1", port), handler)
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs to find it."""
        return environment(self.server.server_port)

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


if __name__ == "__main__":
    with S3Server(int(sys.argv[1])) as server:
        server.bucket.faults.latency_s = float(sys.argv[2]) / 1000
        sys.stdin.read()
