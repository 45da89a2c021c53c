"""Checkpoints: written by Orbax in the background, committed at once, verified before they are used.

A checkpoint of step 12 is a folder

    step-00000012/
        state/          what Orbax wrote: the large leaves, and one byte array `packed` of the small ones
        manifest.json   step, data position, metrics; name, shape and type of each leaf; crc32 of each file

It is written as `saving-step-00000012`. The manifest comes last, and the rename to `step-…` is the commit: a
process killed at any moment leaves either the previous checkpoint or the new one. Leaves go by their names
(`params/policy/embed`), and the mesh is no part of a checkpoint, so it is restored onto any sharding.

The folder is one that every process sees, or stands for a place in a bucket (`jrlhf.remote`). There nothing can be
renamed: a checkpoint is written where it will stay, the manifest alone is the commit, and the checksums are those that
the bucket keeps of its objects.
"""

import errno
import functools
import json
import logging
import math
import os
import re
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from jrlhf import remote
from jrlhf.config import UserError

# Orbax spends about a millisecond of CPU on each leaf, whatever its size: the hundred small leaves of a tiny
# model would cost more than its train step. Leaves below this many bytes are saved as one array instead.
_SMALL = 256 * 1024
_PACKED = "packed"


# - a training run


class Checkpointer:
    """The checkpoints of one stage, in `folder`.

    Args:
      folder: where they live; made when the first one is saved.
      keep_last: how many of the newest are kept, at least 1. Older ones are deleted after a commit.
      best: name of a metric; the checkpoint at which it was best is kept as well. "" keeps no such one.
      best_mode: whether the best is the "max" or the "min". A checkpoint without the metric, or with a value
        that is not finite, is never the best.
      report: called with a line of text when a damaged or unfinished checkpoint is met; stderr by default.

    In a run of several processes, every process calls every method. A folder in a bucket must lie in its stage's, whose
    other files go up before a checkpoint is committed.
    """

    def __init__(
        self,
        folder: str | Path,
        keep_last: int = 2,
        best: str = "",
        best_mode: Literal["max", "min"] = "max",
        report: Callable[[str], None] | None = None,
    ):
        if keep_last < 1:
            raise UserError(f"keep_last is {keep_last}: at least 1 checkpoint must be kept")
        if best_mode not in ("max", "min"):
            raise UserError(f"best_mode is {best_mode!r}: use 'max' or 'min'")
        self.folder = _local_path(folder)
        place = remote.bucket_path(self.folder)
        self._store = _OnDisk(self.folder) if place is None else _InBucket(place, self.folder.parent)
        self.keep_last = keep_last
        self.best = best
        self.best_mode = best_mode
        self._report = report or (lambda line: print(line, file=sys.stderr))
        ocp = _orbax()
        self._orbax = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True))
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future | None = None
        self._known_step: int | None = None  # the newest step that this object has saved or restored

    def save(self, step: int, state: Any, position: Mapping, metrics: Mapping[str, Any]) -> None:
        """Starts to save `state`; returns once its values are held on the host.

        The buffers of `state` may be donated right afterwards. An earlier save still under way is waited
        for, and its error is raised here. A step just saved or restored is not written a second time.

        Args:
          step: number of finished train steps.
          state: pytree of `jax.Array`, typed random keys included; None and empty nodes are fine.
          position: the data position, any JSON.
          metrics: scalars to keep with the checkpoint; `best` is looked up among them.

        Raises:
          UserError: the disk is full, or the folder holds a newer checkpoint than `step`.
        """
        self.wait()
        if _from_first_process(lambda: self._is_saved(step)):
            return
        header = {
            "step": step,
            "position": json.loads(json.dumps(position)),  # a snapshot: the caller's dict goes on changing
            "metrics": {name: float(value) for name, value in metrics.items()},
        }
        with _full_disk_is_a_user_error(self.folder):
            if jax.process_index() == 0:
                self._store.clear(self._report)
            leaves, large, packed = _split(state)
            saving = self._store.saving(step)
            self._orbax.save(saving / "state", args=_orbax().args.PyTreeSave({**large, _PACKED: packed}))
        self._known_step = step
        self._pending = self._executor.submit(self._commit, {**header, "leaves": leaves})

    def restore(self, template: Any, step: int | None = None) -> tuple[int, Any, dict] | None:
        """The newest intact checkpoint, placed as `template` says.

        A damaged checkpoint is reported, renamed `damaged-…` (in a bucket its manifest is, to `damaged.json`) and
        passed over for the one before it.

        Args:
          template: pytree of `jax.ShapeDtypeStruct` with a sharding, or of arrays. The mesh need not be that
            of the run that saved. A leaf without a sharding goes to the first local device.
          step: take this checkpoint and no other (`best_step()`, say).

        Returns:
          (step, state, position), or None where there is no checkpoint.

        Raises:
          UserError: the checkpoint's tree, shapes or types are not those of `template`; or `step` is not
            there or damaged.
        """
        self.wait()
        found = _from_first_process(lambda: self._newest_intact(step))
        if found is None:
            return None
        path = self._store.at(found)
        manifest = _read_manifest(path / "manifest.json")
        state = _load_state(path, manifest["leaves"], template, self._orbax)
        self._known_step = found
        return found, state, manifest["position"]

    def steps(self) -> list[int]:
        """Steps of the committed checkpoints, ascending."""
        return self._store.steps()

    def best_step(self) -> int | None:
        """The step at which the metric `best` was best (the later one of equals); None where none has it."""
        self.wait()
        return self._best_of(self.steps())

    def wait(self) -> None:
        """Blocks until the save under way, if any, is committed; raises its error."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        with _full_disk_is_a_user_error(self.folder):
            pending.result()

    def close(self) -> None:
        """Waits for the save under way and releases the threads."""
        try:
            self.wait()
        finally:
            self._executor.shutdown()
            self._orbax.close()

    def _commit(self, manifest: dict) -> None:
        """Runs in the background: after Orbax's last byte the manifest, the commit, the old ones' removal."""
        try:
            self._orbax.wait_until_finished()
            if jax.process_index() != 0:
                return
            self._store.commit(manifest)
        except BaseException:
            self._store.abandon(manifest["step"])  # it can no longer be finished and may fill the disk
            raise
        steps = self.steps()
        for step in set(steps) - {*steps[-self.keep_last :], self._best_of(steps)}:
            self._store.remove(step)

    def _best_of(self, steps: list[int]) -> int | None:
        if not self.best:
            return None
        sign = 1 if self.best_mode == "max" else -1
        scores = []
        for step in steps:
            try:
                manifest = _read_manifest(self._store.at(step) / "manifest.json")
            except _Damaged:
                continue  # `restore` reports it, should it come to that
            value = manifest["metrics"].get(self.best)
            if value is not None and math.isfinite(value):
                scores.append((sign * value, step))
        return max(scores)[1] if scores else None

    def _is_saved(self, step: int) -> bool:
        newest = max(self.steps(), default=-1)
        if step > newest:
            return False
        if step == newest == self._known_step:
            return True
        raise UserError(
            f"{remote.shown(self.folder)} already holds a checkpoint of step {newest}, and step {step} was to be "
            "saved: resume from it, or give this run another folder"
        )

    def _newest_intact(self, wanted: int | None) -> int | None:
        steps = self.steps()
        if wanted is not None and wanted not in steps:
            where = remote.shown(self.folder)
            raise UserError(f"{where} holds no checkpoint of step {wanted}. It holds: {steps}")
        for step in reversed(steps) if wanted is None else [wanted]:
            path = self._store.at(step)
            try:
                _verify(path)
            except _Damaged as damage:
                moved = self._store.set_aside(step)
                self._report(f"The checkpoint {path} is damaged ({damage}); renamed to {moved}.")
                if wanted is not None:
                    raise UserError(f"the checkpoint {path} is damaged: {damage}") from damage
            else:
                return step
        if steps:
            self._report(f"No intact checkpoint is left in {remote.shown(self.folder)}.")
        return None


class _OnDisk:
    """Checkpoints in a folder of a file system."""

    def __init__(self, folder: Path):
        self.folder = folder

    def steps(self) -> list[int]:
        names = (re.fullmatch(r"step-(\d+)", path.name) for path in self.folder.glob("step-*"))
        return sorted(int(name[1]) for name in names if name)

    def at(self, step: int) -> Path:
        return self.folder / _folder_name(step)

    def saving(self, step: int) -> Path:
        """Where it is written until it is committed."""
        return self.folder / f"saving-{_folder_name(step)}"

    def commit(self, manifest: dict) -> None:
        saving = self.saving(manifest["step"])
        _write_manifest(saving / "manifest.json", {**manifest, "files": _checksums(saving)})
        os.rename(saving, self.at(manifest["step"]))
        _sync_folder(self.folder)

    def abandon(self, step: int) -> None:
        shutil.rmtree(self.saving(step), ignore_errors=True)

    def remove(self, step: int) -> None:
        # Renamed first, so that no half-deleted folder ever goes by the name of a checkpoint.
        deleting = self.folder / f"deleting-{_folder_name(step)}"
        os.rename(self.at(step), deleting)
        shutil.rmtree(deleting)

    def set_aside(self, step: int) -> str:
        """Takes a damaged one out of `steps`; returns what it is called now."""
        moved = _free_name(self.folder / f"damaged-{_folder_name(step)}")
        os.rename(self.at(step), moved)
        return moved.name

    def clear(self, report: Callable[[str], None]) -> None:
        """Makes the folder, and removes what killed runs have left in it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.glob("saving-*"):
            report(_UNFINISHED.format(path))
            shutil.rmtree(path)
        for path in self.folder.glob("deleting-*"):
            shutil.rmtree(path)


class _InBucket:
    """Checkpoints in a bucket: one is there if its manifest is.

    Args:
      place: `epath.Path` of the folder.
      stage: the local folder of the stage whose checkpoints they are.
    """

    def __init__(self, place: Any, stage: Path):
        self.place, self.stage = place, stage

    def steps(self) -> list[int]:
        return sorted(step for step, names in self._found().items() if "manifest.json" in names)

    def at(self, step: int) -> Any:
        return self.place / _folder_name(step)

    saving = at

    def commit(self, manifest: dict) -> None:
        remote.push(self.stage)  # metrics of the steps before; and nobody else has taken over
        path = self.at(manifest["step"])
        _write_manifest(path / "manifest.json", {**manifest, "files": _checksums(path)})

    def abandon(self, step: int) -> None:
        """It is left: where another start has taken over, it is that one's by now. `clear` removes it."""

    def remove(self, step: int) -> None:
        remote.remove(self.at(step), first=["manifest.json"])

    def set_aside(self, step: int) -> str:
        path = self.at(step)
        (path / "damaged.json").write_bytes((path / "manifest.json").read_bytes())
        (path / "manifest.json").unlink()
        return f"{path.name}/damaged.json"

    def clear(self, report: Callable[[str], None]) -> None:
        for step, names in self._found().items():
            if "manifest.json" not in names:
                if "damaged.json" not in names:
                    report(_UNFINISHED.format(self.at(step)))
                self.remove(step)

    def _found(self) -> dict[int, set[str]]:
        """Names of the objects of each step."""
        found: dict[int, set[str]] = {}
        for name in remote.contents(self.place):
            if match := re.match(r"step-(\d+)/(.+)", name):
                found.setdefault(int(match[1]), set()).add(match[2])
        return found


_UNFINISHED = "Removing {}: its run was stopped before this checkpoint was complete."


# - a finished model


def save_params(folder: str | Path, params: Any, meta: Mapping) -> None:
    """Saves a finished stage's parameters, as the plain nested tree that any Orbax reader understands.

    `folder` gets `params/` and `model.json`; it appears complete or not at all, and replaces an older one. (In a bucket
    an older one is removed first, and `model.json`, which comes last, is the commit.)

    Args:
      params: nested dicts of `jax.Array` (or numpy arrays).
      meta: JSON that `load_meta` returns: the model's config, the kind of head, reward constants, …
    """
    folder = _local_path(folder)
    place = remote.bucket_path(folder)
    saving = folder.with_name(f"saving-{folder.name}") if place is None else place
    first = jax.process_index() == 0
    leaves = {name: _describe(leaf) for name, leaf in _named(params).items()}
    ocp = _orbax()
    with _full_disk_is_a_user_error(folder.parent):
        if first:
            folder.parent.mkdir(parents=True, exist_ok=True)
            _remove(saving)  # of a run that was killed while it saved; in a bucket also the older one
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True)) as orbax:
                orbax.save(saving / "params", args=ocp.args.PyTreeSave(params))
            if first:
                manifest = {"meta": dict(meta), "leaves": leaves, "files": _checksums(saving)}
                _write_manifest(saving / "model.json", manifest)
                if place is None:
                    _replace(folder, saving)
        except BaseException:
            if place is None:
                shutil.rmtree(saving, ignore_errors=True)
            raise
    _from_first_process(lambda: None)  # the other processes return once the folder is there
    remote.pull(folder)


def _replace(folder: Path, by: Path) -> None:
    if folder.exists():
        old = _free_name(folder.with_name(f"deleting-{folder.name}"))
        os.rename(folder, old)
        os.rename(by, folder)
        shutil.rmtree(old)
    else:
        os.rename(by, folder)
    _sync_folder(folder.parent)


def load_params(folder: str | Path, template: Any = None) -> tuple[Any, dict]:
    """Parameters saved by `save_params`, checked against their checksums, and their meta.

    Args:
      template: pytree of `jax.ShapeDtypeStruct` with a sharding, or of arrays: each device reads its shards.
        None gives numpy arrays in nested dicts.

    Raises:
      UserError: there is no model in `folder`, a file is damaged, or `template` does not fit.
    """
    folder = _local_path(folder)
    if not (folder / "model.json").is_file():
        raise UserError(f"there is no model in {remote.shown(folder)}: model.json is missing")

    place = remote.bucket_path(folder) or folder

    def problem() -> str | None:
        try:
            _verify(place, "model.json")
        except _Damaged as damage:
            return str(damage)
        return None

    damage = _from_first_process(problem)
    if damage is not None:
        raise UserError(f"the model in {place} is damaged: {damage}")
    manifest = _read_manifest(place / "model.json")
    ocp = _orbax()
    names = list(manifest["leaves"])
    if template is None:
        restore_args = _nest({name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names})
    else:
        wanted = _named(template)
        _check_fit(folder, manifest["leaves"], wanted)
        restore_args = _nest({name: _array_restore_args(wanted[name]) for name in names})
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True)) as orbax:
        params = orbax.restore(place / "params", args=ocp.args.PyTreeRestore(restore_args=restore_args))
    if template is not None:
        loaded = _named(params)
        params = jax.tree.unflatten(jax.tree.structure(template), [loaded[name] for name in wanted])
    return params, manifest["meta"]


def load_meta(folder: str | Path) -> dict:
    """The `meta` that `save_params` was given; reads no parameters."""
    folder = _local_path(folder)
    if not (folder / "model.json").is_file():
        raise UserError(f"there is no model in {remote.shown(folder)}: model.json is missing")
    try:
        return _read_manifest(folder / "model.json")["meta"]
    except _Damaged as damage:
        raise UserError(f"the model in {folder} is damaged: {damage}") from damage


# - leaves


def _named(tree: Any) -> dict[str, Any]:
    """Leaves by name, in the tree's order: {"params/policy/embed": leaf, ...}."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    if len(named) != len(leaves):
        raise ValueError("two leaves have the same name: a key of the tree contains '/'")
    return named


def _nest(named: Mapping[str, Any]) -> dict:
    tree: dict = {}
    for name, leaf in named.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _describe(leaf: Any) -> dict:
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}  # of typed keys "key<fry>", "key<rbg>", ...


def _split(state: Any) -> tuple[dict[str, dict], dict[str, jax.Array], np.ndarray]:
    """(description of every leaf, the large leaves, the bytes of the small ones)."""
    named = _named(state)
    leaves = {name: _describe(leaf) for name, leaf in named.items()}
    # A leaf of which this process sees only a part is left to Orbax, however small.
    small = {
        name: jax.random.key_data(leaf) if _is_key(leaf) else leaf
        for name, leaf in named.items()
        if (_is_key(leaf) or leaf.nbytes < _SMALL) and (leaf.is_fully_addressable or leaf.is_fully_replicated)
    }
    chunks, offset = [], 0
    for name, value in jax.device_get(small).items():
        chunks.append(np.frombuffer(np.ascontiguousarray(value).tobytes(), np.uint8))
        leaves[name]["packed"] = offset
        if _is_key(named[name]):
            leaves[name]["key_impl"] = str(jax.random.key_impl(named[name]))
        offset += chunks[-1].size
    large = {name: leaf for name, leaf in named.items() if name not in small}
    return leaves, large, np.concatenate([*chunks, np.zeros(1, np.uint8)])  # never empty: Orbax refuses that


def _load_state(path: Path, leaves: dict[str, dict], template: Any, orbax: Any) -> Any:
    wanted = _named(template)
    _check_fit(path, leaves, wanted)
    ocp = _orbax()
    restore_args = {n: _array_restore_args(wanted[n]) for n, info in leaves.items() if "packed" not in info}
    restore_args[_PACKED] = ocp.RestoreArgs(restore_type=np.ndarray)
    loaded = orbax.restore(path / "state", args=ocp.args.PyTreeRestore(restore_args=restore_args))
    packed = loaded.pop(_PACKED)
    for name, info in leaves.items():
        if "packed" in info:
            loaded[name] = _unpack(packed, info, wanted[name])
    return jax.tree.unflatten(jax.tree.structure(template), [loaded[name] for name in wanted])


def _unpack(packed: np.ndarray, info: dict, like: Any) -> jax.Array:
    data = jax.ShapeDtypeStruct(like.shape, like.dtype)
    if _is_key(like):
        data = jax.eval_shape(jax.random.key_data, data)
    start, size = info["packed"], math.prod(data.shape) * np.dtype(data.dtype).itemsize
    values = packed[start : start + size].view(data.dtype).reshape(data.shape)
    if _is_key(like):
        # Under jit, because keys cannot be put onto devices of other processes.
        wrap = jax.jit(
            functools.partial(jax.random.wrap_key_data, impl=info["key_impl"]), out_shardings=_sharding(like)
        )
        return wrap(values)
    return jax.make_array_from_callback(data.shape, _sharding(like), lambda index: values[index])


def _sharding(leaf: Any) -> jax.sharding.Sharding:
    sharding = getattr(leaf, "sharding", None)
    return sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def _array_restore_args(leaf: Any) -> Any:
    return _orbax().ArrayRestoreArgs(
        sharding=_sharding(leaf), global_shape=tuple(leaf.shape), dtype=np.dtype(leaf.dtype)
    )


def _check_fit(path: Path, leaves: dict[str, dict], wanted: dict[str, Any]) -> None:
    """Raises a UserError that names the first leaf in which the saved tree and the wanted one differ."""

    def text(leaf: dict) -> str:
        return f"{leaf['dtype']}{leaf['shape']}"

    for name in [*wanted, *leaves]:
        if name not in leaves:
            problem = f"{name} is not in it (this run expects {text(_describe(wanted[name]))})"
        elif name not in wanted:
            problem = f"it holds {name} {text(leaves[name])}, which this run does not have"
        elif text(leaves[name]) != text(_describe(wanted[name])):
            problem = f"{name} is {text(leaves[name])} in it and {text(_describe(wanted[name]))} in this run"
        else:
            continue
        raise UserError(f"{path} does not fit this run: {problem}. Was it written with another config?")


# - manifests and files


class _Damaged(Exception):
    """What is wrong with a checkpoint's files."""


def _crc(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def _checksums(folder: Any) -> dict[str, list]:
    """{relative path: [bytes, crc32]} of every file; in a bucket with the checksum that it keeps.

    crc32 releases the GIL, so threads share the work."""
    if remote.is_url(folder):
        return remote.sums(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor(8) as pool:
        sums = list(pool.map(_crc, files))
    return {
        str(path.relative_to(folder)): [path.stat().st_size, crc]
        for path, crc in zip(files, sums, strict=True)
    }


def _verify(folder: Any, manifest_name: str = "manifest.json") -> None:
    expected = _read_manifest(folder / manifest_name)["files"]
    found = _checksums(folder)
    for name, (size, crc) in expected.items():
        if name not in found:
            raise _Damaged(f"{name} is missing")
        if found[name][0] != size:
            raise _Damaged(f"{name} has {found[name][0]} bytes instead of {size}")
        if found[name][1] != crc:
            raise _Damaged(f"the checksum of {name} does not match")


def _write_manifest(path: Any, content: dict) -> None:
    content = {"format": 1, **content}
    # The checksum is of the canonical text of the rest, so that people may still read (and jq) the file.
    content["crc32"] = zlib.crc32(json.dumps(content, sort_keys=True).encode())
    if remote.is_url(path):
        path.write_text(json.dumps(content, indent=1))
        return
    with path.open("w") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _read_manifest(path: Any) -> dict:
    try:
        content = json.loads(path.read_bytes())
        crc = content.pop("crc32")
    except FileNotFoundError as e:
        raise _Damaged(f"{path.name} is missing") from e
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise _Damaged(f"{path.name} is not readable JSON") from e
    if crc != zlib.crc32(json.dumps(content, sort_keys=True).encode()):
        raise _Damaged(f"the checksum of {path.name} does not match")
    return content


def _folder_name(step: int) -> str:
    return f"step-{step:08d}"


def _free_name(path: Path) -> Path:
    candidates = (path.with_name(f"{path.name}-{n}") if n > 1 else path for n in range(1, sys.maxsize))
    return next(candidate for candidate in candidates if not candidate.exists())


def _sync_folder(folder: Path) -> None:
    """Makes a rename in `folder` survive a power failure, where the file system knows how."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _remove(folder: Any) -> None:
    """Removes a folder with all in it, if it is there; of a model in a bucket what commits it first."""
    if remote.is_url(folder):
        remote.remove(folder, first=["model.json"])
    elif folder.exists():
        shutil.rmtree(folder)


def _local_path(folder: str | Path) -> Path:
    if remote.is_url(folder):
        raise UserError(f"{folder} is a URL: give the bucket as the folder of runs (--runs-dir {folder})")
    return Path(folder).absolute()


@contextmanager
def _full_disk_is_a_user_error(folder: Path) -> Iterator[None]:
    """Turns "no space left", from the system or from Orbax's storage layer, into a UserError."""
    try:
        yield
    except Exception as error:
        if any(map(_is_full_disk, _causes(error))):
            raise UserError(f"the disk is full: no checkpoint could be written to {folder}") from error
        raise


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_full_disk(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    # The storage layer's errors carry the system's message, and no number.
    return any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT))


# - Orbax and processes


class _NotFromOrbax(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return f"orbax{os.sep}checkpoint" not in record.pathname


_NO_ORBAX_LOGS = _NotFromOrbax()


def _orbax() -> Any:
    """The Orbax module, imported when first needed, without its log lines: what fails is raised anyway."""
    import orbax.checkpoint as ocp

    logging.getLogger("absl").addFilter(_NO_ORBAX_LOGS)  # adding it again changes nothing
    return ocp


def _from_first_process(compute: Callable[[], Any]) -> Any:
    """`compute()` of process 0, given to all processes, so that all take the same checkpoint.

    An error in process 0 is raised in every process.
    """
    if jax.process_count() == 1:
        return compute()
    from jax.experimental import multihost_utils

    answer: dict = {}
    if jax.process_index() == 0:
        try:
            answer = {"value": compute()}
        except UserError as e:
            answer = {"error": str(e)}
    text = np.zeros(65536, np.uint8)
    encoded = json.dumps(answer).encode()
    text[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    answer = json.loads(bytes(multihost_utils.broadcast_one_to_all(text)).rstrip(b"\0"))
    if "error" in answer:
        raise UserError(answer["error"])
    return answer["value"]
