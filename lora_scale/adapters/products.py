"""Products of large bf16 matrices on Hopper GPUs, by a kernel of cuBLASLt's that is not its own first choice.

Large products, one after another, keep such a GPU at its power limit: the kernel that needs the least energy is then
the fastest. cuBLAS ranks its kernels as if each ran alone. Those with tiles of 256 x 128, which it proposes too, are
faster than its first choice in the long run (docs/speed.md), and give the same bits. Everywhere else, and for small
products, this is torch's own.
"""

import ctypes
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

TILES = (24, 23)  # cublasLtMatmulTile_t: 256 x 128, 128 x 256; the first that is proposed
LEAST = 1 << 36  # operations: a product of fewer takes less than 0.1 ms, and leaves the choice to cuBLAS
ALIGNED = 256  # bytes, what cuBLASLt takes for granted when it proposes kernels
WORKSPACE = 32 << 20  # bytes that a kernel may ask for

# cublasLt.h and library_types.h
_BF16, _FP32, _COMPUTE_FP32 = 14, 0, 68
_TRANSPOSE_A, _MAX_WORKSPACE, _TILE_ID = 3, 1, 1

_is_on = False


def choose_kernels() -> None:
    """From now on, in this process, for this module's products."""
    global _is_on
    _is_on = torch.cuda.is_available()


def mm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """`a` (m, k) times `b` (k, n), into `out` (m, n) if there is one."""
    if out is None:
        out = a.new_empty(len(a), b.shape[1])
    return out if _multiply(a, b, None, out) else torch.mm(a, b, out=out)


def add_mm(out: Tensor, a: Tensor, b: Tensor) -> None:
    """`out` (m, n) += `a` (m, k) times `b` (k, n), summed in fp32 and rounded once."""
    if not _multiply(a, b, out, out):
        out.addmm_(a, b)


def sum_mm(c: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`c` (m, n) + `a` (m, k) times `b` (k, n), summed in fp32 and rounded once."""
    out = torch.empty_like(c)
    return out if _multiply(a, b, c, out) else torch.addmm(c, a, b, out=out)


def _multiply(a: Tensor, b: Tensor, c: Tensor | None, out: Tensor) -> bool:
    """`out` = `a` `b`, plus `c` if there is one. Whether it was done: here are all of the terms on which it is."""
    adds, c = c is not None, out if c is None else c
    if not _is_on or not a.is_cuda or not a.dtype == b.dtype == c.dtype == out.dtype == torch.bfloat16:
        return False
    (m, k), n = a.shape, b.shape[1]
    if 2 * m * n * k < LEAST:
        return False
    is_transposed = b.stride(0) == 1
    matrices = a, b.t() if is_transposed else b, c, out
    if any(not t.is_contiguous() or t.data_ptr() % ALIGNED for t in matrices):
        return False
    kernel = _kernel(m, n, k, is_transposed, a.device.index)
    return kernel is not None and kernel.run(a, b, c, out, 1.0 if adds else 0.0)


class _Algorithm(ctypes.Structure):
    _fields_ = (("data", ctypes.c_uint64 * 8),)


class _Proposal(ctypes.Structure):
    _fields_ = (
        ("algorithm", _Algorithm),
        ("workspace", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


@dataclass(slots=True)
class _Kernel:
    """One way to multiply matrices of given shapes. To cuBLAS, which counts along columns, they are transposed: out^T =
    b^T a^T."""

    library: Any
    handle: ctypes.c_void_p
    operation: ctypes.c_void_p
    layouts: tuple[ctypes.c_void_p, ...]  # of b, a and out
    proposal: _Proposal
    one: ctypes.c_float = field(default_factory=lambda: ctypes.c_float(1.0))

    def run(self, a: Tensor, b: Tensor, c: Tensor, out: Tensor, beta: float) -> bool:
        """`out` = `a` `b` + beta `c`. Whether cuBLASLt took it."""
        of_b, of_a, of_out = self.layouts
        nbytes = self.proposal.workspace
        room = torch.empty(nbytes, dtype=torch.uint8, device=a.device) if nbytes else None
        status = self.library.cublasLtMatmul(
            self.handle,
            self.operation,
            ctypes.byref(self.one),
            ctypes.c_void_p(b.data_ptr()),
            of_b,
            ctypes.c_void_p(a.data_ptr()),
            of_a,
            ctypes.byref(ctypes.c_float(beta)),
            ctypes.c_void_p(c.data_ptr()),
            of_out,
            ctypes.c_void_p(out.data_ptr()),
            of_out,
            ctypes.byref(self.proposal.algorithm),
            ctypes.c_void_p(room.data_ptr() if room is not None else None),
            ctypes.c_size_t(nbytes),
            ctypes.c_void_p(torch.cuda.current_stream(a.device).cuda_stream),
        )
        return bool(status == 0)


@cache
def _kernel(m: int, n: int, k: int, is_transposed: bool, device: int) -> _Kernel | None:
    """The first proposal with one of the tiles; None where there is none, or no Hopper GPU."""
    if torch.cuda.get_device_capability(device) != (9, 0):
        return None
    try:
        library, handle = _library(device)
        operation = _made(library.cublasLtMatmulDescCreate, ctypes.c_int(_COMPUTE_FP32), ctypes.c_int(_FP32))
        _set(library.cublasLtMatmulDescSetAttribute, operation, _TRANSPOSE_A, ctypes.c_int32(is_transposed))
        shapes = ((k, n) if is_transposed else (n, k)), (k, m), (n, m)  # column by column
        layouts = tuple(_layout(library, *shape) for shape in shapes)
        proposals = _proposals(library, handle, operation, layouts)
    except (OSError, AttributeError, RuntimeError):  # no such library, or another than we know
        return None
    for tile in TILES:
        for proposal in proposals:
            if _tile(library, proposal) == tile:
                return _Kernel(library, handle, operation, layouts, proposal)
    return None


@cache
def _library(device: int) -> tuple[Any, ctypes.c_void_p]:
    """The library that torch has loaded, and a handle for a GPU."""
    major = (torch.version.cuda or "").partition(".")[0]
    library = ctypes.CDLL(f"libcublasLt.so.{major}")
    with torch.cuda.device(device):
        return library, _made(library.cublasLtCreate)


def _made(create: Any, *arguments: Any) -> ctypes.c_void_p:
    result = ctypes.c_void_p()
    _check(create(ctypes.byref(result), *arguments))
    return result


def _set(function: Any, what: ctypes.c_void_p, attribute: int, value: Any) -> None:
    _check(function(what, ctypes.c_int(attribute), ctypes.byref(value), ctypes.c_size_t(ctypes.sizeof(value))))


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"cuBLASLt gave status {status}")


def _layout(library: Any, rows: int, columns: int) -> ctypes.c_void_p:
    sizes = ctypes.c_uint64(rows), ctypes.c_uint64(columns), ctypes.c_int64(rows)
    return _made(library.cublasLtMatrixLayoutCreate, ctypes.c_int(_BF16), *sizes)


def _proposals(
    library: Any, handle: ctypes.c_void_p, operation: ctypes.c_void_p, layouts: tuple[ctypes.c_void_p, ...]
) -> list[_Proposal]:
    preference = _made(library.cublasLtMatmulPreferenceCreate)
    _set(library.cublasLtMatmulPreferenceSetAttribute, preference, _MAX_WORKSPACE, ctypes.c_size_t(WORKSPACE))
    found, count = (_Proposal * 16)(), ctypes.c_int()
    of_b, of_a, of_out = layouts
    matrices = of_b, of_a, of_out, of_out
    wanted = ctypes.c_int(len(found)), found, ctypes.byref(count)
    _check(library.cublasLtMatmulAlgoGetHeuristic(handle, operation, *matrices, preference, *wanted))
    library.cublasLtMatmulPreferenceDestroy(preference)
    return list(found)[: count.value]


def _tile(library: Any, proposal: _Proposal) -> int:
    value, written = ctypes.c_uint32(), ctypes.c_size_t()
    room = ctypes.byref(value), ctypes.c_size_t(ctypes.sizeof(value)), ctypes.byref(written)
    what = ctypes.byref(proposal.algorithm), ctypes.c_int(_TILE_ID)
    _check(library.cublasLtMatmulAlgoConfigGetAttribute(*what, *room))
    return value.value
