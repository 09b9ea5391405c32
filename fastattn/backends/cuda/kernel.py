"""The CUDA kernel: a tile of queries per thread block, in the words of Numba.

One pass over the keys with an online softmax, as FlashAttention does it (Dao et al. 2022,
algorithm 1; Dao 2023, section 3). A block of threads is a grid of ``TY`` x ``TX``: thread (ty, tx)
holds the scores of the queries ``ty, ty + TY, ...`` and the keys ``tx, tx + TX, ...`` of a tile,
and the sums of the same queries for its own columns of v, all in registers. Neighbours in a warp
read neighbouring rows of shared memory, whose length is an odd multiple of four words: so each
reads four words at once and none waits for a bank.

Nothing here may depend on what the simulator does differently: all loops that index local arrays
have constant bounds (they are registers only if unrolled), `syncthreads` stands only where the
whole block goes, and no literal makes a float32 a float64.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import numpy as np
from numba import cuda

__all__ = ["Spec", "Tile", "compiled", "slice_of", "tile_for"]

# The rows of the table `at`: where an operand begins for each (batch, head), in elements. The first
# eight have a row of `strides` as well.
Q, K, V, OUT, MASK, BIAS, START, STOP, POSITION = range(9)

# An index masked with this is known not to count from the end.
POSITIVE = (1 << 63) - 1


class Spec(NamedTuple):
    """What a kernel is compiled for, the types of its arguments aside."""

    real: str  # float32 or float64: what it computes in
    head_dim: int
    value_dim: int  # at least 1; one block of threads makes `slice_of` of them
    bfloat16: str = ""  # which of "q", "k", "v", "b"(ias) and "o"(ut) hold its bits as uint16
    softcap: bool = False
    bias: bool = False
    clamp_bias: bool = False  # may hold numbers that `real` cannot
    alibi: bool = False
    sinks: bool = False
    mask: bool = False
    lse: bool = False
    weights: bool = False
    simulated: bool = False


class Tile(NamedTuple):
    """How a block of threads shares its work."""

    ty: int
    tx: int
    rows: int  # queries of a thread
    cols: int  # keys of a thread
    chunk: int  # dims of q and k in shared memory at a time
    resident: int  # up to this head_dim the queries stay in shared memory
    v_keys: int  # keys of v in shared memory at a time
    registers: int  # of a thread, so that enough threads are under way at once
    dims: int  # columns of v that a thread reads at once; it holds up to twice as many

    @property
    def queries(self) -> int:
        return self.ty * self.rows

    @property
    def keys(self) -> int:
        return self.tx * self.cols

    @property
    def threads(self) -> int:
        return self.ty * self.tx


def tile_for(spec: Spec) -> Tile:
    """The tile of a kernel: within 48 KiB of shared memory and 255 registers a thread."""
    wide = slice_of(spec) > 64  # twice the sums per query, so half the queries per thread
    if spec.simulated:  # each thread is one of Python's, each operation a microsecond
        return Tile(4, 4, 2, 2, chunk=8, resident=8, v_keys=4, registers=0, dims=2)
    if spec.real == "float64":
        return Tile(
            8, 16, 4, 2, chunk=32, resident=64, v_keys=8 if wide else 16, registers=255, dims=4
        )
    if wide:
        return Tile(16, 16, 4, 4, chunk=32, resident=64, v_keys=16, registers=128, dims=4)
    return Tile(8, 16, 8, 4, chunk=32, resident=64, v_keys=32, registers=168, dims=4)


def slice_of(spec: Spec) -> int:
    """How many columns of v one block of threads serves."""
    return min(spec.value_dim, 16 if spec.simulated else 128)


def padded(n: int) -> int:
    """A row length of at least `n` that is an odd multiple of 4."""
    return n + 4 if n % 8 == 0 else n


def ceil_div(n: int, by: int) -> int:
    return -(-n // by)


@cache
def compiled(spec: Spec):
    """The kernel of `spec`, to be launched with ``[(tiles, slices, 1), threads]``; blocks of
    threads beyond the first along the third axis do nothing.
    """
    real = np.dtype(spec.real).type
    tile = tile_for(spec)
    TY, TX, ROWS, COLS = tile.ty, tile.tx, tile.rows, tile.cols
    THREADS, BLOCK_Q, BLOCK_K = tile.threads, tile.queries, tile.keys
    # A warp covers WY x WX of the grid: fewest different rows to read.
    WY, WX = min(4, TY), min(8, TX)
    HEAD_DIM = spec.head_dim
    CHUNKS = ceil_div(HEAD_DIM, tile.chunk)
    CHUNK = 4 * ceil_div(ceil_div(HEAD_DIM, CHUNKS), 4)
    RESIDENT = tile.resident >= HEAD_DIM
    Q_DIMS = CHUNK * CHUNKS if RESIDENT else CHUNK
    Q_ROW, K_ROW, P_ROW = padded(Q_DIMS), padded(CHUNK), padded(BLOCK_K)
    SLICE = slice_of(spec)
    PARTS = ceil_div(SLICE, tile.dims * TX)
    DIMS = ceil_div(SLICE, PARTS * TX)
    SUMS = PARTS * DIMS  # a thread's columns of v
    V_COLS = TX * SUMS
    V_ROW = padded(4 * ceil_div(V_COLS, 4))
    V_KEYS = tile.v_keys
    QS, PS = BLOCK_Q * Q_ROW, BLOCK_Q * P_ROW
    KV = max(BLOCK_K * K_ROW, V_KEYS * V_ROW)
    SOFTCAP, BIASED, ALIBI = spec.softcap, spec.bias, spec.alibi
    SINKS, MASKED, LSE, WEIGHTS = spec.sinks, spec.mask, spec.lse, spec.weights
    ALIGNMENT = None if spec.simulated else 16
    # Masked with these, an index is known to be neither negative nor odd: the compiler reads
    # several words at once and does not count from the end.
    FOURS = 0x10000 - 4
    COLUMNS = 0x10000 - math.gcd(4, DIMS)
    FOLD = max(1, 512 // BLOCK_K)
    ZERO, ONE, HIDDEN = real(0), real(1), real(-0.0)
    INF, NAN, MOST = real(math.inf), real(math.nan), np.finfo(real).max

    fetch_q = fetcher(
        reader("q" in spec.bfloat16, False, real), BLOCK_Q, Q_DIMS, Q_ROW, THREADS, real
    )
    fetch_k = fetcher(
        reader("k" in spec.bfloat16, False, real), BLOCK_K, CHUNK, K_ROW, THREADS, real
    )
    fetch_v = fetcher(
        reader("v" in spec.bfloat16, False, real), V_KEYS, V_COLS, V_ROW, THREADS, real
    )
    read_bias = reader("b" in spec.bfloat16, spec.clamp_bias, real)
    write_out = writer("o" in spec.bfloat16)

    def attend(
        q, k, v, out, mask, bias, start, stop, position, lse, weights, slopes, sinks, at, strides,
        scale, softcap, wide_margin, n_queries, n_keys, value_dim, heads, first_tile,
    ):  # fmt: skip
        if cuda.blockIdx.z != 0:
            return
        qs = cuda.shared.array(QS, real, ALIGNMENT)
        kv = cuda.shared.array(KV, real, ALIGNMENT)  # a chunk of k, then some keys of v
        ps = cuda.shared.array(PS, real, ALIGNMENT)  # the weights of the tile
        row_top = cuda.shared.array(BLOCK_Q, real)
        row_rescale = cuda.shared.array(BLOCK_Q, real)  # in the end the sums
        row_factor = cuda.shared.array(BLOCK_Q, real)  # the product of those since the last fold
        row_saw = cuda.shared.array(BLOCK_Q, np.int32)
        row_start = cuda.shared.array(BLOCK_Q, np.int64)
        row_stop = cuda.shared.array(BLOCK_Q, np.int64)
        bounds = cuda.shared.array(4, np.int64)
        s = cuda.local.array((ROWS, COLS), real)
        acc = cuda.local.array((ROWS, SUMS), real)  # of at most FOLD tiles
        total = cuda.local.array((ROWS, SUMS), real)
        acc_sum = cuda.local.array(ROWS, real)
        total_sum = cuda.local.array(ROWS, real)
        a = cuda.local.array((ROWS, 4), real)
        b = cuda.local.array(4, real)

        t = cuda.threadIdx.x & (THREADS - 1)  # tells the compiler that it is not negative
        tx = t % WX + t // (WX * WY) % (TX // WX) * WX
        ty = t // WX % WY + t // (WX * WY) // (TX // WX) * WY
        tiles = (n_queries + BLOCK_Q - 1) // BLOCK_Q
        place = first_tile + cuda.blockIdx.x
        bh = place // tiles
        first_row = (tiles - 1 - place % tiles) * BLOCK_Q  # with a causal mask, longest first
        first_dim = cuda.blockIdx.y * SLICE
        n_rows = min(BLOCK_Q, n_queries - first_row)
        n_cols = min(SLICE, value_dim - first_dim)
        q_row, q_dim = strides[Q, 0], strides[Q, 1]
        k_row, k_dim = strides[K, 0], strides[K, 1]
        v_row, v_dim = strides[V, 0], strides[V, 1]
        mask_row, mask_key = strides[MASK, 0], strides[MASK, 1]
        bias_row, bias_key = strides[BIAS, 0], strides[BIAS, 1]
        q_at = at[Q, bh] + first_row * q_row
        v_at = at[V, bh] + first_dim * v_dim
        mask_at, bias_at = at[MASK, bh], at[BIAS, bh]
        grid_at = (bh * n_queries + first_row) * n_keys

        # ---- who sees what: [first, last) by some row, [inner_first, inner_last) by every row
        if t == 0:
            bounds[0] = n_keys
            bounds[1] = 0
            bounds[2] = 0
            bounds[3] = n_keys
        cuda.syncthreads()
        if t < n_rows:
            i = first_row + t
            low = start[at[START, bh] + i * strides[START, 0]]
            high = stop[at[STOP, bh] + i * strides[STOP, 0]]
            row_start[t] = low
            row_stop[t] = high
            if low < high:
                cuda.atomic.min(bounds, 0, low)
                cuda.atomic.max(bounds, 1, high)
            cuda.atomic.max(bounds, 2, low)
            cuda.atomic.min(bounds, 3, high)
        elif t < BLOCK_Q:
            row_start[t] = 0
            row_stop[t] = 0
        cuda.syncthreads()
        first, last, inner_first, inner_last = bounds[0], bounds[1], bounds[2], bounds[3]

        if RESIDENT:
            fetch_q(q, q_at, q_row, q_dim, n_rows, HEAD_DIM, scale, qs, t)

        margin = ZERO
        again = False  # for those sums that overflow, with smaller weights
        lost = 0  # the bits of this thread's
        weighing = False  # another pass over the keys, if the weights are asked for
        while True:
            if not weighing:
                for r in range(ROWS):
                    acc_sum[r] = ZERO
                    total_sum[r] = ZERO
                    for n in range(SUMS):
                        acc[r, n] = ZERO
                        total[r, n] = ZERO
                if t < BLOCK_Q:
                    row_top[t] = -INF
                    if SINKS:
                        row_top[t] = sinks[bh % heads] + margin
                    row_saw[t] = 0
            since_fold = 0
            key_from = first // BLOCK_K * BLOCK_K
            key_to = last
            if weighing:
                key_from = 0
                key_to = n_keys
            for begin in range(key_from, key_to, BLOCK_K):
                # ---- which of its scores does this thread see?
                partial = MASKED or BIASED or begin < inner_first or begin + BLOCK_K > inner_last
                seen = (1 << ROWS * COLS) - 1
                if partial:
                    seen = 0
                    for r in range(ROWS):
                        row = r * TY + ty
                        low = row_start[row] - begin
                        high = row_stop[row] - begin
                        for c in range(COLS):
                            key = c * TX + tx
                            sees = low <= key and key < high
                            if MASKED and sees:
                                i, j = first_row + row, begin + key
                                sees = mask[(mask_at + i * mask_row + j * mask_key) & POSITIVE] != 0
                            if sees:
                                seen |= 1 << r * COLS + c
                    if not cuda.syncthreads_or(np.int32(seen != 0)):
                        if WEIGHTS and weighing:
                            for r in range(ROWS):
                                for c in range(COLS):
                                    row, key = r * TY + ty, begin + c * TX + tx
                                    if row < n_rows and key < n_keys and first_dim == 0:
                                        write_out(weights, grid_at + row * n_keys + key, ZERO)
                        continue

                # ---- s = scale * q @ k.T
                for r in range(ROWS):
                    for c in range(COLS):
                        s[r, c] = ZERO
                k_at = at[K, bh] + begin * k_row
                n_here = min(BLOCK_K, n_keys - begin)
                for chunk in range(CHUNKS):
                    cuda.syncthreads()
                    done = chunk * CHUNK
                    left = HEAD_DIM - done
                    fetch_k(k, k_at + done * k_dim, k_row, k_dim, n_here, left, ONE, kv, t)
                    if not RESIDENT:
                        fetch_q(q, q_at + done * q_dim, q_row, q_dim, n_rows, left, scale, qs, t)
                    cuda.syncthreads()
                    q_from = done if RESIDENT else 0
                    for d in range(0, CHUNK, 4):
                        from_q = ty * Q_ROW + q_from + d & FOURS
                        from_k = tx * K_ROW + d & FOURS
                        for r in range(ROWS):
                            for u in range(4):
                                a[r, u] = qs[from_q + r * TY * Q_ROW + u]
                        for c in range(COLS):
                            for u in range(4):
                                b[u] = kv[from_k + c * TX * K_ROW + u]
                            for r in range(ROWS):
                                for u in range(4):
                                    s[r, c] += a[r, u] * b[u]

                # ---- softcap, bias, alibi, and -inf where hidden
                for r in range(ROWS):
                    row = r * TY + ty
                    i = first_row + row
                    of_row = i
                    if ALIBI:
                        query = min(i, n_queries - 1)
                        of_row = position[at[POSITION, bh] + query * strides[POSITION, 0]]
                    top = -INF
                    for c in range(COLS):
                        j = begin + c * TX + tx
                        sees = seen >> r * COLS + c & 1 != 0
                        x = s[r, c]
                        if SOFTCAP:
                            x = softcap * real(math.tanh(x / softcap))
                        if BIASED and sees:
                            y = read_bias(bias, bias_at + i * bias_row + j * bias_key)
                            if y == -INF:
                                sees = False
                                seen &= ~(1 << r * COLS + c)
                            elif abs(x) <= MOST and abs(y) <= MOST:
                                x = min(max(x + y, -MOST), MOST)
                            else:
                                x = x + y
                        if ALIBI:
                            slope = slopes[bh % heads]
                            y = x - slope * real(abs(of_row - j))
                            if abs(x) <= MOST and abs(slope) <= MOST:
                                y = min(max(y, -MOST), MOST)
                            x = y
                        if partial and not sees:
                            x = -INF
                        s[r, c] = x
                        if x > top:
                            top = x
                    if not weighing:
                        ps[row * P_ROW + tx] = top
                        if seen >> r * COLS & (1 << COLS) - 1:
                            row_saw[row] = 1

                if WEIGHTS and weighing:
                    for r in range(ROWS):
                        row = r * TY + ty
                        shift = row_top[row]
                        if shift == -INF:
                            shift = ZERO
                        for c in range(COLS):
                            key = begin + c * TX + tx
                            x = ZERO
                            if seen >> r * COLS + c & 1:
                                x = real(math.exp(s[r, c] - shift))
                                if shift != INF:  # else 0, or a NaN beside which others are 0
                                    x /= row_rescale[row]
                            if row < n_rows and key < n_keys and first_dim == 0:
                                write_out(weights, grid_at + row * n_keys + key, x)
                    continue

                # ---- the online softmax
                cuda.syncthreads()
                if t < BLOCK_Q:
                    top = ps[t * P_ROW]
                    for n in range(1, TX):
                        top = max(top, ps[t * P_ROW + n])
                    before = row_top[t]
                    now = max(before, top + margin)
                    row_top[t] = now
                    rescale = ONE  # an unchanged maximum may be an infinite sink
                    if now != before:
                        rescale = real(math.exp(before - now))
                    row_rescale[t] = rescale
                    row_factor[t] = rescale if since_fold == 0 else row_factor[t] * rescale
                cuda.syncthreads()
                for r in range(ROWS):
                    row = r * TY + ty
                    shift = row_top[row]
                    if shift == -INF:  # any finite number will do
                        shift = ZERO
                    rescale = row_rescale[row]
                    tile_sum = ZERO
                    for c in range(COLS):
                        x = real(math.exp(s[r, c] - shift))
                        # A negative zero adds nothing, and tells `careful` who is hidden.
                        if partial and seen >> r * COLS + c & 1 == 0:
                            x = HIDDEN
                        tile_sum += x
                        ps[row * P_ROW + c * TX + tx] = x
                    acc_sum[r] = acc_sum[r] * rescale + tile_sum
                    for n in range(SUMS):
                        acc[r, n] *= rescale

                # ---- acc += p @ v
                for first_key in range(0, BLOCK_K, V_KEYS):
                    cuda.syncthreads()
                    x_at = v_at + (begin + first_key) * v_row
                    wild = fetch_v(v, x_at, v_row, v_dim, n_here - first_key, n_cols, ONE, kv, t)
                    careful = False
                    if partial:
                        careful = cuda.syncthreads_or(np.int32(wild)) != 0
                    else:
                        cuda.syncthreads()
                    if careful:  # 0 * NaN is a NaN: leave out who is hidden
                        for key in range(V_KEYS):
                            for r in range(ROWS):
                                p = ps[(r * TY + ty) * P_ROW + first_key + key]
                                if math.copysign(ONE, p) > ZERO:
                                    for part in range(PARTS):
                                        for n in range(DIMS):
                                            d = (part * TX + tx) * DIMS + n
                                            acc[r, part * DIMS + n] += p * kv[key * V_ROW + d]
                    else:
                        for key in range(0, V_KEYS, 4):
                            from_p = ty * P_ROW + first_key + key & FOURS
                            from_v = key * V_ROW + tx * DIMS & COLUMNS
                            for r in range(ROWS):
                                for u in range(4):
                                    a[r, u] = ps[from_p + r * TY * P_ROW + u]
                            for u in range(4):
                                for part in range(PARTS):
                                    for n in range(DIMS):
                                        b[n] = kv[from_v + u * V_ROW + part * TX * DIMS + n]
                                    for r in range(ROWS):
                                        for n in range(DIMS):
                                            acc[r, part * DIMS + n] += a[r, u] * b[n]

                # ---- blocks of 512 keys: one sum over all of them would round too often
                since_fold += 1
                if since_fold == FOLD:
                    since_fold = 0
                    for r in range(ROWS):
                        factor = row_factor[r * TY + ty]
                        total_sum[r] = total_sum[r] * factor + acc_sum[r]
                        acc_sum[r] = ZERO
                        for n in range(SUMS):
                            total[r, n] = total[r, n] * factor + acc[r, n]
                            acc[r, n] = ZERO

            if weighing:
                if not again:
                    break
                weighing = False
                margin = wide_margin
                cuda.syncthreads()  # before what others still read is made anew
                continue
            # ---- the sums of the rows
            cuda.syncthreads()
            for r in range(ROWS):
                row = r * TY + ty
                factor = row_factor[row] if since_fold != 0 else ONE
                ps[row * P_ROW + tx] = total_sum[r] * factor + acc_sum[r]
                for n in range(SUMS):
                    acc[r, n] += total[r, n] * factor
            cuda.syncthreads()
            if t < BLOCK_Q:
                row_sum = ZERO
                for n in range(TX):
                    row_sum += ps[t * P_ROW + n]
                if SINKS:
                    sink = sinks[bh % heads]
                    if sink == INF:
                        row_sum += ONE
                    elif sink != -INF:
                        row_sum += real(math.exp(sink - row_top[t]))
                row_rescale[t] = row_sum
            cuda.syncthreads()
            # Sums of huge values: smaller weights keep them finite, unless it was v that was not.
            if margin == ZERO:
                for r in range(ROWS):
                    row_sum = row_rescale[r * TY + ty]
                    for n in range(SUMS):
                        if row_sum <= MOST and not abs(acc[r, n]) <= MOST:
                            lost |= 1 << r * SUMS + n
                again = cuda.syncthreads_or(np.int32(lost != 0)) != 0

            # ---- results
            for r in range(ROWS):
                row = r * TY + ty
                row_sum = row_rescale[row]
                share = NAN  # a key in sight and a sum of 0: scores of -inf, 0 / 0
                if row_sum != ZERO:
                    share = ONE / row_sum
                if row < n_rows:
                    to = at[OUT, bh] + (first_row + row) * strides[OUT, 0]
                    for part in range(PARTS):
                        for n in range(DIMS):
                            d = (part * TX + tx) * DIMS + n
                            x = acc[r, part * DIMS + n] * share
                            if margin != ZERO and abs(acc[r, part * DIMS + n]) <= MOST:
                                x = min(max(x, -MOST), MOST)  # a mean of such may be rounded up
                            if row_saw[row] == 0:
                                x = ZERO
                            own = margin == ZERO or lost >> r * SUMS + part * DIMS + n & 1 != 0
                            if d < n_cols and own:
                                write_out(out, to + (first_dim + d) * strides[OUT, 1], x)
            if LSE and t < n_rows and first_dim == 0 and margin == ZERO:
                row_lse = np.float64(row_top[t])
                if row_rescale[t] == ZERO:
                    row_lse = -math.inf
                elif row_top[t] != INF:
                    row_lse += math.log(np.float64(row_rescale[t]))
                lse[bh * n_queries + first_row + t] = row_lse
            if margin != ZERO:
                break
            if WEIGHTS:
                weighing = True
            elif again:
                margin = wide_margin
                cuda.syncthreads()
            else:
                break

    options = {} if spec.simulated else {"max_registers": tile.registers}
    return cuda.jit(attend, **options)


def reader(bfloat16: bool, clamp: bool, real):
    """A device function that makes an element of an array a number to compute with."""
    most = np.finfo(real).max

    def read(x, index):
        return real(x[index & POSITIVE])

    def read_clamped(x, index):  # a finite number stays one, however large
        y = np.float64(x[index & POSITIVE])
        if abs(y) < math.inf:
            y = min(max(y, -np.float64(most)), np.float64(most))
        return real(y)

    def read_bfloat16(x, index):  # it is the upper half of a float32
        return real(np.uint32(np.uint32(x[index & POSITIVE]) << 16).view(np.float32))

    chosen = read_bfloat16 if bfloat16 else read_clamped if clamp else read
    return cuda.jit(chosen, device=True)


def fetcher(read, rows, cols, to_row, threads, real):
    """A device function that copies `rows` x `cols` of an operand to shared memory, 0 beyond its
    end, and says whether this thread met a NaN or an Inf.
    """
    AT_ONCE = threads // cols  # rows; threads that are left over fetch nothing
    ROUNDS, ACTIVE = ceil_div(rows, AT_ONCE), AT_ONCE * cols
    ZERO, MOST = real(0), np.finfo(real).max

    def fetch(x, at, row_stride, dim_stride, n_rows, n_cols, factor, to, t):
        wild = False
        if t < ACTIVE:
            row, d = t // cols, t % cols
            x_at = at + row * row_stride + d * dim_stride
            for n in range(ROUNDS):
                y = ZERO
                if row + n * AT_ONCE < n_rows and d < n_cols:
                    y = read(x, x_at) * factor
                    wild |= not abs(y) <= MOST
                if row + n * AT_ONCE < rows:
                    to[(row + n * AT_ONCE) * to_row + d] = y
                x_at += AT_ONCE * row_stride
        return wild

    return cuda.jit(fetch, device=True)


def writer(bfloat16: bool):
    """A device function that stores a number."""

    def write(to, index, x):
        to[index & POSITIVE] = x

    def write_bfloat16(to, index, x):
        bits = np.int64(np.float32(x).view(np.uint32))
        if x != x:
            bits = 0x7FC00000
        else:  # to nearest, ties to even
            bits += 0x7FFF + (bits >> 16 & 1)
        to[index & POSITIVE] = np.uint16(bits >> 16)

    return cuda.jit(write_bfloat16 if bfloat16 else write, device=True)
