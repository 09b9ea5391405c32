#!/usr/bin/env bash
# DLPack names bfloat16 (kDLBfloat), PyTorch exports CPU tensors of it, and ml_dtypes gives NumPy
# a bfloat16 dtype. So one expects np.from_dlpack to read such a tensor, at least once ml_dtypes
# is imported. NumPy 2.4.6 reads it never ("Unsupported dtype in DLTensor") and writes it never:
# an array of ml_dtypes.bfloat16 has a __dlpack__ that raises BufferError
# (numpy/_core/src/multiarray/dlpack.c knows the built-in dtypes only). Tensor.numpy() refuses
# bfloat16 too. The way across is a view of the bits as int16. It matters to attention because q,
# k and v of a model are bfloat16 more often than not: a function on arrays that takes "anything
# with __dlpack__" through NumPy takes no such tensor, and has to view bits or read the capsule
# itself.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check \
    'numpy==2.4.6' 'ml_dtypes==0.6.0' 'torch==2.13.0'
"$work/venv/bin/python" -I - <<'EOF'
import ml_dtypes
import numpy as np
import torch

print("numpy", np.__version__, "ml_dtypes", ml_dtypes.__version__, "torch", torch.__version__)


def outcome(call):
    try:
        return call()
    except (RuntimeError, BufferError) as error:
        return f"{type(error).__name__}: {error}"


tensor = torch.tensor([1.0, 2.0], dtype=torch.bfloat16)
array = np.array([1, 2], ml_dtypes.bfloat16)
capsule = type(tensor.__dlpack__()).__name__
read = outcome(lambda: np.from_dlpack(tensor))
write = outcome(lambda: array.__dlpack__())
bits = np.from_dlpack(tensor.view(torch.int16)).view(ml_dtypes.bfloat16)
print("torch exports:", capsule)
print("numpy reads:", read)
print("numpy writes:", write)
print("by way of int16:", bits)
assert capsule == "PyCapsule", "changed: torch exports no bfloat16"
assert str(read).startswith("RuntimeError: Unsupported dtype"), "changed: numpy reads bfloat16"
assert str(write).startswith("BufferError"), "changed: numpy writes bfloat16"
assert (bits == array).all(), "changed: the bits differ"
EOF
