"""As much of Amazon's S3 as pyarrow asks for, on loopback, in memory."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

DATE = "Mon, 01 Jun 2026 00:00:00 GMT"
ISO = "2026-06-01T00:00:00.123Z"  # in listings; MinIO has fractions there and nowhere else


class S3Server(ThreadingHTTPServer):
    """Objects by "bucket/key"; used in a `with` block."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, bytes] = {}
        self.uploads: dict[str, dict[int, bytes]] = {}
        self.endpoint = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self._thread.join()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def _answer(self, code, body=b"", **headers):
        self.send_response(code)
        headers = {"Content-Length": str(len(body)), **{k.replace("_", "-"): v for k, v in headers.items()}}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _split(self):
        parts = urlsplit(self.path)
        key = unquote(parts.path[1:])
        return key.rstrip("/") if key.count("/") == 1 else key, {
            k: v[0] for k, v in parse_qs(parts.query, True).items()
        }

    def do_HEAD(self):
        key, _ = self._split()
        data = self.server.objects.get(key)
        if "/" not in key:
            self._answer(200)
        elif data is None:
            self._answer(404)
        else:
            self._answer(200, Content_Length=str(len(data)), Last_Modified=DATE, ETag=_etag(data))

    def do_GET(self):
        key, query = self._split()
        if "list-type" in query:
            self._answer(200, self._listing(key, query).encode(), Content_Type="application/xml")
            return
        data = self.server.objects.get(key)
        if data is None:
            self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>", Content_Type="application/xml")
            return
        start, stop = 0, len(data)
        if wanted := self.headers.get("Range"):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(stop, int(last or stop) + 1)
        self._answer(206 if wanted else 200, data[start:stop], Last_Modified=DATE, ETag=_etag(data))

    def _listing(self, bucket, query):
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        keys, folders = [], set()
        for path in sorted(self.server.objects):
            name = path.removeprefix(f"{bucket}/")
            if name == path or not name.startswith(prefix):
                continue
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                folders.add(prefix + rest.split(delimiter)[0] + delimiter)
            else:
                keys.append((name, self.server.objects[path]))
        entries = "".join(
            f"<Contents><Key>{escape(name)}</Key><LastModified>{ISO}</LastModified><ETag>{_etag(data)}</ETag>"
            f"<Size>{len(data)}</Size></Contents>"
            for name, data in keys
        ) + "".join(f"<CommonPrefixes><Prefix>{escape(each)}</Prefix></CommonPrefixes>" for each in sorted(folders))
        count = len(keys) + len(folders)
        head = f"<KeyCount>{count}</KeyCount><IsTruncated>false</IsTruncated>"
        return f"<ListBucketResult>{head}{entries}</ListBucketResult>"

    def _body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = _joined(self.rfile)
            while self.rfile.readline().strip():  # trailers
                pass
        else:
            data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return _joined(BytesIO(data)) if "aws-chunked" in self.headers.get("Content-Encoding", "") else data

    def do_PUT(self):
        key, query = self._split()
        data = self._body()
        if "partNumber" in query:
            self.server.uploads[query["uploadId"]][int(query["partNumber"])] = data
        else:
            self.server.objects[key] = data
        self._answer(200, ETag=_etag(data))

    def do_POST(self):
        key, query = self._split()
        self._body()
        if "uploads" in query:
            number = str(len(self.server.uploads))
            self.server.uploads[number] = {}
            body = f"<InitiateMultipartUploadResult><UploadId>{number}</UploadId></InitiateMultipartUploadResult>"
        else:
            parts = self.server.uploads[query["uploadId"]]
            data = self.server.objects[key] = b"".join(parts[number] for number in sorted(parts))
            body = f"<CompleteMultipartUploadResult><ETag>{_etag(data)}</ETag></CompleteMultipartUploadResult>"
        self._answer(200, body.encode(), Content_Type="application/xml")

    def do_DELETE(self):
        key, _ = self._split()
        self.server.objects.pop(key, None)
        self._answer(204)

    def log_message(self, *_):
        pass


def _joined(file):
    """The chunks of a body, HTTP's or Amazon's, which look alike."""
    found = b""
    while size := int(file.readline().split(b";")[0], 16):
        found += file.read(size)
        file.readline()
    return found


def _etag(data):
    return f'"{hashlib.md5(data).hexdigest()}"'
