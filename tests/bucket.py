"""A bucket of Google Cloud Storage on this machine: as much of its JSON API as gcsfs and TensorStore use."""

import base64
import contextlib
import json
import re
import threading
import time
import zlib
from datetime import UTC, datetime
from email.parser import BytesParser
from hashlib import md5
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from urllib.parse import parse_qs, quote, unquote, urlsplit

BUCKET = "shelf"


class Bucket:
    """Objects by name. `refused` says which requests are answered by 403: (method, name) -> bool."""

    def __init__(self, url: str):
        self.url = url
        self.objects: dict[str, tuple[bytes, int, str]] = {}  # content, generation, when
        self.requests: list[tuple[str, str]] = []
        self.refused = lambda method, name: False
        self.lock = threading.Lock()
        self._generations = count(1)
        self._uploads: dict[str, list] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.objects

    def names(self, prefix: str = "") -> list[str]:
        return sorted(name for name in list(self.objects) if name.startswith(prefix))

    def read(self, name: str) -> bytes:
        return self.objects[name][0]

    def write(self, name: str, data: bytes) -> None:
        with self.lock:
            when = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
            self.objects[name] = (data, next(self._generations), when)

    def env(self) -> dict[str, str]:
        """What processes need to find this bucket in place of Google's."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
            "FSSPEC_GS_TOKEN": "anon",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }

    def described(self, name: str) -> dict:
        data, generation, when = self.objects[name]
        digest = lambda b: base64.b64encode(b).decode()  # noqa: E731
        return {
            "kind": "storage#object",
            "name": name,
            "bucket": BUCKET,
            "size": str(len(data)),
            "generation": str(generation),
            "metageneration": "1",
            "timeCreated": when,
            "updated": when,
            "md5Hash": digest(md5(data).digest()),
            "crc32c": digest(zlib.crc32(data).to_bytes(4, "big")),  # another polynomial than Google's
        }


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # an answer is one packet
    bucket: Bucket

    def log_message(self, *args):
        pass

    def handle(self):
        with contextlib.suppress(ConnectionError):  # of a process that was killed
            super().handle()

    def do_GET(self):
        self._do("GET")

    def do_POST(self):
        self._do("POST")

    def do_PUT(self):
        self._do("PUT")

    def do_DELETE(self):
        self._do("DELETE")

    def _do(self, method: str) -> None:
        body = self._body()
        split = urlsplit(self.path)
        options = {key: values[-1] for key, values in parse_qs(split.query, keep_blank_values=True).items()}
        if split.path == "/batch/storage/v1":
            return self._batch(body)
        parts = re.fullmatch(r"/(?:(?:upload|download)/)?storage/v1/b/([^/]+)(?:/o(?:/(.*))?)?", split.path)
        if parts is None or unquote(parts[1]) != BUCKET:
            return self._answer(404, {"error": {"code": 404, "message": "The bucket does not exist."}})
        if split.path.startswith("/upload/"):
            return self._upload(method, options.get("name", ""), options, body)
        name = unquote(parts[2] or "")
        if self._is_refused(method, name):
            return None
        if "/o" not in split.path.partition(f"/b/{parts[1]}")[2]:
            return self._answer(200, {"kind": "storage#bucket", "name": BUCKET, "id": BUCKET})
        if not parts[2]:
            return self._list(options)
        if "/rewriteTo/" in parts[2]:
            old, _, new = parts[2].partition("/rewriteTo/")
            old, new = unquote(old), unquote(new.partition("/o/")[2])
            if old not in self.bucket:
                return self._answer(404, {"error": {"code": 404, "message": "no such object"}})
            self.bucket.write(new, self.bucket.read(old))
            return self._answer(200, {"done": True, "resource": self.bucket.described(new)})
        return self._object(method, name, options)

    def _is_refused(self, method: str, name: str) -> bool:
        self.bucket.requests.append((method, name))
        if refused := self.bucket.refused(method, name):
            self._answer(403, {"error": {"code": 403, "message": "no permission"}})
        return refused

    def _object(self, method: str, name: str, options: dict) -> None:
        if name not in self.bucket:
            return self._answer(404, {"error": {"code": 404, "message": f"no such object: {name}"}})
        data, generation, _ = self.bucket.objects[name]
        if not self._may(name, options):
            return self._answer(412, {"error": {"code": 412, "message": "conditions are not met"}})
        if method == "DELETE":
            self.bucket.objects.pop(name, None)
            return self._answer(204, b"")
        if options.get("alt") != "media":
            return self._answer(200, self.bucket.described(name))
        if options.get("ifGenerationNotMatch") == str(generation):
            return self._answer(304, b"")
        headers = {"x-goog-generation": str(generation), "Content-Type": "application/octet-stream"}
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            return self._answer(200, data, headers)
        size = len(data)
        first = int(wanted[1]) if wanted[1] else size - int(wanted[2])
        last = min(int(wanted[2]), size - 1) if wanted[1] and wanted[2] else size - 1
        if first >= size:
            return self._answer(416, b"")
        headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        return self._answer(206, data[first : last + 1], headers)

    def _may(self, name: str, options: dict) -> bool:
        wanted = options.get("ifGenerationMatch")
        there = self.bucket.objects[name][1] if name in self.bucket else 0
        return wanted is None or int(wanted) == there

    def _upload(self, method: str, name: str, options: dict, body: bytes) -> None:
        kind = options.get("uploadType")
        if method == "PUT" or "upload_id" in options:
            pieces = self.bucket._uploads[options["upload_id"]]
            pieces.append(body)
            if self.headers.get("Content-Range", "*").endswith("/*"):
                done = sum(map(len, pieces[1:]))
                return self._answer(308, b"", {"Range": f"bytes=0-{done - 1}"})
            name, body = pieces[0], b"".join(pieces[1:])
        elif kind == "resumable":
            name = name or json.loads(body)["name"]
            self.bucket._uploads[key := str(len(self.bucket._uploads))] = [name]
            where = f"{self.bucket.url}/upload/storage/v1/b/{BUCKET}/o?upload_id={key}&name={quote(name)}"
            return self._answer(200, b"", {"Location": where})
        elif kind == "multipart":
            kinds = self.headers["Content-Type"]
            boundary = re.search(r"boundary=['\"]?([^'\";]+)", kinds)[1].encode()
            said, content = (part for part in body.split(b"--" + boundary)[1:3])
            name = json.loads(said.partition(b"\n\n")[2] or said.partition(b"\r\n\r\n")[2])["name"]
            body = content.partition(b"\n\n")[2].removesuffix(b"\n")
        if self._is_refused(method, name):
            return None
        if not self._may(name, options):
            return self._answer(412, {"error": {"code": 412, "message": "conditions are not met"}})
        self.bucket.write(name, body)
        return self._answer(200, self.bucket.described(name))

    def _list(self, options: dict) -> None:
        prefix, delimiter = options.get("prefix", ""), options.get("delimiter")
        start, end = options.get("startOffset", ""), options.get("endOffset")
        items, folders = [], {}
        for name in self.bucket.names(prefix):
            if name < start or (end and name >= end) or name not in self.bucket:
                continue
            below = name[len(prefix) :]
            if delimiter and delimiter in below:
                folders[prefix + below.partition(delimiter)[0] + delimiter] = None
            else:
                items.append(self.bucket.described(name))
        self._answer(200, {"kind": "storage#objects", "items": items, "prefixes": list(folders)})

    def _batch(self, body: bytes) -> None:
        """Deletions, many in one request."""
        message = BytesParser().parsebytes(
            b"Content-Type: " + self.headers["Content-Type"].encode() + b"\r\n\r\n" + body
        )
        answers = []
        for part in message.get_payload():
            line = part.get_payload(decode=True).decode().split()
            name = unquote(line[1].partition("/o/")[2])
            self.bucket.requests.append(("DELETE", name))
            found = self.bucket.objects.pop(name, None) is not None
            answers.append(
                f"Content-Type: application/http\r\n\r\nHTTP/1.1 {204 if found else 404} -\r\n\r\n"
            )
        text = "".join(f"--edge\r\n{answer}" for answer in answers) + "--edge--"
        self._answer(200, text.encode(), {"Content-Type": "multipart/mixed; boundary=edge"})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        pieces = []
        while size := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def _answer(self, code: int, content: dict | bytes, headers: dict | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for key, value in ({"Content-Type": "application/json"} | (headers or {})).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextlib.contextmanager
def served():
    """A `Bucket` that answers while it lasts."""
    handler = type("Handler", (Handler,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    handler.bucket = Bucket(f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield handler.bucket
    finally:
        server.shutdown()
        server.server_close()


def wait_for(what, seconds: float = 60.0) -> None:
    """Until `what()` is true."""
    limit = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < limit
        time.sleep(0.05)
