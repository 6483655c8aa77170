"""A store of objects over HTTP: gcp-storage-emulator in a process of its own, behind a proxy that does harm.

The proxy adds what the emulator lacks: conditions on generations (412, 304); the last answer to an upload in
parts, again, where it was lost; and rights: bucket `closed` is refused to all. Faults are injected between
client and server, see `Store.harm`.
"""

import contextlib
import http.client
import http.server
import json
import logging
import os
import pathlib
import random
import re
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from typing import ClassVar

import pytest

from sparse_experts import storage

ROOT = pathlib.Path(__file__).parent.parent
FAULTS = ("401", "403", "429", "503", "hang", "half an upload", "half an answer", "no answer", "slow")


class Store:
  """The store's process, for tests: its address, its faults, its objects."""

  def __init__(self):
    self._process = subprocess.Popen(
        [sys.executable, "-m", "tests.store"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True)
    self.url = f"http://localhost:{int(self._process.stdout.readline())}"
    self.env = {"STORAGE_EMULATOR_HOST": self.url, "TENSORSTORE_GCS_HTTP_URL": self.url,
                "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}  # it asks another server, by gRPC

  def harm(self, *faults: dict) -> None:
    """From now on: each {"fault": one of FAULTS} and, if need be, "share" of requests, "times" at most,
    "match" of "METHOD URL"."""
    self._tell("faults", faults)

  @contextlib.contextmanager
  def harmed(self, *faults: dict):
    self.harm(*faults)
    try:
      yield
    finally:
      self.harm()

  def harms(self) -> dict[str, int]:
    """{fault: how many requests it met so far}."""
    return self._tell("count", [])

  def requests(self) -> list[str]:
    """"METHOD URL" of all requests so far."""
    return self._tell("requests", [])

  def _tell(self, what: str, value) -> dict:
    request = urllib.request.Request(f"{self.url}/harm/{what}", json.dumps(value).encode(), method="POST")
    with urllib.request.urlopen(request, timeout=60) as answer:
      return json.load(answer)

  def close(self) -> None:
    self._process.communicate("")


def names(place: str) -> list[str]:
  """Of what is in a folder or at an address; none if it is not there."""
  try:
    return storage.names(place)
  except FileNotFoundError:
    return []


def slow(*faults: str) -> list:
  """Parameters of slow tests: gcsfs waits a second or two before it asks again."""
  return [pytest.param(fault, marks=pytest.mark.slow) for fault in faults]


class _Proxy(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"
  storage, emulator = None, 0  # of the class below
  lock, faults, count, requests = threading.Lock(), [], {}, []
  done: ClassVar[dict] = {}  # id of an upload in parts -> the answer that ended it

  def _handle(self):
    method = self.command
    body = self._body()
    if body is None:  # the client has left
      self.close_connection = True
      return
    if self.path.startswith("/harm/"):
      self._answer(200, json.dumps(self._harm(self.path[6:], json.loads(body))).encode())
      return
    self.requests.append(f"{method} {self.path}")
    fault = self._fault(f"{method} {self.path}")
    if fault in ("401", "403", "429", "503"):
      message = f"made up for a test: {fault}"
      self._answer(int(fault), json.dumps({"error": {"code": int(fault), "message": message}}).encode())
    elif fault == "hang":
      time.sleep(120)
      self.close_connection = True
    elif fault == "half an upload":  # the server has read a part of it when the connection ends
      self.close_connection = True
    elif "/b/closed/" in self.path:
      self._answer(403, b'{"error": {"code": 403, "message": "no rights"}}')
    else:
      if fault == "slow":
        time.sleep(1.0)
      with self.lock:
        status, headers, content = self._ask(method, body)
      if fault == "no answer":
        self.close_connection = True
      else:
        self._answer(status, content, headers, half=fault == "half an answer")

  do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _handle

  def _body(self):
    if self.headers.get("Transfer-Encoding") == "chunked":
      body = b""
      while size := int(self.rfile.readline().strip() or b"0", 16):
        body += self.rfile.read(size)
        self.rfile.readline()
      self.rfile.readline()
      return body
    size = int(self.headers.get("Content-Length") or 0)
    body = self.rfile.read(size)
    return body if len(body) == size else None

  def _harm(self, what, value):
    if what == "faults":
      type(self).faults = value
    return {"faults": None, "count": self.count, "requests": self.requests}[what]

  def _fault(self, request):
    for fault in self.faults:
      if (re.search(fault.get("match", ""), request) and fault.get("times", 1) > 0
          and random.random() < fault.get("share", 1.0)):
        if "times" in fault:
          fault["times"] -= 1
        self.count[fault["fault"]] = self.count.get(fault["fault"], 0) + 1
        return fault["fault"]
    return None

  def _ask(self, method, body):
    """(status, headers, content) of the emulator, or of a condition that does not hold."""
    url = urllib.parse.urlparse(self.path)
    query = {key: values[0] for key, values in urllib.parse.parse_qs(url.query).items()}
    found = re.search(r"/b/([^/]+)/o(?:/([^/]+))?$", url.path)
    bucket, name = (found[1], found[2]) if found else ("", None)
    if found and name is None and method == "POST":
      name = query.get("name") or self._name_in(body)
    generation = self._generation(bucket, urllib.parse.unquote(name)) if name else "0"
    if query.get("ifGenerationMatch", generation) != generation:
      return 412, {}, b'{"error": {"code": 412, "message": "conditionNotMet"}}'
    if query.get("ifGenerationNotMatch") == generation != "0":
      return 304, {}, b""
    if query.get("generation", generation) != generation and method == "GET":
      return 404, {}, b""
    if (upload := query.get("upload_id")) in self.done:
      return self.done[upload]
    connection = http.client.HTTPConnection("localhost", self.emulator, timeout=60)
    headers = {k: v for k, v in self.headers.items()
               if k.lower() not in ("transfer-encoding", "content-length")}
    path = self.path
    if query.get("uploadType") == "media" and not body:  # which the emulator does not survive
      path = path.replace("uploadType=media", "uploadType=multipart")
      headers = {"Host": self.headers["Host"], "Content-Type": "multipart/related; boundary=b"}
      body = (b'--b\r\nContent-Type: application/json\r\n\r\n{"name": %s}\r\n--b\r\n'
              b"Content-Type: application/octet-stream\r\n\r\n\r\n--b--\r\n" % json.dumps(name).encode())
    connection.request(method, path, body, headers | {"Content-Length": str(len(body))})
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    kept = {k: v for k, v in answer.getheaders() if k.lower() not in (
        "content-length", "connection", "server", "date")}
    if query.get("alt") == "media":
      kept["x-goog-generation"] = generation
    if upload and answer.status in (200, 201):
      self.done[upload] = answer.status, kept, content
    return answer.status, kept, content

  def _name_in(self, body):
    found = re.search(rb'"name": ?("(?:[^"\\]|\\.)*")', body[:4096])
    return json.loads(found[1]) if found else None

  def _generation(self, bucket, name):
    from gcp_storage_emulator.exceptions import NotFound

    try:
      return self.storage.get_file_obj(bucket, name)["generation"]
    except (NotFound, KeyError):
      return "0"

  def _answer(self, status, content, headers=(), half=False):
    with contextlib.suppress(OSError):
      self.send_response(status)
      for name, value in dict(headers).items():
        self.send_header(name, value)
      self.send_header("Content-Length", str(len(content)))
      self.end_headers()
      self.wfile.write(content[:len(content) // 2] if half else content)
      self.wfile.flush()
      self.close_connection |= half

  def log_message(self, *_):
    pass


class _Server(http.server.ThreadingHTTPServer):
  daemon_threads, request_queue_size = True, 256

  def handle_error(self, *_):
    pass


def _serve():
  from gcp_storage_emulator import handlers
  from gcp_storage_emulator.server import create_server

  logging.disable(logging.CRITICAL)
  with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
    probe = http.server.HTTPServer(("localhost", 0), http.server.BaseHTTPRequestHandler)
    _Proxy.emulator = probe.server_address[1]
    probe.server_close()
    server = create_server("localhost", _Proxy.emulator, in_memory=True, default_bucket="bucket")
    handlers.buckets.create_bucket("closed", server._storage)
    _Proxy.storage = server._storage
    server.start()
    proxy = _Server(("localhost", 0), _Proxy)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    print(proxy.server_address[1], flush=True)
    sys.stdin.read()  # until whoever started it ends
    os._exit(0)


if __name__ == "__main__":
  _serve()
