"""Pods to try the scripts on: fake_pod.py."""

import shutil

import pytest
from fake_pod import Pod


@pytest.fixture
def make_pod(tmp_path):
    if shutil.which("bash") is None:
        pytest.skip("tpu_scripts/ are bash scripts, and there is no bash here")
    pods = []

    def make(accelerator: str = "v5e-16") -> Pod:
        pods.append(Pod(tmp_path / f"pod{len(pods)}", accelerator))
        return pods[-1]

    yield make
    for pod in pods:
        pod.end()


@pytest.fixture
def pod(make_pod) -> Pod:
    return make_pod()
