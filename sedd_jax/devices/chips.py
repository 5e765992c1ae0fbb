"""Published figures of the chips, of one JAX device each: what a measured or a compiled program is held against. TPUs:
cloud.google.com/tpu/docs, the page of each version ("Peak compute per chip (bf16)", "HBM capacity", "HBM bandwidth" and
"Bidirectional inter-chip interconnect bandwidth per chip", of which half is what a chip can send). JAX sees a TPU7x
chip as two devices, half of it each. GPUs: NVIDIA's data sheets, SXM, not sparse, NVLink one way; A100: of 80 GB."""

from typing import NamedTuple


class Chip(NamedTuple):
    """flops: dense bfloat16, per second. memory: bytes (decimal GB: what a runtime keeps for itself is in the rest).
    memory_bandwidth, link_bandwidth: bytes per second; the latter sent, over all links of the chip together."""

    flops: float
    memory: float
    memory_bandwidth: float
    link_bandwidth: float


# By the beginning of `device_kind`; the longest that fits counts.
CHIPS = {
    "TPU v4": Chip(275e12, 32e9, 1228e9, 300e9),
    "TPU v5 lite": Chip(197e12, 16e9, 819e9, 200e9),
    "TPU v5": Chip(459e12, 95e9, 2765e9, 600e9),
    "TPU v6 lite": Chip(918e12, 32e9, 1638e9, 400e9),
    "TPU7x": Chip(2307e12 / 2, 192e9 / 2, 7380e9 / 2, 600e9 / 2),
    "NVIDIA A100": Chip(312e12, 80e9, 2039e9, 300e9),
    "NVIDIA H100": Chip(989e12, 80e9, 3350e9, 450e9),
    "NVIDIA H200": Chip(989e12, 141e9, 4800e9, 450e9),
}


def of_kind(device_kind: str) -> Chip | None:
    """None for a device that is not in the table, such as a CPU."""
    fitting = [name for name in CHIPS if device_kind.startswith(name)]
    return CHIPS[max(fitting, key=len)] if fitting else None
