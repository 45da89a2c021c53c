"""On a CPU a process that has called `keep_memory` asks the system for the room of temporaries once."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import jax, jax.numpy as jnp
from jrlhf.experiment import keep_memory

if sys.argv[1] == "keep":
    keep_memory()
x = jnp.ones((4096, 8))
f = jax.jit(lambda x: jnp.sum((x @ x.T) @ x))  # 64 MB in between
for n in range(6):
    if n == 3:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    f(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_used_again():
    def faults(how: str) -> int:
        ran = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
        return int(ran.stdout)

    assert faults("keep") < 500 < 1500 < faults("leave")
