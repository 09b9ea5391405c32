#!/usr/bin/env bash
# An array of NumPy 2 may have 64 axes, and arithmetic and matmul broadcast all of them. So one
# expects np.broadcast_shapes, np.broadcast and np.broadcast_arrays to reach as far. They stop at
# 32 axes with a RuntimeError, in NumPy 2.4.6: np.broadcast is built from flat iterators, whose
# structures keep the old bound (NPY_MAXDIMS_LEGACY_ITERS in ndarraytypes.h, checked by
# PyArray_IterNew in numpy/_core/src/multiarray/iterators.c), and the two others call it. The
# bound is on axes, not on arguments, and np.broadcast_to is free of it. It matters to attention
# because the batch axes of q, k and v broadcast: code that asks np.broadcast_shapes for the
# common batch shape fails on 33 axes with an error that names no argument, though the product
# itself would work.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check \
    'numpy==2.4.6'
"$work/venv/bin/python" -I - <<'EOF'
import numpy as np

print("numpy", np.__version__)


def outcome(call):
    try:
        return call()
    except RuntimeError as error:
        return f"RuntimeError: {error}"


for ndim in (32, 33):
    a = np.ones((1,) * ndim)
    seen = {
        "matmul": outcome(lambda: (a @ a).ndim),
        "broadcast_to": outcome(lambda: np.broadcast_to(a, a.shape).ndim),
        "broadcast_shapes": outcome(lambda: len(np.broadcast_shapes(a.shape, a.shape))),
        "broadcast": outcome(lambda: np.broadcast(a, a).ndim),
        "broadcast_arrays": outcome(lambda: np.broadcast_arrays(a, np.ones(2))[0].ndim),
    }
    for function, result in seen.items():
        print(f"{ndim} axes, {function}: {result}")
    stops = {function for function, result in seen.items() if result != ndim}
    expected = {"broadcast_shapes", "broadcast", "broadcast_arrays"} if ndim > 32 else set()
    assert stops == expected, f"changed: with {ndim} axes, {stops or 'nothing'} stops"
EOF
