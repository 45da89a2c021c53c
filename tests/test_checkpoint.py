"""Checkpoints: exact on any mesh, and whatever happens to the process or the files, one is usable."""

import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from helpers import two_processes
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jrlhf import checkpoint
from jrlhf.checkpoint import Checkpointer, load_meta, load_params, save_params
from jrlhf.config import UserError
from jrlhf.types import TrainState

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture
def open_checkpointer(tmp_path):
    """Checkpointer(tmp_path / "checkpoints", ...), its reports in `.reports`, closed at the end."""
    opened = []

    def make(**options):
        reports = []
        checkpointer = Checkpointer(tmp_path / "checkpoints", report=reports.append, **options)
        checkpointer.reports = reports
        opened.append(checkpointer)
        return checkpointer

    yield make
    for checkpointer in opened:
        checkpointer.close()


def mesh(shape):
    return jax.make_mesh(shape, ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


def make_state(step=3, key=None):
    """A state with every kind of leaf; `large` is beyond what is packed."""
    params = {
        "policy": {
            "large": jnp.arange(512 * 256, dtype=jnp.float32).reshape(512, 256) + step,
            "block": {
                "kernel": jnp.arange(64.0).reshape(8, 8) * step,
                "scale": jnp.ones(8, jnp.bfloat16) / 3,
            },
        },
        "critic": {"kernel": jnp.full((8, 1), -0.0)},
    }
    key = jax.random.key(7) if key is None else key
    opt_state = (optax.adam(1e-3).init(params), jnp.zeros((0, 3)))
    return TrainState(jnp.int32(step), params, opt_state, None, key, ())


def raw(tree):
    return jax.tree.map(lambda x: jax.random.key_data(x) if checkpoint._is_key(x) else x, tree)


def assert_same(tree, other):
    """Same structure, types and bits."""
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        assert x.dtype == y.dtype
    for x, y in zip(jax.tree.leaves(raw(tree)), jax.tree.leaves(raw(other)), strict=True):
        assert x.shape == y.shape
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def sharded(state, shape, spec):
    """Template: two-dimensional leaves of even size split by `spec` over a mesh, the rest replicated."""

    def leaf(x):
        split = x.ndim == 2 and all(n and n % 8 == 0 for n in x.shape)
        return jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh(shape), spec if split else P())
        )

    return jax.tree.map(leaf, state)


@pytest.mark.parametrize("key", [jax.random.key(7), jax.random.key(7, impl="rbg"), jax.random.PRNGKey(7)])
def test_a_state_comes_back_bit_for_bit(open_checkpointer, key):
    checkpointer, state = open_checkpointer(), make_state(key=key)
    assert checkpointer.restore(state) is None
    position = {"epoch": 1, "row": 17, "order": [3, 1, 2], "share": 0.1}
    checkpointer.save(3, state, position, {})
    position["row"] = 99  # the checkpoint keeps what was given
    checkpointer.wait()
    for template in (state, jax.eval_shape(lambda: state)):
        step, restored, where = open_checkpointer().restore(template)
        assert (step, where) == (3, {"epoch": 1, "row": 17, "order": [3, 1, 2], "share": 0.1})
        assert_same(restored, state)


def test_it_moves_to_another_mesh(open_checkpointer):
    state = make_state()
    from_template = sharded(state, (4, 2), P("data", "tensor"))
    placed = jax.tree.map(lambda x, t: jax.device_put(x, t.sharding), state, from_template)
    checkpointer = open_checkpointer()
    checkpointer.save(3, placed, {}, {})
    for shape, spec in (((8, 1), P("data")), ((2, 4), P("tensor", "data")), ((1, 8), P(None, "tensor"))):
        template = sharded(state, shape, spec)
        _, restored, _ = checkpointer.restore(template)
        assert_same(restored, state)
        for x, t in zip(jax.tree.leaves(restored), jax.tree.leaves(template), strict=True):
            assert x.sharding == t.sharding


def test_buffers_may_be_donated_right_after_save(open_checkpointer):
    """The next steps overwrite the state's buffers while the checkpoint is still being written."""
    train = jax.jit(lambda s: jax.tree.map(lambda x: x * 3 + 1, s), donate_argnums=0)
    checkpointer = open_checkpointer(keep_last=5)
    state = {"large": jnp.ones((512, 512)), "small": jnp.ones((16, 16))}
    expected = {}
    for step in range(1, 6):
        state = train(state)
        expected[step] = jax.tree.map(lambda x: np.array(x[0, 0]), state)
        checkpointer.save(step, state, {}, {})
        for _ in range(3):
            state = train(state)
    for step, value in expected.items():
        _, restored, _ = checkpointer.restore(state, step)
        for name in value:
            np.testing.assert_array_equal(restored[name], value[name])


def test_save_returns_before_the_checkpoint_is_there(open_checkpointer, monkeypatch):
    rename = os.rename

    def slow(*args):
        time.sleep(0.5)
        rename(*args)

    monkeypatch.setattr(os, "rename", slow)
    checkpointer = open_checkpointer()
    checkpointer.save(1, make_state(), {}, {})
    assert checkpointer.steps() == []
    checkpointer.wait()
    assert checkpointer.steps() == [1]


def test_the_last_ones_and_the_best_are_kept(open_checkpointer):
    state = {"w": jnp.ones(3)}
    scores = {1: float("nan"), 2: 0.9, 3: 0.3, 4: float("inf"), 5: 0.2, 6: 0.4}
    checkpointer = open_checkpointer(keep_last=2, best="eval/gold/mean")
    for step, score in scores.items():
        checkpointer.save(step, state, {}, {"eval/gold/mean": jnp.float32(score)})
    assert checkpointer.best_step() == 2
    assert checkpointer.steps() == [2, 5, 6]
    checkpointer.save(7, state, {}, {})  # without the metric
    again = open_checkpointer(keep_last=2, best="eval/gold/mean", best_mode="min")
    checkpointer.wait()
    assert checkpointer.steps() == [2, 6, 7]
    assert again.best_step() == 6
    assert again.restore(state, step=2)[0] == 2
    assert not list(checkpointer.folder.glob("deleting-*"))


def test_a_step_is_saved_once_and_never_before_a_newer_one(open_checkpointer):
    state = {"w": jnp.ones(3)}
    checkpointer = open_checkpointer()
    checkpointer.save(5, state, {}, {})
    checkpointer.save(5, state, {}, {})
    assert checkpointer.steps() == [5]
    for step in (4, 5):
        with pytest.raises(UserError, match="already holds a checkpoint of step 5"):
            open_checkpointer().save(step, state, {}, {})  # a new run that has not resumed


# ---------------------------------------------------------------------------------- damage and mismatch


def truncate(path):
    os.truncate(path, path.stat().st_size - 1)


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def remove(path):
    path.unlink()


def largest(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, remove])
@pytest.mark.parametrize("which", ["data", "manifest"])
def test_a_damaged_checkpoint_is_reported_set_aside_and_passed_over(open_checkpointer, damage, which):
    checkpointer = open_checkpointer()
    for step in (1, 2):
        checkpointer.save(step, make_state(step), {"row": step}, {})
    checkpointer.wait()
    newest = checkpointer.folder / "step-00000002"
    damage(newest / "manifest.json" if which == "manifest" else largest(newest / "state"))
    resumed = open_checkpointer()
    step, state, position = resumed.restore(make_state())
    assert (step, position) == (1, {"row": 1})
    assert_same(state, make_state(1))
    (report,) = resumed.reports
    assert "step-00000002 is damaged" in report
    assert (checkpointer.folder / "damaged-step-00000002").is_dir()
    resumed.save(2, make_state(2), {}, {})  # its step is free again
    assert resumed.restore(make_state())[0] == 2


def test_any_flipped_bit_is_found(open_checkpointer):
    checkpointer = open_checkpointer()
    checkpointer.save(1, {"w": jnp.ones(3)}, {}, {})
    checkpointer.wait()
    path = checkpointer.folder / "step-00000001"
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        whole = file.read_bytes()
        flip_a_bit(file)
        with pytest.raises(checkpoint._Damaged):
            checkpoint._verify(path)
        file.write_bytes(whole)
    manifest = path / "manifest.json"
    whole = manifest.read_bytes()
    for at in range(0, len(whole), 5):  # a flip in a number leaves JSON that reads well and is wrong
        manifest.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(checkpoint._Damaged):
            checkpoint._verify(path)
    manifest.write_bytes(whole)
    checkpoint._verify(path)


def test_none_is_restored_when_all_are_damaged_and_it_is_said(open_checkpointer):
    checkpointer = open_checkpointer()
    checkpointer.save(1, {"w": jnp.ones(3)}, {}, {})
    checkpointer.wait()
    remove(checkpointer.folder / "step-00000001" / "manifest.json")
    assert checkpointer.restore({"w": jnp.ones(3)}) is None
    assert "No intact checkpoint is left" in checkpointer.reports[-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: {**p, "b": jnp.ones(2)}, r"params/b is not in it \(this run expects float32\[2\]\)"),
        (lambda p: {"a": p["a"]}, r"it holds params/c int32\[1\], which this run does not have"),
        (lambda p: {**p, "a": jnp.ones((2, 4))}, r"params/a is float32\[2, 3\] in it and float32\[2, 4\]"),
        (lambda p: {**p, "a": p["a"].astype(jnp.bfloat16)}, "params/a is float32.* and bfloat16"),
    ],
)
def test_a_mismatch_names_the_first_leaf(open_checkpointer, change, message):
    params = {"a": jnp.ones((2, 3)), "c": jnp.ones(1, jnp.int32)}
    state = TrainState(jnp.int32(1), params, (), None, jax.random.key(0))
    checkpointer = open_checkpointer()
    checkpointer.save(1, state, {}, {})
    with pytest.raises(UserError, match=message):
        checkpointer.restore(state._replace(params=change(params)))
    with pytest.raises(UserError, match="key is key<fry>"):
        checkpointer.restore(state._replace(key=jax.random.PRNGKey(0)))
    assert checkpointer.steps() == [1]  # it is not damaged


def test_a_full_disk_is_a_user_error_at_the_next_call(open_checkpointer, monkeypatch):
    state = {"w": jnp.ones(3)}
    checkpointer = open_checkpointer()
    checkpointer.save(1, state, {}, {})
    checkpointer.wait()

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_write_manifest", full)
        checkpointer.save(2, state, {}, {})
        with pytest.raises(UserError, match=f"disk is full.*{checkpointer.folder}"):
            checkpointer.wait()
    assert not list(checkpointer.folder.glob("saving-*"))  # gives the space back
    assert checkpointer.restore(state)[0] == 1
    checkpointer.save(2, state, {}, {})
    assert checkpointer.restore(state)[0] == 2


def test_another_error_in_the_background_is_raised_once_at_the_next_save(open_checkpointer, monkeypatch):
    state = {"w": jnp.ones(3)}
    checkpointer = open_checkpointer()

    def broken(*args):
        raise RuntimeError("no such luck")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_checksums", broken)
        checkpointer.save(1, state, {}, {})
        with pytest.raises(RuntimeError, match="no such luck"):
            checkpointer.save(2, state, {}, {})
    checkpointer.save(2, state, {}, {})
    checkpointer.wait()
    assert checkpointer.steps() == [2]


# --------------------------------------------------------------------------------------------- SIGKILL

_SAVE_IN_A_LOOP = """
import sys
import jax, jax.numpy as jnp
from jrlhf.checkpoint import Checkpointer
def state(step):
    return {"large": jnp.full((300, 300), float(step)), "small": jnp.full(7, step),
            "key": jax.random.key(step)}
checkpointer = Checkpointer(sys.argv[1], best="score")
found = checkpointer.restore(state(0))
step = found[0] if found else 0
while True:
    step += 1
    checkpointer.save(step, state(step), {"row": step}, {"score": -step})
    print(step - 1, flush=True)  # committed: `save` has waited for it
"""


def test_sigkill_at_any_moment_leaves_a_usable_checkpoint(tmp_path):
    """A real process that does nothing but save is killed at random moments; each successor resumes."""
    moments = random.Random(0)
    command = [sys.executable, "-c", _SAVE_IN_A_LOOP, str(tmp_path)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    restored = 0
    for _ in range(4):
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        committed = int(process.stdout.readline())
        assert committed == restored, "the process did not resume from the newest checkpoint"
        time.sleep(moments.uniform(0.05, 0.4))
        process.send_signal(signal.SIGKILL)
        output, errors = process.communicate()
        committed = int(([committed, *output.split()])[-1])
        assert process.returncode == -signal.SIGKILL, errors

        reports = []
        checkpointer = Checkpointer(tmp_path, report=reports.append)
        template = {
            "large": jnp.zeros((300, 300)),
            "small": jnp.zeros(7, jnp.int32),
            "key": jax.random.key(0),
        }
        found = checkpointer.restore(template)
        checkpointer.close()
        restored = found[0] if found else 0
        assert reports == []  # an unfinished checkpoint is not a damaged one
        assert restored >= committed
        if found:
            _, state, position = found
            assert position == {"row": restored}
            np.testing.assert_array_equal(state["large"], float(restored))
            np.testing.assert_array_equal(state["small"], restored)
            assert jax.random.key_data(state["key"])[1] == restored
    assert restored > 4


def test_leftovers_of_a_killed_run_are_removed_and_reported(open_checkpointer):
    checkpointer = open_checkpointer()
    for name in ("saving-step-00000004", "deleting-step-00000001"):
        (checkpointer.folder / name / "state").mkdir(parents=True)
    state = {"w": jnp.ones(3)}
    assert checkpointer.restore(state) is None
    checkpointer.save(4, state, {}, {})
    checkpointer.wait()
    assert [p.name for p in checkpointer.folder.iterdir()] == ["step-00000004"]
    (report,) = checkpointer.reports
    assert "saving-step-00000004" in report


# ---------------------------------------------------------------------------------------------- two processes

_ONE_OF_TWO = """
import sys
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from jax.experimental import multihost_utils
from jrlhf.checkpoint import Checkpointer, load_params, save_params
process, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize("localhost:" + port, 2, process)
mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
def put(x, *spec):
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, P(*spec)), lambda index: x[index])
def state(step):
    key = jax.jit(lambda: jax.random.key(step), out_shardings=NamedSharding(mesh, P()))
    split = np.arange(512 * 512, dtype=np.float32).reshape(512, 512) * step
    return {"large": put(split, "data"), "small": put(split[:8], "data"), "scalar": put(np.float32(step)),
            "key": key()}
def check(tree, step):
    for name, x in state(step).items():
        y = tree[name]
        assert y.sharding == x.sharding
        if name == "key":
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        for a, b in zip(x.addressable_shards, y.addressable_shards, strict=True):
            np.testing.assert_array_equal(a.data, b.data)
checkpointer = Checkpointer(folder)
for step in (1, 2):
    checkpointer.save(step, state(step), {"row": step}, {})
checkpointer.close()
multihost_utils.sync_global_devices("saved")
if process == 0:
    files = [p for p in (checkpointer.folder / "step-00000002").rglob("*") if p.is_file()]
    largest = max(files, key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
multihost_utils.sync_global_devices("damaged")
reports = []
checkpointer = Checkpointer(folder, report=reports.append)
step, restored, position = checkpointer.restore(state(0))
checkpointer.close()
assert (step, position) == (1, {"row": 1})
assert len(reports) == (1 if process == 0 else 0)
check(restored, 1)
model = {name: x for name, x in state(3).items() if name != "key"}
save_params(folder + "/model", model, {})
check({**load_params(folder + "/model", model)[0], "key": state(3)["key"]}, 3)
"""


def test_two_processes_save_their_shards_and_agree_on_what_to_restore(tmp_path):
    two_processes(_ONE_OF_TWO, str(tmp_path))


# ---------------------------------------------------------------------------------------- finished models


def test_a_model_comes_back_with_and_without_a_template(tmp_path):
    params, meta = make_state().params, {"config": {"d_model": 8}, "head": "lm", "reward_mean": 0.1}
    save_params(tmp_path / "model", params, meta)
    assert load_meta(tmp_path / "model") == meta
    loaded, again = load_params(tmp_path / "model")
    assert again == meta
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(loaded))
    assert_same(loaded, params)
    template = sharded(params, (4, 2), P("data", "tensor"))
    loaded, _ = load_params(tmp_path / "model", template)
    assert_same(loaded, params)
    assert loaded["policy"]["large"].sharding == template["policy"]["large"].sharding


def test_a_model_is_a_plain_orbax_tree(tmp_path):
    params = make_state().params
    save_params(tmp_path / "model", params, {})
    with ocp.StandardCheckpointer() as reader:
        assert_same(reader.restore(tmp_path / "model" / "params", jax.eval_shape(lambda: params)), params)


def test_a_model_replaces_an_older_one(tmp_path):
    for value in (1.0, 2.0):
        save_params(tmp_path / "model", {"w": jnp.full(3, value)}, {"value": value})
    assert load_meta(tmp_path / "model") == {"value": 2.0}
    np.testing.assert_array_equal(load_params(tmp_path / "model")[0]["w"], 2.0)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_model_that_could_not_be_finished_is_not_there(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "_write_manifest", full)
    with pytest.raises(UserError, match="disk is full"):
        save_params(tmp_path / "model", {"w": jnp.ones(3)}, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, remove])
def test_a_damaged_model_is_a_user_error(tmp_path, damage):
    save_params(tmp_path / "model", make_state().params, {})
    damage(largest(tmp_path / "model"))
    with pytest.raises(UserError, match=r"model in .* is damaged"):
        load_params(tmp_path / "model")


def test_a_wrong_or_missing_model_is_a_user_error(tmp_path):
    save_params(tmp_path / "model", {"w": jnp.ones(3)}, {})
    with pytest.raises(UserError, match=r"w is float32\[3\] in it and float32\[4\]"):
        load_params(tmp_path / "model", {"w": jnp.ones(4)})
    for read in (load_meta, load_params):
        with pytest.raises(UserError, match=r"model\.json is missing"):
            read(tmp_path / "modle")


# ------------------------------------------------------------------------------------------------ the rest


def test_many_small_leaves_are_one_array_on_disk(open_checkpointer):
    """Orbax spends a millisecond on each leaf: the 200 of a tiny model must not cost 0.2 s."""
    checkpointer = open_checkpointer()
    state = {f"layer{n}": {"kernel": jnp.ones((32, 32)), "bias": jnp.ones(32)} for n in range(100)}
    checkpointer.save(1, state, {}, {})
    assert_same(checkpointer.restore(state)[1], state)
    with ocp.PyTreeCheckpointer() as reader:
        metadata = reader.metadata(checkpointer.folder / "step-00000001" / "state")
    assert list(metadata.item_metadata) == ["packed"]


def test_bad_options_are_user_errors(tmp_path):
    for options, message in (
        ({"keep_last": 0}, "keep_last is 0"),
        ({"best": "rm/acc", "best_mode": "most"}, "use 'max' or 'min'"),
    ):
        with pytest.raises(UserError, match=message):
            Checkpointer(tmp_path, **options)
    with pytest.raises(UserError, match=r"give the bucket as the folder of runs \(--runs-dir"):
        Checkpointer("gs://bucket/run")


def test_orbax_is_quiet(tmp_path):
    code = """
import sys, jax.numpy as jnp, absl.logging
from jrlhf.checkpoint import Checkpointer, save_params
absl.logging.set_verbosity(absl.logging.INFO)
checkpointer = Checkpointer(sys.argv[1] + "/run")
checkpointer.save(1, {"w": jnp.ones(3)}, {}, {})
checkpointer.restore({"w": jnp.ones(3)})
checkpointer.close()
save_params(sys.argv[1] + "/model", {"w": jnp.ones(3)}, {})
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=REPOSITORY,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
