#!/usr/bin/env bash
# A consumer that calls __dlpack__(max_version=(1, 0)) understands versioned capsules, and a
# producer of the array API 2023.12 should answer with one: only that form has a read-only flag. A
# JAX array cannot be written, so one expects it to use the flag. jax 0.10.2 accepts the argument
# and returns the unversioned capsule whatever it says: both branches of to_dlpack in
# jax/_src/dlpack.py make the same capsule, and a comment there waits for XLA to support the
# other. NumPy 2.4.6 and torch 2.13.0 answer with "dltensor_versioned"; a read-only NumPy array
# even refuses any older form. It matters to attention on arrays because the consumer cannot learn
# from the capsule that q is immutable: it must treat every unversioned capsule as read-only, as
# NumPy does, or refuse it as out=.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check \
    'numpy==2.4.6' 'torch==2.13.0' 'jax==0.10.2'
"$work/venv/bin/python" -I - <<'EOF'
import ctypes

import jax
import numpy as np
import torch

print("numpy", np.__version__, "torch", torch.__version__, "jax", jax.__version__)

name_of = ctypes.pythonapi.PyCapsule_GetName
name_of.restype, name_of.argtypes = ctypes.c_char_p, [ctypes.py_object]

frozen = np.ones(2)
frozen.flags.writeable = False
arrays = {"jax": jax.numpy.ones(2), "torch": torch.ones(2), "numpy, read-only": frozen}
names = {k: name_of(a.__dlpack__(max_version=(1, 0))).decode() for k, a in arrays.items()}
for library, name in names.items():
    print(f"{library}: {name}")
try:
    frozen.__dlpack__()
    refused = False
except BufferError as error:
    refused = True
    print("numpy, read-only, unversioned: BufferError:", error)
print("np.from_dlpack of the jax array: writeable =", np.from_dlpack(arrays["jax"]).flags.writeable)
assert names.pop("jax") == "dltensor", "changed: jax gives a versioned capsule"
assert set(names.values()) == {"dltensor_versioned"}, "changed: numpy or torch gives no version"
assert refused, "changed: numpy exports a read-only array without a version"
EOF
