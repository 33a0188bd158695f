"""Peak rates of GPUs, for estimates of time and for the share of the peak that a training reaches. No torch here."""

from dataclasses import dataclass

TERA = 1e12


@dataclass(frozen=True)
class Gpu:
    """What the maker states for one GPU, without sparsity.

    Attributes:
        name: the word of `--gpu`.
        device_names: as the driver names it. Other forms of the same chip (PCIe, NVL, a MIG part) have other rates.
        bf16_flops, tf32_flops, fp32_flops: operations per second of products, by the format of their inputs; in float32
            the tensor cores take no part.
        bytes_per_second: bandwidth of the memory.
    """

    name: str
    device_names: tuple[str, ...]
    bf16_flops: float
    tf32_flops: float
    fp32_flops: float
    bytes_per_second: float


# Sources: NVIDIA's data sheets of the H200, H100 and A100 Tensor Core GPUs, the columns SXM, halved where they count
# sparsity. The A800 is an A100 whose links between GPUs are slower (400 instead of 600 GB/s); one GPU is the same.
GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("h200", ("NVIDIA H200",), 989.5 * TERA, 494.7 * TERA, 66.9 * TERA, 4.8 * TERA),
        Gpu("h100", ("NVIDIA H100 80GB HBM3",), 989.5 * TERA, 494.7 * TERA, 66.9 * TERA, 3.35 * TERA),
        Gpu(
            "a800",
            ("NVIDIA A800-SXM4-80GB", "NVIDIA A100-SXM4-80GB"),
            312 * TERA,
            156 * TERA,
            19.5 * TERA,
            2.039 * TERA,
        ),
    )
}
# The GPU of an estimate if the recipe's GPUs are not at hand.
DEFAULT_GPU = "h200"


def known_gpu(device_name: str) -> Gpu | None:
    """The GPU that the driver names so; None if its rates are not in the table."""
    return next((gpu for gpu in GPUS.values() if device_name in gpu.device_names), None)
