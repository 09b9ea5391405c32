"""The public function: words in, arrays out."""

from __future__ import annotations

from .core.device_array import DeviceArray
from .core.problem import Problem, make_problem
from .core.signatures import attention
from .dispatch import select
from .plans import keep_plan, plan_key, plans, run_plan

__all__ = ["prepare", "scaled_dot", "solve"]


@attention
def scaled_dot(
    q, k, v, *,
    scale=None, softcap=None, bias=None, relative_bias=None, alibi=None, sinks=None,
    causal=False, window=None, q_offset=None, kv_lengths=None, spans=None, mask=None,
    block_table=None,
    dropout=None, dropout_offset=None,
    return_lse=False, return_max=False, return_weights=False, out=None,
    backend=None, threads=None, precision=None,
):  # fmt: skip
    """Exact softmax attention, ``softmax(scale * q @ k.T) @ v``, in O(S) memory.

    Parameters
    ----------
    q : array_like, (..., Hq, Sq, D)
        Queries; ``(Sq, D)`` is one head. Any strides: a transposed view
        ``x.swapaxes(1, 2)`` of ``(B, S, H, D)`` is the sequence-first layout and is not copied.
        Here and below, arrays of other libraries in the host's memory (torch, JAX, whatever has
        ``__dlpack__``) are read where they lie, bfloat16 too.
    k : array_like, (..., Hkv, Sk, D)
        Keys. Leading axes broadcast by NumPy's rules. Where `Hq` is a multiple of `Hkv`, query head
        ``h`` reads key head ``h // (Hq // Hkv)`` (grouped-query and multi-query attention).
    v : array_like, (..., Hkv, Sk, Dv)
        Values; `Dv` may differ from `D`.
    scale : float or array_like, (Hq,), optional
        Factor of the dot products, one for all query heads or one for each; ``1 / sqrt(D)`` by
        default.
    softcap : float, optional
        Bounds the scaled scores smoothly: ``softcap * tanh(score / softcap)``; finite and > 0, the
        same for all heads.
    bias : array_like of real numbers, optional
        Added to the scores; broadcastable to ``(..., Hq, Sq, Sk)``. ``-inf``, and nothing else,
        hides the key.
    relative_bias : array_like of real numbers, (Hq, 2 * R + 1), optional
        A bias for each distance of a key: ``relative_bias[h, clip(j - (i + q_offset), -R, R) + R]``
        is added to the score of query ``i`` and key ``j``. ``-inf`` hides the key here too.
        `t5_relative_bias` makes one of T5's table.
    alibi : array_like, (Hq,), optional
        Slopes: ``alibi[h] * abs(i + q_offset - j)`` is subtracted from the score of query ``i``
        and key ``j``.
    sinks : array_like, (Hq,), optional
        A logit per head that takes part in the softmax but has no value.
    causal : bool, default False
        Hide the keys ``j > i + q_offset``.
    window : int or (left, right), optional
        Show the keys ``i + q_offset - left <= j <= i + q_offset + right`` only; None on a side is
        unbounded, an int stands for both.
    q_offset : int or array_like of int, optional
        Position of the first query on the key axis, broadcastable to the leading axes. The default
        ``Sk - Sq`` lets the last query see the last key; 0 aligns the first ones. Required with
        `kv_lengths` if any of `causal`, `window`, `alibi` and `relative_bias` is given: 0 for a
        padded batch of whole sequences, ``kv_lengths - Sq`` for a cache.
    kv_lengths : array_like of int, optional
        Hide the keys ``j >= kv_lengths``; broadcastable to the leading axes, in ``0..Sk``.
    spans : (start, stop), optional
        Show the keys ``start[i] <= j < stop[i]`` only; ints broadcastable to ``(..., Hq, Sq)``,
        clipped to ``0..Sk``.
    mask : array_like of bool, or CSR array of scipy.sparse, optional
        Hide the keys where it is False; broadcastable to ``(..., Hq, Sq, Sk)``. A CSR array or
        matrix of shape ``(Sq, Sk)`` shows what it has an entry for that is not zero, to all heads;
        a sequence has one for each entry of the last leading axis. Time and memory follow the
        number of entries.
    block_table : array_like of int, (batch, pages), optional
        The keys lie in pages: `q` is ``(batch, Hq, Sq, D)``, `k` ``(n_pages, Hkv, page, D)`` and
        `v` ``(n_pages, Hkv, page, Dv)`` are a pool, and key ``j`` of entry ``b`` is row
        ``j % page`` of page ``block_table[b, j // page]``. The first axis may be 1, pages may be
        shared, ``Sk = pages * page`` is the key axis of all other options, and `kv_lengths` is
        required. An entry that no query of its sequence can need, beyond its length or hidden by
        `causal`, `window` or `spans` from all of them, may be any number.
    dropout : (rate, seed), optional
        After the softmax drop each weight with the probability `rate`, ``0 <= rate < 1``, and
        divide the others by ``1 - rate``. The seed, in ``0..2**64 - 1``, and the place of a weight
        alone say whether it is dropped: see Notes. `lse` and `weights` are those without dropout; a
        rate of 0 is none.
    dropout_offset : (b, h, i, j), optional
        Where in a larger call this one starts, of the flattened leading axes, the query heads, the
        queries and the keys: it drops what the whole drops there. In ``0..2**63 - 1``; zeros by
        default.
    return_lse : bool, default False
        Also return the logarithm of the softmax's denominator.
    return_max : bool, default False
        Also return each row's largest score.
    return_weights : bool, default False
        Also return the softmax weights, the only Sq x Sk array that is ever made.
    out : ndarray, (..., Hq, Sq, Dv), optional
        Filled and returned; of the promoted dtype. It may overlap the inputs, not itself.
    backend : {"cython", "cuda", "numba", "numpy", "reference"}, optional
        Use that one, or fail saying why it cannot serve. By default the environment's
        ``FASTATTN_BACKEND``, else the first that can; ``cuda``, which copies NumPy arrays to a GPU
        and the results back, only if named.
    threads : int, optional
        How many to use at most. By default the environment's ``FASTATTN_NUM_THREADS``, else the
        least of the OpenMP setting, the CPU affinity and the cgroup's quota. The result does not
        depend on it. The ``numpy`` backend leaves threads to its BLAS.
    precision : {"bfloat16"}, optional
        Multiply float32 inputs as bfloat16 where a kernel can (AMX, AVX512_BF16, BFMMLA; more
        than 16 queries per key head), sums in float32 still: for standard normal inputs results are
        off by 0.35 % of their root mean square. Elsewhere it changes nothing; `explain` says which.

    Returns
    -------
    out : ndarray, (..., Hq, Sq, Dv)
        The widest dtype of `q`, `k` and `v` (float16, bfloat16, float32 or float64; integers and
        bools count as float64, float16 with bfloat16 as float32), in the memory order of `q`.
    lse : ndarray, (..., Hq, Sq), if `return_lse`
        Natural logarithm; float32, or float64 for float64 inputs.
    row_max : ndarray, (..., Hq, Sq), if `return_max`
        The largest score among the keys that the query sees, with all that is added to it; ``-inf``
        if there is none. Sinks do not count. Of the dtype of `lse`.
    weights : ndarray, (..., Hq, Sq, Sk), if `return_weights`
        0 where a key is hidden.

    Raises
    ------
    TypeError, ValueError
        Before any work; the message begins with the argument's name.
    MemoryError
        If the result or a few hundred KiB of scratch per thread cannot be had.

    Notes
    -----
    The score of query ``i`` and key ``j`` is made in this order: scale, softcap, bias,
    relative_bias, alibi. A query that sees no key gets 0 (and an lse of ``-inf``, or its sink). A
    key that a query does not see never touches its result, whatever NaN or Inf it holds. Numbers
    beyond the range in which sums are kept (of the options, or a score) act as its largest finite
    number; a bias of ``inf`` makes its row NaN, and a sink of ``inf`` takes all the weight.

    Dropout is by Philox4x32-7, a generator of counters: Salmon et al. (2011), "Parallel Random
    Numbers: As Easy as 1, 2, 3". Of the flattened leading index ``b`` of the result, the query head
    ``h``, the query ``i`` and the key ``j``, `dropout_offset` included, the first two words of the
    counter ``(b, b >> 32, h, h >> 32)`` under the key ``(seed, seed >> 32)`` are the key under
    which the counter ``(j // 8, j // 8 >> 32, i, i >> 32)`` gives four words of 32 bits for eight
    keys (words lowest first). Key ``j`` has word ``j % 8 // 2``, an odd one with the halves of its
    word exchanged, and is dropped if that is below ``rate * 2**32``, rounded: the rate has steps of
    2**-32. No backend, number of threads, block or slice changes it. A key that is dropped still
    counts as seen: a NaN in its value makes NaN of its column.

    The indices of a CSR array may be in any order, and an entry stored twice counts once: it is
    seen if any of its values is not zero. With them the keys of a query are gathered one by one, so
    a mask with more than some percent of entries is faster as a dense one.

    `q`, `k` and `v` are read where they lie, each in a dtype of its own; copies are made only of
    integers and bools, and of what is byte-swapped or misaligned.

    Arrays on a CUDA device (of torch, CuPy, Numba: what has ``__cuda_array_interface__``) are read
    there by the ``cuda`` backend. `q`, `k`, `v`, `mask`, `bias` and `out` must all be there or all
    in the host's memory, where the other arguments belong. The results are arrays of torch or CuPy
    if `q` is, of Numba otherwise; as in those libraries, the call may return before they are
    computed, and what is done next on the same stream waits.

    Attention is Vaswani et al. (2017), "Attention Is All You Need", equation 1; grouped heads are
    Ainslie et al. (2023), section 2; ALiBi is Press et al. (2022), section 3; block tables are Kwon
    et al. (2023), "Efficient Memory Management for Large Language Model Serving with
    PagedAttention", section 4.1. It is computed block by block as in Dao et al. (2022),
    "FlashAttention", algorithm 1. Learned biases of clipped distances are Shaw et al. (2018),
    "Self-Attention with Relative Position Representations", section 3.1, with numbers for their
    vectors, as in Raffel et al. (2020), "Exploring the Limits of Transfer Learning with a Unified
    Text-to-Text Transformer", section 2.1.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> rng = np.random.default_rng(0)
    >>> q = rng.standard_normal((8, 1000, 64), dtype=np.float32)  # heads, queries, head_dim
    >>> k = rng.standard_normal((2, 3000, 64), dtype=np.float32)  # each read by 4 heads of q
    >>> v = rng.standard_normal((2, 3000, 64), dtype=np.float32)
    >>> fastattn.scaled_dot(q, k, v, causal=True).shape
    (8, 1000, 64)

    Integers are welcome, and small enough examples can be checked by hand:

    >>> out, weights = fastattn.scaled_dot([[1, 0]], [[1, 0], [0, 1]], [[2, 0], [0, 2]],
    ...                                    return_weights=True)
    >>> weights.round(3)
    array([[0.67, 0.33]])
    >>> out.round(3)
    array([[1.34, 0.66]])
    """
    arrays = (q, k, v)
    key = plan_key(arrays, (
        scale, softcap, bias, relative_bias, alibi, sinks, causal, window, q_offset, kv_lengths,
        spans, mask, block_table, dropout, dropout_offset, return_lse, return_max, return_weights,
        out, backend, threads, precision,
    ))  # fmt: skip
    plan = plans.get(key)
    if plan:
        return run_plan(plan, arrays, threads)
    problem = make_problem(
        q, k, v, scale, softcap, bias, alibi, sinks,
        causal, window, q_offset, kv_lengths, spans, mask,
        return_lse, return_weights, out, threads, precision, block_table=block_table,
        relative_bias=relative_bias, return_max=return_max,
        dropout=dropout, dropout_offset=dropout_offset,
    )  # fmt: skip
    result = solve(problem, backend, out)
    if key is not None:
        keep_plan(key, prepare, problem, backend)
    return result


def prepare(problem: Problem, backend: str | None, of_cache: bool = False):
    """A plan for further calls of the kind of `problem`, by the backend that serves it, or None."""
    chosen = select(problem, backend)
    return chosen.prepare(problem, of_cache) if hasattr(chosen, "prepare") else None


def solve(problem: Problem, backend: str | None, out, run=None):
    """Solve a problem; the results in their order of return, in the caller's `out` if given. It is
    run by `run`, or by the backend.
    """
    run = run or select(problem, backend).run
    result = problem.new_result() if problem.out is None else problem.out
    lse, row_max, weights = run(problem, result)
    if problem.out is not None:
        result = out
    else:
        if isinstance(result, DeviceArray):
            result = result.owner
        elif problem.one_head:
            result = result[0]
        if out is not None:
            out[:] = result
            result = out
    if problem.one_head and not problem.on_device:
        lse, row_max, weights = (None if x is None else x[0] for x in (lse, row_max, weights))
    if lse is row_max is weights is None:
        return result
    return (result, *(x for x in (lse, row_max, weights) if x is not None))
