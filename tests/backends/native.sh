#!/usr/bin/env bash
# The C code without Python, on each instruction set that this machine can run, and on arm64 by a
# cross compiler under qemu where both are there.
#
#   tests/backends/native.sh tables       every table of kernels compiles without a warning
#   tests/backends/native.sh tiles        the tile kernels, under the address and undefined-behaviour sanitizers
#   tests/backends/native.sh scan [STEP]  exp and tanh at every STEP-th float32; 1, the default, takes ten minutes
#   tests/backends/native.sh              all of these, with a thin scan
set -euo pipefail
cd "$(dirname "$0")/../.."
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
flags=(-std=gnu11 -fno-math-errno -fno-trapping-math -Wall -Wextra -Werror -Wno-unknown-pragmas -Icsrc -DTABLE=kernels)

check() { # name, runner, compiler and flags...
    local name=$1 runner=$2
    shift 2
    for dtype in "${dtypes[@]}"; do
        "$@" "${flags[@]}" $dtype "${sources[@]}" -o "$build/check" -lm
        printf '%-10s ' "$name"
        $runner "$build/check" "${arguments[@]}"
    done
}

each_instruction_set() { # flags of this machine's own compiler...
    local dtypes=("" -DREAL_IS_DOUBLE)
    case $(uname -m) in
    x86_64)
        check baseline "" gcc "$@"
        ! grep -qw avx2 /proc/cpuinfo || check avx2 "" gcc "$@" -mavx2 -mfma
        ! grep -qw avx512dq /proc/cpuinfo || check avx512 "" gcc "$@" \
            -mavx512f -mavx512dq -mavx512bw -mavx512vl -mfma
        dtypes=(-DBF16_TERMS=3)
        ! grep -qw amx_bf16 /proc/cpuinfo || check amx "" gcc "$@" \
            -mavx512f -mavx512dq -mavx512bw -mavx512vl -mfma -mavx512bf16 -mamx-tile -mamx-bf16
        dtypes=("" -DREAL_IS_DOUBLE)
        ;;
    *) check native "" gcc "$@" ;;
    esac
    if command -v aarch64-linux-gnu-gcc >/dev/null && command -v qemu-aarch64 >/dev/null; then
        check neon qemu-aarch64 aarch64-linux-gnu-gcc -O3 -static
    else
        echo "neon       not checked: aarch64-linux-gnu-gcc and qemu-aarch64 are needed"
    fi
}

table() { # source, flags...
    echo "table      $*"
    gcc -O3 -S "${flags[@]}" "${@:2}" "csrc/$1" -o "$build/table.s"
}

tables() {
    local avx512="-mavx512f -mavx512dq -mavx512bw -mavx512vl -mfma" each=("") isa dtype
    [[ $(uname -m) != x86_64 ]] || each=("" "-mavx2 -mfma -mf16c" "$avx512")
    for isa in "${each[@]}"; do
        for dtype in "" -DREAL_IS_DOUBLE; do
            table tile.c $isa $dtype
            table sparse.c $isa $dtype
        done
    done
    [[ $(uname -m) == x86_64 ]] || return 0
    table tile.c $avx512 -mavx512bf16 -DBF16_TERMS=1
    for dtype in 1 2 3; do
        table tile.c $avx512 -mavx512bf16 -mamx-tile -mamx-bf16 -DBF16_TERMS=$dtype
    done
}

tiles() {
    local sources=(csrc/tile.c tests/backends/tile_check.c) arguments=()
    each_instruction_set -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined
}

scan() {
    local sources=(tests/backends/exp_tanh_check.c) arguments=("$1")
    each_instruction_set -O3 -fopenmp
}

case ${1-} in
tables) tables ;;
tiles) tiles ;;
scan) scan "${2-1}" ;;
*) tables && tiles && scan 997 ;;
esac
