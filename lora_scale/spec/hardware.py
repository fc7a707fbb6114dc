"""What a GPU can hold and do, by name. Figures of data sheets and of one torch property: nothing is measured here."""

from dataclasses import dataclass

from lora_scale.spec.errors import UsageError


@dataclass(frozen=True, slots=True)
class Gpu:
    """One kind of GPU."""

    memory_gib: float  # torch's total_memory: what the driver leaves of the printed size
    peak_tflops: float  # dense bf16 with fp32 accumulation, without sparsity, by NVIDIA's data sheet of that board
    memory_bandwidth: float  # bytes a second, data sheet
    link_bandwidth: float  # bytes a second to another GPU of the node, one direction: half of what a sheet prints
    device_names: tuple[str, ...]  # how the driver's name of it begins


# Peaks: data sheets "NVIDIA H200", "NVIDIA H100" (SXM), "NVIDIA A100 80GB" and "NVIDIA L40S"; where a sheet prints the
# figure with sparsity (H200 and H100: 1,979; L40S: 733) half of it. The H200's memory is that of the machines this
# project runs on; the others' are rounded down from what the driver reports, and not read by us.
GPUS = {
    "h200": Gpu(139.0, 989.4, 4.8e12, 450e9, ("NVIDIA H200",)),
    "h100-80": Gpu(79.0, 989.4, 3.35e12, 450e9, ("NVIDIA H100 80GB HBM3",)),
    "a100-80": Gpu(79.0, 312.0, 2.039e12, 300e9, ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB")),
    # no NVLink on the L40S: PCIe 4.0 x16
    "l40s": Gpu(44.0, 362.0, 0.864e12, 32e9, ("NVIDIA L40S",)),
}


def memory_gib(text: str) -> float:
    """GiB of one GPU: of a kind by name, or as the number given."""
    if text in GPUS:
        return GPUS[text].memory_gib
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < float("inf"):
        raise UsageError(f"--gpu is {text!r}; it must be one of {', '.join(GPUS)}, or the GiB of one GPU")
    return value


def peak_tflops(device_name: str) -> float | None:
    """Dense bf16 TFLOP/s of the GPU that the driver calls so; None for one that is not in the table."""
    return next((g.peak_tflops for g in GPUS.values() if device_name.startswith(g.device_names)), None)
