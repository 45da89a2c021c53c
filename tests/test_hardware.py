"""What is known of accelerators."""

import jax

from jrlhf.hardware import HARDWARE, hardware_of


def test_a_kind_is_one_hardware():
    kinds = [kind for hardware in HARDWARE.values() for kind in hardware.kinds]
    assert len(kinds) == len(set(kinds))
    assert hardware_of("TPU v5 lite") is HARDWARE["v5e"]
    assert hardware_of("TPU v5") is HARDWARE["v5p"]
    assert all(name == hardware.name for name, hardware in HARDWARE.items())


def test_what_is_not_known_has_no_numbers():
    assert hardware_of(jax.devices("cpu")[0].device_kind) is None
    assert hardware_of("NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None  # a part of one


def test_units():
    """An accelerator computes hundreds of times while it reads a byte, and a link is slower than its memory."""
    for hardware in HARDWARE.values():
        assert 50 < hardware.peak_bf16 / hardware.hbm_bandwidth < 1000, hardware.name
        assert 2**34 <= hardware.hbm_bytes < 2**38, hardware.name
        assert hardware.ici_bandwidth < hardware.hbm_bandwidth, hardware.name
        assert (
            hardware.peak("float32") == hardware.peak_f32 <= hardware.peak("bfloat16") == hardware.peak_bf16
        )
