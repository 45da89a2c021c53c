"""Strict numerics for every test: no silent promotion, no ignored warning, several devices."""

import gc
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Threads of XLA: with one for each of the eight devices, collectives that wait for one another can take them all.
os.environ.setdefault("PJRT_NPROC", "32")

import jax
import pytest

REPOSITORY = Path(__file__).resolve().parent.parent

# XLA compiles for CPUs five times as fast without its emitters of fused code, where it knows these flags: it ends the
# process at one that it does not. Workers find them set.
QUICK = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
if "XLA_FLAGS" not in os.environ:
    starts = [sys.executable, "-c", "import jax; jax.devices()"]
    if not subprocess.run(starts, env=os.environ | {"XLA_FLAGS": QUICK}, capture_output=True).returncode:
        os.environ["XLA_FLAGS"] = QUICK

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)  # tests compile much and run little
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(REPOSITORY / ".jax_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "error")


@pytest.fixture(scope="module", autouse=True)
def few_memory_maps():
    """Forget compiled programs once there are many: each holds several memory maps, of which Linux allows a process
    65,530. Beyond that the next compilation ends in a segmentation fault."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_text().count("\n") > 15_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def optimised():
    """For tests whose programs run for longer than they compile."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of public sample data: $JRLHF_SHARED_DATA, or shared/data beside the repository."""
    folder = Path(os.environ.get("JRLHF_SHARED_DATA") or REPOSITORY.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no public sample data at {folder}; set JRLHF_SHARED_DATA to its folder")
    return folder
