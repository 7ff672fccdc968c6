"""The table of GPUs against the names that drivers give them."""

from __future__ import annotations

import pytest

from trainer import hardware
from trainer.hardware import find, peak_flops


@pytest.mark.parametrize(
    ("device_name", "name", "bf16", "gigabytes"),
    [
        ("NVIDIA H100 80GB HBM3", "H100", 989e12, 80),
        ("NVIDIA H100 PCIe", "H100 PCIe", 756e12, 80),
        ("NVIDIA H100 NVL", "H100 NVL", 835e12, 94),
        ("NVIDIA H200", "H200", 989e12, 141),
        ("NVIDIA H200 NVL", "H200 NVL", 835e12, 141),
        ("NVIDIA H20", "H20", 148e12, 96),
        ("NVIDIA GH200 480GB", "GH200", 989e12, 96),  # the 480 are its CPU's
        ("NVIDIA GH200 144G HBM3e", "GH200 144G", 989e12, 144),
        ("NVIDIA B200", "B200", 2_250e12, 180),
        ("NVIDIA GB200", "GB200", 2_500e12, 186),
        ("NVIDIA A100-SXM4-80GB", "A100", 312e12, 80),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB", 312e12, 40),
        ("NVIDIA A100 80GB PCIe", "A100", 312e12, 80),
        ("NVIDIA A100-PCIE-40GB", "A100 40GB", 312e12, 40),
        ("NVIDIA A10", "A10", 125e12, 24),
        ("NVIDIA L4", "L4", 121e12, 24),
        ("NVIDIA L40S", "L40S", 362e12, 48),
        ("Tesla V100-SXM2-16GB", "V100 16GB", None, 16),
        ("Tesla V100-PCIE-32GB", "V100 PCIe", None, 32),
        ("NVIDIA GeForce RTX 4090", "RTX 4090", 165.2e12, 24),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada", 364e12, 48),
        ("AMD Instinct MI300X", "MI300X", 1_307e12, 192),
    ],
)
def test_a_device_is_known_by_the_name_its_driver_gives(
    device_name: str, name: str, bf16: float | None, gigabytes: float
) -> None:
    gpu = find(device_name)
    assert gpu is not None
    assert (gpu.name, gpu.memory) == (name, gigabytes * 1e9)
    assert peak_flops(device_name, "bf16") == bf16
    assert peak_flops(device_name, "fp32") == gpu.fp32


@pytest.mark.parametrize(
    "device_name",
    [
        "cpu",
        "NVIDIA A10G",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA A100-SXM4-80GB MIG 1g.10gb",
    ],
)
def test_what_shares_a_name_but_not_the_speed_has_no_peak(device_name: str) -> None:
    assert peak_flops(device_name, "bf16") is None


def test_every_gpu_is_found_by_its_own_name() -> None:
    for gpu in hardware.GPUS:
        assert find(gpu.name) is gpu
        assert find(gpu.name.replace(" ", "-").lower()) is gpu
