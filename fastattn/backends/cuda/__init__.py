"""Blocked attention on a CUDA device, with kernels that Numba compiles.

NumPy arrays are copied to the device and the results back; arrays that are there already are read
where they lie, and the results stay beside them. `multiply_add` serves any call on any device, in
float64 for float64 and else in float32; `tensor_cores` float16 and bfloat16 from compute capability
8.0 on, with `wgmma` on 9.0. `engine` chooses.

Nothing here has run on a device as it stands. An earlier build of the multiply-adds has, on an
H100, with the right results; tensor cores and the merging of parts have only been simulated and
compiled.
"""

from __future__ import annotations

import re
from contextlib import nullcontext
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec

from ...core.device_array import DeviceArray
from ...core.problem import DOT, Problem

name = "cuda"

# Up to which release numba-cuda fails from which NumPy on, and why.
MISFITS = (((0, 30, 4), (2, 5), "it needs numpy.row_stack, which is gone"),)


def unsupported(problem: Problem) -> str | None:
    """Why this backend cannot serve `problem`, or None."""
    if problem.k_scales is not None:
        return "no kernel for int8 keys and values"
    if problem.is_sparse:
        return "no kernel for a sparse mask"
    if problem.block_table is not None:
        return "no kernel for keys in pages"
    if problem.is_flex:
        return "a score_mod or mask_mod cannot be compiled into it"
    if problem.score_function is not DOT:
        return "its kernels compute dot products alone"
    if problem.dropout is not None:
        return "its kernels have no dropout"
    if problem.packing is not None and _counts_positions(problem):
        return "no kernel for positions within packed sequences"
    return missing()


def _counts_positions(p: Problem) -> bool:
    r = p.key_range
    return any(x is not None for x in (r.left, r.right, p.alibi, p.relative_bias))


@lru_cache(maxsize=1)
def missing() -> str | None:
    """Why nothing can run on a CUDA device here, or None."""
    if find_spec("numba") is None or find_spec("numba_cuda") is None:
        return "numba-cuda is not installed"
    try:
        cuda = import_module(".toolkit", __package__).cuda
        if not cuda.is_available():
            error = cuda.cuda_error()
            if error is None:
                return "no CUDA toolkit for Numba; numba-cuda[cu12] or [cu13] installs one"
            return f"no CUDA device ({_in_one_line(error).partition('.')[0]})"
        return None if cuda.config.ENABLE_CUDASIM else _compiler_fails(cuda)
    except Exception as error:  # of several types, where it does not fit its surroundings
        return f"numba-cuda does not work here ({_in_one_line(error)})"


def _compiler_fails(cuda) -> str | None:
    """Why no kernel can be compiled, or None: where it is not known, the smallest is tried."""
    from importlib.metadata import version  # not at the top: it imports 30 modules

    numba_cuda, numpy = version("numba-cuda"), version("numpy")
    for last, first, reason in MISFITS:
        if _release(numba_cuda) <= last and _release(numpy) >= first:
            return f"numba-cuda {numba_cuda} does not work with NumPy {numpy} ({reason})"
    try:
        cuda.jit("void(float32[::1])")(_smallest_kernel)
    except Exception as error:
        return f"numba-cuda {numba_cuda} compiles no kernel here ({_in_one_line(error)})"
    return None


def _smallest_kernel(x):
    x[0] = 1


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def _in_one_line(error) -> str:
    return " ".join(str(error).split())


def run(problem: Problem, result):
    """Fill `result`; return ``(lse, row_max, weights)``, None for what was not asked for."""
    p = problem
    device, stream_address = p.q.place() if isinstance(p.q, DeviceArray) else (None, 0)
    cuda = import_module(".toolkit", __package__).cuda
    with cuda.gpus[device] if device is not None else nullcontext():
        stream = cuda.external_stream(stream_address) if stream_address else cuda.default_stream()
        try:
            return import_module(".engine", __package__).run(p, result, stream)
        except Exception as error:
            if "OUT_OF_MEMORY" in str(error):
                raise MemoryError(f"on the CUDA device: {error}") from error
            raise


def describe(problem: Problem) -> dict[str, str]:
    """What would run, for `fastattn.explain`."""
    return import_module(".engine", __package__).describe(problem)
