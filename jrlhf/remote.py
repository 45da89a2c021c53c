"""Runs in a bucket: `jrlhf run FILE --runs-dir gs://BUCKET/FOLDER`.

Each process works in a folder of its own disk, made anew at every start, in which a file says what place in the bucket
it stands for. Two kinds of files are kept there:

- Large ones, which Orbax writes and all processes write and read straight at their place: what is in a folder
  `step-...` (a checkpoint) or `params` (a model). They are never here.
- All others (records, metrics, samples, tables, tokenizers, TensorBoard files). The stage writes them here; the first
  process copies them up (`push`) each minute, before each checkpoint is committed, and when the stage ends, `done.json`
  last. Every process copies down (`pull`) what there is when a stage begins and after it has ended.

In a bucket one object appears whole or not at all, and nothing can be renamed: what is made of several objects is
committed by the one that is written last (`done.json`, a checkpoint's `manifest.json`, a model's `model.json`).

Of two starts that run the same stage the later one goes on: `claim` notes it in the bucket, and `push`, without which
nothing is committed, is then an error of the earlier one.

Of a folder that stands for no bucket, every function here does nothing.
"""

import base64
import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterable, Iterator
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from jrlhf.config import UserError

EVERY = 60.0  # seconds between two copies of what a running stage has written
DONE = "done.json"

_MARK = ".bucket"  # in the working folder of a process: its place
_OWNER = ".owner"  # in a stage's folder of the bucket: the start that runs it
_LARGE = re.compile(r"(^|/)(step-\d+|params)/")
_PUSHING = threading.Lock()


class _Place(NamedTuple):
    root: Path  # the working folder
    url: str  # what it stands for, without a slash at the end
    start: str  # names this start of this process


# - the working folder


def is_url(name: str | Path) -> bool:
    return "://" in str(name)


def runs_dir(name: str) -> Path | str:
    """A folder of runs as it is given: a path, or the URL of a bucket, which no Path can hold."""
    kind, found, place = name.partition("://")
    return f"{kind}://{place.rstrip('/')}" if found else Path(name)


@contextlib.contextmanager
def working_folder(runs: Path | str, writes: bool = False) -> Iterator[Path]:
    """`runs` itself; for a URL a new folder that stands for it, removed at the end.

    writes: that runs will be written is tried first.

    Raises:
      UserError: no bucket, an unknown kind of URL, a missing package, or no permission.
    """
    if not is_url(runs):
        yield Path(runs)
        return
    url = str(runs)
    _check_url(url)
    _check_access(url, writes)
    root = Path(tempfile.mkdtemp(prefix="jrlhf-"))
    try:
        (root / _MARK).write_text(json.dumps({"url": url, "start": uuid.uuid4().hex}))
        yield root
    finally:
        shutil.rmtree(root)


def url_of(path: Path) -> str | None:
    """The place in the bucket that a path stands for; None of any other path."""
    path = Path(path).absolute()
    place = _place_of(path)
    if place is None:
        return None
    below = path.relative_to(place.root).as_posix()
    return place.url if below == "." else f"{place.url}/{below}"


def shown(path: Path) -> str:
    """A path as people know it."""
    return url_of(path) or str(path)


def bucket_path(path: Path) -> Any:
    """The same place as an `epath.Path`, which Orbax takes; None of a path that stands for no bucket."""
    url = url_of(path)
    if url is None:
        return None
    from etils import epath

    _files()  # before Orbax makes one of its own
    return epath.Path(url)


def _place_of(path: Path) -> _Place | None:
    for folder in (path, *path.parents):
        mark = folder / _MARK
        if mark.is_file():
            return _Place(folder, **json.loads(mark.read_text()))
    return None


# - copying small files


def pull(folder: Path) -> None:
    """Copies down the small files of a folder, where they are not here as they are there."""
    url = url_of(folder)
    if url is not None:
        small = lambda name: not _LARGE.search(name) and not Path(name).name.startswith(".")  # noqa: E731
        _fetch(folder, {name: info for name, info in contents(url).items() if small(name)})


def pull_index(runs: Path) -> None:
    """Copies down what tells which runs there are, and which of their stages are finished."""
    url = url_of(runs)
    if url is None:
        return
    for pattern in ("*/stages.json", "*/config.json", f"stages/*/{DONE}"):
        found = _files().glob(f"{url}/{pattern}", detail=True)
        _fetch(runs, {_below(name, url): info for name, info in found.items()})


def _fetch(folder: Path, files: dict[str, dict]) -> None:
    missing = {name: info for name, info in files.items() if not _is_same(folder / name, info)}
    if not missing:
        return
    here = [folder / name for name in missing]
    for path in here:
        path.parent.mkdir(parents=True, exist_ok=True)
    _files().get([info["name"] for info in missing.values()], [str(path) for path in here])
    for path, info in zip(here, missing.values(), strict=True):
        when = datetime.fromisoformat(info["updated"]).timestamp()  # runs are listed by it
        os.utime(path, (when, when))


def push(folder: Path) -> None:
    """Copies up the small files of a folder, where they are not there as they are here; `done.json` last.

    What is not here any more is left in the bucket. Files that are being written (`.name`, `name.partial`) are passed
    over.

    Raises:
      UserError: another start has claimed the folder.
    """
    place = _place_of(Path(folder).absolute())
    url = url_of(folder)
    if place is None or url is None:
        return
    with _PUSHING:
        there = contents(url)
        if _OWNER in there and _files().cat_file(f"{url}/{_OWNER}").decode() != place.start:
            raise UserError(
                f"{url}: another start of this stage has taken it over; this one ends. One at a time can run a stage "
                "whose runs folder is a bucket."
            )
        changed: dict[str, bytes] = {}
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if path.is_dir() or path.name.startswith(".") or path.suffix == ".partial":
                continue
            with contextlib.suppress(FileNotFoundError):  # removed since it was listed
                data = path.read_bytes()
                if name not in there or not _matches(data, there[name]):
                    changed[f"{url}/{name}"] = data
        last = changed.pop(f"{url}/{DONE}", None)
        if changed:
            _files().pipe(changed)
        if last is not None:
            _files().pipe_file(f"{url}/{DONE}", last)


@contextlib.contextmanager
def kept(folder: Path) -> Iterator[None]:
    """Within it the folder is copied up every now and then, and once more when it is left, however that is."""
    if url_of(folder) is None:
        yield
        return
    over = threading.Event()

    def keep() -> None:
        while not over.wait(EVERY):
            try:
                push(folder)
            except Exception as e:  # what follows will be copied anew, or fail
                print(f"{shown(folder)}: could not be brought up to date: {e}", file=sys.stderr)

    keeper = threading.Thread(target=keep, name="copies to the bucket", daemon=True)
    keeper.start()
    try:
        yield
    finally:
        over.set()
        keeper.join()
        push(folder)


def claim(folder: Path) -> None:
    """This start runs the stage of the folder from now on; another that does so ends when it next copies something."""
    place = _place_of(Path(folder).absolute())
    if place is not None:
        _files().pipe_file(f"{url_of(folder)}/{_OWNER}", place.start.encode())
        push(folder)


# - the bucket itself


def contents(url: Any) -> dict[str, dict]:
    """{name below `url`: what the bucket knows of it} of every object; empty where there is none."""
    found = _files().find(str(url), detail=True)
    return {below: info for name, info in found.items() if (below := _below(name, str(url)))}


def sums(url: Any) -> dict[str, list]:
    """{name: [bytes, checksum]} of every object, as the bucket keeps them: nothing is read."""
    return {name: [info["size"], info["crc32c"]] for name, info in contents(url).items()}


def names(folder: Path) -> set[str]:
    """What the bucket holds in a folder: names of files and of folders."""
    url = url_of(folder)
    return {name.partition("/")[0] for name in contents(url)} - {_OWNER} if url is not None else set()


def remove(url: Any, first: Iterable[str] = ()) -> None:
    """Removes all objects below `url`, those named `first` before the others."""
    here = contents(url)
    before = [name for name in first if name in here]
    for group in (before, [name for name in here if name not in before]):
        if group:
            _files().rm([f"{url}/{name}" for name in group])
    if _files().isdir(str(url)):  # a bucket with a hierarchical namespace has folders without objects
        _files().rm(str(url), recursive=True)


def remove_folder(folder: Path) -> None:
    """Removes what the bucket holds of a folder."""
    url = url_of(folder)
    if url is not None:
        remove(url, first=[DONE])


def move_folder(folder: Path, to: Path) -> None:
    """Moves what the bucket holds of a folder: object by object, `done.json` last there and first gone here."""
    old, new = url_of(folder), url_of(to)
    if old is None:
        return
    held = contents(old)
    for group in ([name for name in held if name != DONE], [name for name in held if name == DONE]):
        if group:
            _files().copy([f"{old}/{name}" for name in group], [f"{new}/{name}" for name in group])
    remove(old, first=[DONE])


def _is_same(path: Path, info: dict) -> bool:
    return path.is_file() and path.stat().st_size == info["size"] and _matches(path.read_bytes(), info)


def _matches(data: bytes, info: dict) -> bool:
    md5 = base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
    return len(data) == info["size"] and md5 == info.get("md5Hash")


def _below(name: str, url: str) -> str:
    """The part of an object's name (`bucket/...`) below a URL; "" of the placeholder of a folder."""
    return name.removeprefix(url.partition("://")[2]).strip("/") if not name.endswith("/") else ""


@cache
def _files() -> Any:
    """The bucket's file system. What others write is seen at once: no listing is kept."""
    try:
        import gcsfs
    except ModuleNotFoundError as e:
        raise UserError("a runs folder gs://... needs gcsfs: pip install 'jrlhf[gcs]'") from e
    import fsspec

    # Orbax makes its own file system, through etils: for both.
    for name in ("gs", "gcs"):
        fsspec.config.conf.setdefault(name, {})["use_listings_cache"] = False
    return gcsfs.GCSFileSystem()


def _check_url(url: str) -> None:
    kind, _, place = url.partition("://")
    if kind != "gs":
        raise UserError(
            f"{url}: runs are kept in a folder or in gs://BUCKET/FOLDER. Mount other storage and give its path."
        )
    if not place or place.startswith("/"):
        raise UserError(f"{url}: names no bucket; write gs://BUCKET/FOLDER")


def _check_access(url: str, writes: bool) -> None:
    """Tries the bucket in the two ways in which it will be used: by gcsfs, and by TensorStore under Orbax."""
    files = _files()
    try:
        if not writes:
            files.ls(url.partition("://")[2].partition("/")[0])
            return
        name = f"{url}/.try-{uuid.uuid4().hex}"
        files.pipe_file(name, b"jrlhf")
        try:
            _read_by_tensorstore(name)
        finally:
            files.rm_file(name)
    except Exception as e:
        verb = "written" if writes else "read"
        said = " ".join(str(e).split())[:300] or type(e).__name__
        raise UserError(
            f"{url} cannot be {verb}: {said}. Does the bucket exist, is this machine logged in (`gcloud auth "
            "application-default login`, or its service account), and may it read, write, list and delete objects "
            "there (the role Storage Object User)?"
        ) from e


def _read_by_tensorstore(url: str) -> None:
    import tensorstore as ts

    bucket, _, name = url.partition("://")[2].partition("/")
    context = {"gcs_request_retries": {"max_retries": 4}}  # by default it tries for minutes
    store = ts.KvStore.open({"driver": "gcs", "bucket": bucket, "context": context}).result()
    if store.read(name).result().value != b"jrlhf":
        raise OSError(f"TensorStore does not find {url}, which gcsfs has written")
