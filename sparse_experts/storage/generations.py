"""Objects of gs:// by their generations: of several writers at once one succeeds."""

import base64
import contextlib
import datetime
import hashlib
from typing import Any

from sparse_experts.storage.address import split
from sparse_experts.storage.requests import NO_ANSWER, ask

Found = tuple[bytes, str, datetime.datetime]


def upload(store: Any, path: str, content: bytes, **conditions: str) -> str:
  """Stores the bytes as they are in one request; returns the generation. OSError if others were stored.

  fsspec's own way sends them in a multipart form, and has one condition: that there is nothing yet.
  """
  _, bucket, key = split(path)
  url = f"{store.base.replace('/storage/v1/', '/upload/storage/v1/')}b/{bucket}/o"
  stored = store.call("POST", url, uploadType="media", name=key, data=content, json_out=True,
                      headers={"Content-Type": "application/octet-stream"}, **conditions)
  sent = base64.b64encode(hashlib.md5(content, usedforsecurity=False).digest()).decode()
  if stored.get("md5Hash", sent) != sent:
    raise OSError(NO_ANSWER, "other bytes were stored than were sent")
  return stored["generation"]


def look(path: str, patience: float | None = None) -> Found | None:
  """(content, generation, when it was written by the store's clock); None if there is none."""
  _, bucket, key = split(path)

  def read(store: Any, _: str) -> Found:
    while True:
      info = store.call("GET", "b/{}/o/{}", bucket, key, json_out=True)
      with contextlib.suppress(FileNotFoundError):  # of that generation: it was written in between
        _, content = store.call("GET", "b/{}/o/{}", bucket, key, alt="media", generation=info["generation"])
        return content, info["generation"], datetime.datetime.fromisoformat(info["updated"])

  try:
    return ask(path, read, patience)
  except FileNotFoundError:
    return None


def put_if(path: str, content: bytes, generation: str, patience: float | None = None) -> str | None:
  """Writes in place of that generation ("0": of nothing); returns the new one, None if it is no longer there.

  None too where it was written and the answer was lost: `look` tells.
  """
  try:
    return ask(path, lambda store, _: upload(store, path, content, ifGenerationMatch=generation), patience)
  except FileExistsError:
    return None


def remove_if(path: str, generation: str) -> None:
  """Removes that generation, unless it is gone."""
  _, bucket, key = split(path)
  with contextlib.suppress(FileNotFoundError, FileExistsError):
    ask(path, lambda store, _: store.call("DELETE", "b/{}/o/{}", bucket, key, ifGenerationMatch=generation))
