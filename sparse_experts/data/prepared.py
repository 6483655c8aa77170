"""Documents from a TFDS data directory in array_record format, read and prepared without TensorFlow."""

import contextlib
import difflib
import os
import re
import types
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from sparse_experts import storage
from sparse_experts.errors import UserError, nearest


def read(name: str, directory: str) -> tuple[types.SimpleNamespace | list[dict], list[str]]:
  """(documents, domain names) of `NAME[/config][:version]` under `directory` (TFDS's own if empty).

  What lies there is read, with or without the code that wrote it; a data set that TFDS knows, or whose
  builder class is imported, is prepared there first. The text is the feature `text`, or the only text
  feature; the only class label, if there is one, gives the domains. A `validation` split is used as such.
  """
  with _here(name, directory) as directory:
    builder, tfds = _open(name, directory)
    text, label = _features(builder.info.features, name, tfds)
    domains = list(builder.info.features[label].names) if label else []
    parse = lambda i, x: dict(text=x[text], domain=int(x[label]) if label else 0)
    return _parts(builder, name, directory, parse, ("validation", "valid")), domains


@contextlib.contextmanager
def _here(name: str, directory: str) -> Iterator[str]:
  """A folder of this machine with the prepared data of that name; of an address, from the cache."""
  storage.check(directory, f"data.dir='{directory}'")
  if not storage.is_address(directory):
    yield directory
    return
  wanted = re.split("[/:]", name)[0]
  try:
    with storage.cached(f"{directory.rstrip('/')}/{wanted}") as found:
      here = os.path.dirname(found)
      try:
        yield here
      except UserError as e:
        raise UserError(str(e).replace(here, directory)) from None
  except FileNotFoundError:
    raise UserError(f"data.source='tfds:{name}' is not in data.dir='{directory}', which holds no {wanted}; "
                    "prepare it where it can be, as array_record, and copy it there") from None
  except OSError as e:
    raise UserError(f"data.dir='{directory}' cannot be read: {e.strerror}; mend that, or copy it here"
                    ) from None


def read_images(name: str, directory: str) -> tuple[types.SimpleNamespace | list[dict], list[str]]:
  """(images, class names), as `read`; the only image feature and the only class label.

  Images stay the files that they are stored as. A `validation` split is held out, or else `test`.
  """
  with _here(name, directory) as directory:
    builder, tfds = _open(name, directory)
    features = builder.info.features
    named = lambda feature: [k for k, f in features.items() if isinstance(f, feature)]
    image, label = named(tfds.features.Image), named(tfds.features.ClassLabel)
    if len(image) != 1 or len(label) != 1:
      raise UserError(f"data.source='tfds:{name}' has features {sorted(features)}, {len(image)} images and "
                      f"{len(label)} class labels, not one each; write package.module:function to choose")
    if (dtype := features[image[0]].np_dtype) == np.float32:  # stored as PNGs that show something else
      raise UserError(f"data.source='tfds:{name}' has images of {np.dtype(dtype)}, not of whole numbers; "
                      "write package.module:function to say what they show")
    parse = lambda i, x: dict(image=x[image[0]], label=int(x[label[0]]), name=f"number {i}")
    stored = {image[0]: tfds.decode.SkipDecoding()}
    images = _parts(builder, name, directory, parse, ("validation", "valid", "test"), stored)
    return images, list(features[label[0]].names)


def _open(name: str, directory: str):
  """(builder of what is prepared, tfds)."""
  try:
    import tensorflow_datasets as tfds
  except ImportError as e:
    raise UserError(f"data.source='tfds:{name}' needs a package; pip install tensorflow-datasets") from e
  where = os.path.expanduser(directory) or None
  try:
    builder = tfds.builder(name, data_dir=where, file_format="array_record")
  except tfds.core.DatasetNotFoundError as e:
    there = os.listdir(where) if where and os.path.isdir(where) else []
    wanted = name.split("/")[0].split(":")[0]
    hint = _alike(wanted, [*there, *tfds.list_builders(with_community_datasets=False)])
    if not hint:  # TFDS knows too many to list
      hint = nearest(wanted, there) if there else "; set data.dir to a folder with prepared data"
    place = f"data.dir='{directory}'"
    raise UserError(f"data.source='tfds:{name}' is neither in {place} nor known to TFDS{hint}") from e
  except Exception as e:
    raise UserError(_cannot("opened", name, directory, e)) from e
  if not builder.is_prepared():
    tfds.disable_progress_bar()
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    try:
      builder.download_and_prepare(download_config=config, file_format="array_record")
    except Exception as e:
      raise UserError(_cannot("prepared", name, directory, e)) from e
  return builder, tfds


def _alike(wanted: str, known: Sequence[str]) -> str:
  """'; did you mean X?' for a name spelt alike, or those that begin alike; empty if there is none."""
  if close := difflib.get_close_matches(wanted, known, n=1, cutoff=0.75):
    return f"; did you mean '{close[0]}'?"
  begin = sorted({name for name in known if len(wanted) >= 4 and name.startswith(wanted[:4])})[:5]
  return f"; those that begin alike: {', '.join(begin)}; or set data.dir to a folder with it" if begin else ""


def _parts(builder, name: str, directory: str, parse: Callable[[int, dict], dict], held_out: Sequence[str],
           decoders: dict | None = None):
  """The parsed records of `train`, with those of the first of the `held_out` splits that is there."""

  def records(split: str) -> list[dict]:
    try:
      return [parse(i, x) for i, x in enumerate(builder.as_data_source(split, decoders=decoders))]
    except Exception as e:
      raise UserError(_cannot("read", name, directory, e)) from e

  if "train" not in builder.info.splits:
    raise UserError(f"data.source='tfds:{name}' has no 'train' split but {sorted(builder.info.splits)}; "
                    "write package.module:function to choose")
  for valid in held_out:
    if valid in builder.info.splits:
      return types.SimpleNamespace(train=records("train"), valid=records(valid))
  return records("train")


def _features(features, name: str, tfds) -> tuple[str, str | None]:
  texts = [k for k, f in features.items() if isinstance(f, tfds.features.Text)]
  labels = [k for k, f in features.items() if isinstance(f, tfds.features.ClassLabel)]
  if "text" not in texts and len(texts) != 1:
    raise UserError(f"data.source='tfds:{name}' has features {sorted(features)} and no one text; "
                    "write package.module:function to choose")
  return "text" if "text" in texts else texts[0], labels[0] if len(labels) == 1 else None


def _cannot(done: str, name: str, directory: str, e: Exception) -> str:
  """One line on why a data set cannot be opened, prepared or read, and what to install or do."""
  missing = getattr(e, "name", None) if isinstance(e, ImportError) else None
  if missing or "tensorflow" in str(e).lower().replace("tensorflow_datasets", ""):
    missing = (missing or "tensorflow").split(".")[0]
    way_out = (f"pip install {missing}" if missing != "tensorflow" else
               "pip install tensorflow, prepare it once as array_record, then read it without")
  else:
    way_out = "prepare it where it can be, as array_record, and set data.dir to that folder"
  reason = f"it needs '{missing}'" if missing else (str(e).strip().splitlines() or [repr(e)])[0][:120]
  return f"data.source='tfds:{name}' cannot be {done} (data.dir='{directory}'): {reason}; {way_out}"

