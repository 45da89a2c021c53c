"""What accelerators can do, by their makers' documents: of one device as jax counts them.

A TPU v4 or v5p chip is one device; a v7x chip is two, of which each has half. Numbers are those without sparsity.
"""

from typing import NamedTuple

GB, GIB, MIB = 1e9, 2**30, 2**20


class Hardware(NamedTuple):
    name: str
    kinds: tuple[str, ...]  # `jax.Device.device_kind`
    peak_bf16: float  # FLOP/s of bfloat16 products
    peak_f32: float  # of float32 products as jax does them unless told otherwise: in bfloat16 on a TPU, TF32 on a GPU
    hbm_bytes: int  # a process can use a few per cent less
    hbm_bandwidth: float  # bytes/s
    ici_bandwidth: (
        float  # bytes/s that leave a device, all links to its neighbours together: ICI, NVLink, PCIe
    )

    def peak(self, dtype: str) -> float:
        """FLOP/s of products of arrays of this dtype."""
        return {"bfloat16": self.peak_bf16, "float32": self.peak_f32}[dtype]


def _tpu(name: str, kinds: tuple[str, ...], peak: float, gib: int, bandwidth: float, ici: float) -> Hardware:
    return Hardware(name, kinds, peak * 1e12, peak * 1e12, gib * GIB, bandwidth * GB, ici * GB)


def _gpu(
    name: str, kinds: tuple[str, ...], peak: float, tf32: float, mib: int, bandwidth: float, link: float
) -> Hardware:
    return Hardware(name, kinds, peak * 1e12, tf32 * 1e12, mib * MIB, bandwidth * GB, link * GB)


# TPUs: docs.cloud.google.com/tpu/docs (of ICI, which they count in both directions, one half). NVIDIA: data sheets; of
# memory what the driver reports. A GPU that is cut in parts (MIG) has another kind, and is not here.
HARDWARE: dict[str, Hardware] = {
    hardware.name: hardware
    for hardware in (
        _tpu("v4", ("TPU v4",), 275, 32, 1228, 300),
        _tpu("v5e", ("TPU v5 lite", "TPU v5e"), 197, 16, 819, 200),
        _tpu("v5p", ("TPU v5", "TPU v5p"), 459, 95, 2765, 600),
        _tpu("v6e", ("TPU v6 lite", "TPU v6e"), 918, 32, 1640, 400),
        _tpu("v7x", ("TPU7x",), 2307 / 2, 96, 7380 / 2, 300),
        _gpu("a100-40gb", ("NVIDIA A100-SXM4-40GB",), 312, 156, 40960, 1555, 300),
        _gpu("a100-pcie-40gb", ("NVIDIA A100-PCIE-40GB",), 312, 156, 40960, 1555, 32),
        _gpu("a100", ("NVIDIA A100-SXM4-80GB", "NVIDIA A100-SXM-80GB"), 312, 156, 81920, 2039, 300),
        _gpu("a100-pcie", ("NVIDIA A100 80GB PCIe",), 312, 156, 81920, 1935, 32),
        _gpu("h100", ("NVIDIA H100 80GB HBM3",), 989, 494, 81559, 3350, 450),
        _gpu("h100-pcie", ("NVIDIA H100 PCIe",), 756, 378, 81559, 2000, 64),
        _gpu("h100-nvl", ("NVIDIA H100 NVL",), 835, 418, 95830, 3900, 300),
        _gpu("h200", ("NVIDIA H200",), 989, 494, 143771, 4800, 450),
        _gpu("b200", ("NVIDIA B200",), 2250, 1125, 183359, 8000, 900),
        _gpu("gb200", ("NVIDIA GB200",), 2500, 1250, 189471, 8000, 900),
        _gpu("l4", ("NVIDIA L4",), 121, 60, 23034, 300, 32),
        _gpu("l40s", ("NVIDIA L40S",), 362, 183, 46068, 864, 32),
    )
}


def hardware_of(device_kind: str) -> Hardware | None:
    """What a `jax.Device.device_kind` is; None where it is not known (a CPU)."""
    return next((h for h in HARDWARE.values() if device_kind in h.kinds), None)
