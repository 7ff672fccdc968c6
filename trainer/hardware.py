"""What GPUs can do: dense peak FLOP/s by precision, and memory. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One model of GPU. Its name in words is what tells it from the others in the names that drivers give."""

    name: str
    bf16: float | None
    """Dense FLOP/s, summed in fp32: half of what data sheets give with sparsity. None where there is no bf16."""
    fp32: float
    """FLOP/s outside the tensor cores, which is where torch multiplies fp32 unless TF32 is switched on."""
    memory: float
    """Bytes, by the data sheet's decimal gigabytes; a driver reports up to 7 % more."""

    @property
    def words(self) -> frozenset[str]:
        return _words(self.name)

    def peak(self, precision: str) -> float | None:
        """Dense peak FLOP/s in `precision`, bf16 or fp32; None where the GPU does not have it."""
        return {"bf16": self.bf16, "fp32": self.fp32}[precision]


def _gpu(name: str, bf16: float | None, fp32: float, memory: float) -> Gpu:
    """TFLOP/s and GB, as data sheets print them."""
    return Gpu(name, None if bf16 is None else bf16 * 1e12, fp32 * 1e12, memory * 1e9)


# Makers' data sheets. Where the words of several are in a device's name, the first one counts: special ones go first.
GPUS = (
    _gpu("B300", 2_250, 75, 288),
    _gpu("GB200", 2_500, 80, 186),
    _gpu("B200", 2_250, 75, 180),
    _gpu("GH200 144G", 989, 67, 144),
    _gpu("GH200", 989, 67, 96),
    _gpu("H200 NVL", 835, 60, 141),
    _gpu("H200", 989, 67, 141),
    _gpu("H100 NVL", 835, 60, 94),
    _gpu("H100 PCIe", 756, 51, 80),
    _gpu("H100", 989, 67, 80),
    _gpu("H800", 989, 67, 80),
    _gpu("H20", 148, 44, 96),
    _gpu("A100 40GB", 312, 19.5, 40),
    _gpu("A100", 312, 19.5, 80),
    _gpu("A800 40GB", 312, 19.5, 40),
    _gpu("A800", 312, 19.5, 80),
    _gpu("A40", 149.7, 37.4, 48),
    _gpu("A30", 165, 10.3, 24),
    _gpu("A10", 125, 31.2, 24),
    _gpu("L40S", 362, 91.6, 48),
    _gpu("L40", 181, 90.5, 48),
    _gpu("L4", 121, 30.3, 24),
    _gpu("V100 PCIe 16GB", None, 14, 16),
    _gpu("V100 PCIe", None, 14, 32),
    _gpu("V100 16GB", None, 15.7, 16),
    _gpu("V100", None, 15.7, 32),
    _gpu("T4", None, 8.1, 16),
    _gpu("RTX 6000 Ada", 364, 91.1, 48),
    _gpu("RTX A6000", 154.8, 38.7, 48),
    _gpu("RTX 5090", 209.5, 104.8, 32),
    _gpu("RTX 4090", 165.2, 82.6, 24),
    _gpu("RTX 3090", 71, 35.6, 24),
    _gpu("MI325X", 1_307, 163.4, 256),
    _gpu("MI300X", 1_307, 163.4, 192),
    _gpu("MI250X", 191.5, 23.9, 64),  # torch sees each of its two dies as a device
)
OTHERS = frozenset({"laptop", "max", "mig", "d"})
"""Words of devices that share a name with one of these, and not its speed: laptops', parts of a GPU, cut-down ones."""


def find(device_name: str) -> Gpu | None:
    """The GPU that `torch.cuda.get_device_name()` or a user calls so; None for one that is not in the table."""
    words = _words(device_name)
    return next((gpu for gpu in GPUS if gpu.words <= words), None) if not words & OTHERS else None


def peak_flops(device_name: str, precision: str) -> float | None:
    """Dense peak FLOP/s of a device in `precision` (bf16 or fp32); None where it is not known, or not possible."""
    gpu = find(device_name)
    return gpu.peak(precision) if gpu else None


def _words(name: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z0-9]+", name.lower()))
