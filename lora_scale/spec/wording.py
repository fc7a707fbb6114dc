"""How `plan` and `report` write the figures of `spec.cost`: units, and the names of memory categories."""

GIB, MIB = 1 << 30, 1 << 20

STATES = {  # field of states.States: its name in tables
    "base": "base weights, frozen",
    "trained": "weights that train",
    "master": "their fp32 copy",
    "gradients": "their gradients",
    "adam": "Adam's two moments",
    "bucket": "gradient bucket",
}
CATEGORIES = STATES | {  # field of memory.Moment
    "gathered": "gathered parameters and prefetch",
    "layer_inputs": "inputs of recomputed layers",
    "layers_kept": "activations kept",
    "outside": "embedding output, last norm",
    "one_layer": "activations of 1 layer, recomputed",
    "workspace": "workspace of a layer or the step",
    "logits": "logits and loss",
    "libraries": "workspaces of libraries",
}
BESIDE = {  # field of memory.Memory: on the GPU and not allocated by torch
    "context": "CUDA context",
    "nccl": "NCCL",
    "waste": "allocator waste, where there is room",
}
JOBS = {"this_run": "this run", "full_fine_tuning": "full fine-tuning"}
PAPER = ("LoRA paper (2106.09685), quoted, not computed", "1.2 TB", "350 GB", "3.4x")


def binary(nbytes: float) -> str:
    """In GiB, or in MiB or KiB below one: memory and files."""
    if nbytes >= GIB:
        return f"{nbytes / GIB:,.1f} GiB"
    return f"{nbytes / MIB:,.1f} MiB" if nbytes >= MIB else f"{nbytes / 1024:,.1f} KiB"


def decimal(nbytes: float) -> str:
    """In TB, GB, MB or kB, by thousands: as the literature counts, and as disks and networks are sold."""
    unit, name = next(((u, n) for u, n in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")) if nbytes >= u), (1e3, "kB"))
    return f"{nbytes / unit:.1f} {name}"


def gpus(count: int) -> str:
    return "1 GPU" if count == 1 else f"{count:,} GPUs"


def table(lines: list[list[str]], *headers: str) -> str:
    """Plain text: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(headers, *lines, strict=True)]
    rows = [list(headers), ["-" * width for width in widths], *lines]
    return "\n".join(
        "  ".join([cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])]).rstrip() for cells in rows
    )
