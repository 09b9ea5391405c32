"""Kernels compiled to PTX and to machine code, which needs NVIDIA's compiler but no GPU."""

import importlib
import re
import shutil
import subprocess
from types import SimpleNamespace
from typing import NamedTuple

import pytest


class Usage(NamedTuple):
    """What `ptxas` says of a kernel."""

    registers: int
    spilled: int  # bytes stored
    shared: int  # bytes


def need_compiler():
    """Skip the test where NVIDIA's compiler library is not."""
    pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")
    nvvm, nvrtc = (importlib.import_module(f"numba.cuda.cudadrv.{x}") for x in ("nvvm", "nvrtc"))
    try:
        nvvm.NVVM()
        nvrtc.get_supported_ccs()
    except Exception as error:
        found = " ".join(str(error).split())
        pytest.skip(f"no NVVM or NVRTC: {found}; pip install 'fastattn[cuda12]'")


def compile_ptx(monkeypatch, kernel, arguments, processor, opt=True) -> str:
    """The PTX of a kernel for arguments of these types: a name of a scalar's, or one in brackets of
    an array's.
    """
    cuda = importlib.import_module("numba.cuda")
    types = importlib.import_module("numba").types
    # Device functions are compiled for the current device; there need not be one.
    device = SimpleNamespace(compute_capability=processor)
    dispatcher = importlib.import_module("numba.cuda.dispatcher")
    monkeypatch.setattr(dispatcher, "get_current_device", lambda: device)
    signature = []
    for argument in arguments:
        scalar = getattr(types, argument.strip("[]"))
        signature.append(types.Array(scalar, 1, "C") if "[" in argument else scalar)
    return cuda.compile_ptx(kernel.py_func, tuple(signature), cc=processor, opt=opt)[0]


def assemble(ptx, processor, registers, folder) -> Usage:
    """What a kernel uses that may have so many registers; skips the test without `ptxas`."""
    ptxas = shutil.which("ptxas")
    if ptxas is None:
        pytest.skip("no ptxas, which comes with NVIDIA's CUDA toolkit")
    # As Numba links it: the PTX of 9.0 for 9.0a.
    (folder / "kernel.ptx").write_text(re.sub(r"\.target sm_\d+", f".target {processor}", ptx))
    command = [ptxas, "-v", f"-arch={processor}", f"-maxrregcount={registers}", "kernel.ptx",
               "-o", "kernel.cubin"]  # fmt: skip
    said = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stderr
    found = (re.search(rf"(\d+) {what}", said) for what in ("registers", "bytes spill stores"))
    return Usage(*(int(x[1]) for x in found), int(re.search(r"(\d+) bytes smem", said)[1]))
