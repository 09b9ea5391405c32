#!/usr/bin/env bash
# numba.typeof knows a float16 array (array(float16, 1d, C)), and numba ships np.float16 for CUDA.
# So one expects a CPU function to take such an array, at least to read its size or its bits, or
# else a numba typing error that says the type is unsupported. In numba 0.68.1 every njit function
# with a float16 argument or closure variable fails with a bare NotImplementedError whose whole
# message is "float16" for an argument: the type exists in numba/core/types, but its data model
# knows float32 and float64 only (FloatModel in numba/core/datamodel/models.py), so typing passes
# and lowering stops. It is no NumbaError, so a handler for those misses it. float32 works in each
# case. It matters to attention because half precision is the usual storage of q, k and v: pass a
# view as uint16 and convert in the kernel, or widen before the call, and decide that before numba
# sees the array.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check \
    'numpy==2.4.6' 'numba==0.68.1'
"$work/venv/bin/python" -I - <<'EOF'
import numba
import numpy as np
from numba.core.errors import NumbaError

print("numpy", np.__version__, "numba", numba.__version__)


def outcome(call):
    try:
        return call()
    except NotImplementedError as error:
        assert not isinstance(error, NumbaError), "changed: the error is a NumbaError"
        return f"NotImplementedError: {str(error).splitlines()[-1]}"


@numba.njit
def size(x):
    return x.size


for dtype in (np.float32, np.float16):
    x = np.ones(3, dtype)
    scalar = dtype(2)

    @numba.njit
    def closure(y):
        return y * scalar

    seen = {"x.size": outcome(lambda: size(x)), "a closure": outcome(lambda: closure(1.5))}
    for what, result in seen.items():
        print(f"{numba.typeof(x)}, {what}: {result}")
    if dtype is np.float32:
        assert list(seen.values()) == [3, 3], "changed: float32 fails"
    else:
        fails = all(str(r).startswith("NotImplementedError") for r in seen.values())
        assert fails, "changed: float16 works"
bits = size(np.ones(3, np.float16).view(np.uint16))
print("the bits as uint16, x.size:", bits)
assert bits == 3, "changed: the view as uint16 fails"
EOF
