#!/usr/bin/env bash
# PyTorch negates lazily: the imaginary part of a conjugated complex tensor is a view of the old
# memory with a negative bit. Tensor.numpy() refuses such a tensor and asks for resolve_neg(), and
# Tensor.__dlpack__ refuses its cousin, the lazily conjugated one. So one expects __dlpack__ to
# refuse or to resolve the negation as well. In torch 2.13.0 it does neither (torch/_tensor.py,
# __dlpack__, asks is_conj() but not is_neg()): it exports the memory as it stands, and
# np.from_dlpack, or torch.from_dlpack itself, reads every number with the wrong sign. It matters
# to attention on arrays because DLPack is how one takes tensors without importing torch: real and
# imaginary parts as features are ordinary input, a wrong sign in q turns every score round, and
# nothing in the capsule tells the consumer. Prefer the tensor's own check, or ask is_neg() where
# the method exists.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check \
    'numpy==2.4.6' 'torch==2.13.0'
"$work/venv/bin/python" -I - <<'EOF'
import numpy as np
import torch

print("numpy", np.__version__, "torch", torch.__version__)


def outcome(call):
    try:
        return call()
    except (RuntimeError, BufferError) as error:
        return f"{type(error).__name__}: {error}"


conjugate = torch.tensor([1 + 2j, 3 + 4j]).conj()
x = conjugate.imag
refused = outcome(x.numpy)
cousin = outcome(conjugate.__dlpack__)
read = np.from_dlpack(x)
print("the tensor:", x.tolist(), "is_neg:", x.is_neg())
print("numpy():", refused)
print("__dlpack__ of the conjugate:", cousin)
print("np.from_dlpack:", read.tolist())
print("torch.from_dlpack:", torch.from_dlpack(x).tolist())
print("np.from_dlpack of resolve_neg():", np.from_dlpack(x.resolve_neg()).tolist())
assert x.is_neg() and x.tolist() == [-2, -4], "changed: the view is no lazy negation"
assert str(refused).startswith("RuntimeError"), "changed: numpy() accepts a negative bit"
assert str(cousin).startswith("BufferError"), "changed: __dlpack__ accepts a conjugate"
assert read.tolist() == [2, 4], "changed: __dlpack__ keeps the sign"
EOF
