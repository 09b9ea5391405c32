#!/usr/bin/env bash
# The C code without Python, on each instruction set that this machine can run, AMX by an emulation
# where it lacks only that, and on arm64 by a cross compiler under qemu where both are there.
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

avx512=(-mavx512f -mavx512dq -mavx512bw -mavx512vl -mfma)
arm64=$(command -v aarch64-linux-gnu-gcc && command -v qemu-aarch64) || arm64=

check() { # name, runner, compiler and flags...
    local name=$1 runner=$2
    shift 2
    for dtype in "${dtypes[@]}"; do
        "$@" "${flags[@]}" $dtype "${sources[@]}" -o "$build/check" -lm
        printf '%-10s ' "$name"
        $runner "$build/check" "${arguments[@]}"
    done
}

has() { grep -qw "$1" /proc/cpuinfo; }

each_instruction_set() { # flags of this machine's own compiler...
    local dtypes=("" -DREAL_IS_DOUBLE)
    case $(uname -m) in
    x86_64)
        check baseline "" gcc "$@"
        ! has avx2 || check avx2 "" gcc "$@" -mavx2 -mfma
        ! has avx512dq || check avx512 "" gcc "$@" "${avx512[@]}"
        ;;
    *) check native "" gcc "$@" ;;
    esac
    if [ -n "$arm64" ]; then
        check neon qemu-aarch64 aarch64-linux-gnu-gcc -O3 -static
    else
        echo "neon       not checked: aarch64-linux-gnu-gcc and qemu-aarch64 are needed"
    fi
}

each_bf16_engine() { # flags of this machine's own compiler...
    local dtypes=(-DBF16_TERMS=1 -DBF16_TERMS=2 -DBF16_TERMS=3) amx=(-mamx-tile -mamx-bf16) name=amx
    if ! has amx_bf16; then
        name=emulated amx=(-D__AMX_TILE__ -DEMULATED -include tests/backends/amx_emulated.h)
    fi
    ! has avx512_bf16 || check $name "" gcc "$@" "${avx512[@]}" -mavx512bf16 "${amx[@]}"
    arguments=(47) # qemu takes a minute for what is left
    [ -z "$arm64" ] || check neon_bf16 "qemu-aarch64 -cpu max" \
        aarch64-linux-gnu-gcc -O3 -static -march=armv8.2-a+bf16 -Wno-unused-function
    arguments=() dtypes=(-DBF16_TERMS=1)
    ! has avx512_bf16 || check avx512_bf16 "" gcc "$@" "${avx512[@]}" -mavx512bf16 -Wno-unused-function
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
    local sanitized=(-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined)
    each_instruction_set "${sanitized[@]}"
    each_bf16_engine "${sanitized[@]}"
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
