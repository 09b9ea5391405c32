#!/usr/bin/env bash
# The bfloat16 of ml_dtypes does arithmetic as a float does, so one expects NumPy's questions
# about floats to say yes. With numpy 2.4.6 and ml_dtypes 0.6.0 they say no: the dtype has kind
# "V", as raw bytes have, np.issubdtype(bfloat16, np.floating) is False, np.finfo raises
# ValueError (ml_dtypes.finfo works), it is no buffer (memoryview: "cannot include dtype 'E'"),
# and np.save followed by np.load gives back void bytes of 2, since the typestr "<V2" is all that
# __array_interface__ can say. The kind is set on purpose, so that NumPy takes it for no built-in
# float of 2 bytes (ml_dtypes/_src, "kind="). It matters to attention on arrays because a check
# such as x.dtype.kind == "f" turns bfloat16 away, a check that admits kind "V" lets records and
# raw bytes in, and -np.finfo(x.dtype).max as a mask fails. Compare with the dtype itself, and
# load saved arrays with .view(bfloat16).
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check \
    'numpy==2.4.6' 'ml_dtypes==0.6.0'
"$work/venv/bin/python" -I - <<'EOF'
import io

import ml_dtypes
import numpy as np

print("numpy", np.__version__, "ml_dtypes", ml_dtypes.__version__)


def outcome(call):
    try:
        return call()
    except ValueError as error:
        return f"ValueError: {error}"


x = np.array([1, 2], ml_dtypes.bfloat16)
file = io.BytesIO()
np.save(file, x)
file.seek(0)
loaded = np.load(file)
seen = {
    "kind": x.dtype.kind,
    "issubdtype of np.floating": np.issubdtype(x.dtype, np.floating),
    "np.finfo": outcome(lambda: np.finfo(x.dtype)),
    "memoryview": outcome(lambda: memoryview(x)),
    "dtype after np.save and np.load": loaded.dtype.str,
}
for question, answer in seen.items():
    print(f"{question}: {answer}")
kind, floating, finfo, buffer, saved = seen.values()
assert kind == "V" and not floating, "changed: bfloat16 is a float to NumPy"
assert str(finfo).startswith("ValueError"), "changed: np.finfo knows bfloat16"
assert str(buffer).startswith("ValueError"), "changed: bfloat16 is a buffer"
assert saved == "|V2", "changed: np.load gives back another dtype"
assert (loaded.view(x.dtype) == x).all(), "changed: the bits differ"
EOF
