#!/usr/bin/env bash
# The tile kernels without Python: each instruction set that this machine can run under the address
# and undefined-behaviour sanitizers, and arm64 by a cross compiler under qemu, where both are there.
set -euo pipefail
cd "$(dirname "$0")/.."
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
flags=(-std=gnu11 -fno-math-errno -fno-trapping-math -Wall -Wextra -Werror -Icsrc -DTABLE=kernels)
sources=(csrc/tile.c tests/tile_check.c)

check() { # name, runner, compiler and flags...
    local name=$1 runner=$2
    shift 2
    for dtype in "" -DREAL_IS_DOUBLE; do
        "$@" "${flags[@]}" $dtype "${sources[@]}" -o "$build/check" -lm
        printf '%-10s ' "$name"
        $runner "$build/check"
    done
}

sanitize=(-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined)
case $(uname -m) in
x86_64)
    check baseline "" gcc "${sanitize[@]}"
    grep -qw avx2 /proc/cpuinfo && check avx2 "" gcc "${sanitize[@]}" -mavx2 -mfma
    grep -qw avx512dq /proc/cpuinfo && check avx512 "" gcc "${sanitize[@]}" \
        -mavx512f -mavx512dq -mavx512bw -mavx512vl -mfma
    ;;
*) check native "" gcc "${sanitize[@]}" ;;
esac
if command -v aarch64-linux-gnu-gcc >/dev/null && command -v qemu-aarch64 >/dev/null; then
    check neon qemu-aarch64 aarch64-linux-gnu-gcc -O3 -static
else
    echo "neon       not checked: aarch64-linux-gnu-gcc and qemu-aarch64 are needed"
fi
