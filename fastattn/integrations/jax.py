"""Attention on JAX's arrays on the CPU, without copies, under `jit`, `grad` and `vmap`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..core.arguments import flag, number, plain, renamed
from ..core.options import dropout_of, dropout_start, span_sides, window_sides
from .jax_operators import Call, attend

__all__ = ["dot_product_attention", "scaled_dot"]


def dot_product_attention(
    query, key, value, bias=None, mask=None, *,
    scale=None, is_causal=False, query_seq_lengths=None, key_value_seq_lengths=None,
    local_window_size=None, implementation=None, return_residual=False,
):  # fmt: skip
    """``jax.nn.dot_product_attention``, by fastattn.

    Parameters
    ----------
    query : Array, (B, T, N, H) or (T, N, H)
        On the CPU, as all operands; float16, bfloat16, float32 or float64.
    key : Array, (B, S, K, H) or (S, K, H)
        `N` is a multiple of `K`.
    value : Array, (B, S, K, H) or (S, K, H)
        Values.
    bias : Array, optional
        Added to the scores; broadcastable to ``(B, N, T, S)``.
    mask : Array of bool, optional
        True where a query may see a key; broadcastable to ``(B, N, T, S)``.
    scale : float, optional
        ``1 / sqrt(H)`` by default. One of JAX's arrays, traced or not, multiplies `query`.
    is_causal : bool, default False
        Query ``t`` sees the keys ``s <= t``, whatever the lengths.
    query_seq_lengths, key_value_seq_lengths : Array of int, (B,), optional
        What lies beyond is padding: hidden as a key, 0 as a result.
    local_window_size : int or (left, right), optional
        Query ``t`` sees the keys ``t - left <= s <= t + right``.
    implementation : None
        The others are JAX's.
    return_residual : bool, default False
        Also return the logarithm of the softmax's denominator; no gradient passes through it.

    Returns
    -------
    out : Array, shaped as `query`
        A query that sees no key gets 0 (from JAX, unless it is padding, the mean of all values).
    residual : Array, (B, T, N) or (T, N), if `return_residual`
        In the dtype of `key`; ``-inf`` where a query sees no key.

    Raises
    ------
    TypeError, ValueError
        When it is traced; the message begins with the argument's name.
    NotImplementedError
        For forward mode of forward mode, and for third derivatives.

    Notes
    -----
    Reverse and forward mode work, with one over the other for second derivatives, as in
    `jax.hessian`. Tangents and second derivatives are computed by NumPy.

    Examples
    --------
    >>> import jax
    >>> from fastattn.integrations.jax import dot_product_attention
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 100, 8, 64))
    >>> theirs = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    >>> ours = jax.jit(dot_product_attention, static_argnames="is_causal")(q, k, v, is_causal=True)
    >>> bool(jax.numpy.allclose(ours, theirs, atol=1e-5))
    True
    """
    if implementation is not None:
        raise ValueError(f"implementation: expected None, fastattn's own, got {implementation!r}")
    operands = {"query": query, "key": key, "value": value}
    q, k, v = (_with_batch(name, _array(name, x)) for name, x in operands.items())
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        raise ValueError(
            "query: expected the same batch as key and value, "
            f"{k.shape[0]} and {v.shape[0]}, got {q.shape[0]}"
        )
    arrays = {"bias": bias, "mask": mask}
    if query_seq_lengths is not None or key_value_seq_lengths is not None:
        lengths = {"query_seq_lengths": query_seq_lengths,
                   "key_value_seq_lengths": key_value_seq_lengths}  # fmt: skip
        n_queries, n_keys = (_lengths(name, x, q.shape[0]) for name, x in lengths.items())
        arrays["stop"] = _stops(q.shape[1], k.shape[1], n_queries, n_keys)
    try:
        out, *lse = _attend(
            q, k, v, arrays, sequence_first=True, return_lse=return_residual, scale=scale,
            causal=is_causal, q_offset=0, window=local_window_size,
        )  # fmt: skip
    except (TypeError, ValueError) as error:
        raise renamed(error, _NAMES) from None
    out = out.reshape(*jnp.shape(query)[:-1], out.shape[-1])
    if not lse:
        return out
    residual = jax.lax.stop_gradient(lse[0]).swapaxes(-1, -2).astype(k.dtype)
    return out, residual.reshape(out.shape[:-1])


def scaled_dot(
    q, k, v, *,
    scale=None, softcap=None, bias=None, relative_bias=None, alibi=None, sinks=None,
    causal=False, window=None, q_offset=None, kv_lengths=None, spans=None, mask=None,
    dropout=None, dropout_offset=None,
    return_lse=False, backend=None, threads=None, precision=None,
):  # fmt: skip
    """`fastattn.scaled_dot` on JAX's arrays, with gradients.

    They are those of `q`, `k`, `v`, `bias`, `relative_bias`, `alibi` and `sinks`.

    Parameters
    ----------
    q, k, v : Array, (..., heads, length, dim)
        On the CPU; float16, bfloat16, float32 or float64.
    bias, relative_bias, alibi, sinks : Array or as in `fastattn.scaled_dot`
    q_offset, kv_lengths, spans, mask : Array or as in `fastattn.scaled_dot`
        JAX's arrays may be traced.
    dropout : (rate, key), optional
        As in `fastattn.scaled_dot`, with a key of `jax.random`, traced or not, in place of the
        seed, which may be a number too. `jax.vmap` gives every place the same dropout, unless it
        maps the key.
    scale, softcap, causal, window, dropout_offset, return_lse, backend, threads, precision
        As in `fastattn.scaled_dot`. A scale of JAX's, traced or not, multiplies `q`; the others
        cannot be traced, which is a TypeError.

    Returns
    -------
    out : Array, (..., Hq, Sq, Dv)
        As of `fastattn.scaled_dot`.
    lse : Array, (..., Hq, Sq), if `return_lse`
        It passes gradients on, too.

    Raises
    ------
    TypeError, ValueError
        When it is traced, as `fastattn.scaled_dot`; with gradients `backend` must compute them,
        too. Lengths out of range are found when it runs, and make an error of JAX's.
    NotImplementedError
        As of `dot_product_attention`, whose notes hold here, too.

    Examples
    --------
    >>> import jax
    >>> from fastattn.integrations.jax import scaled_dot
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 8, 100, 64))
    >>> def loss(sinks):
    ...     return (scaled_dot(q, k, v, causal=True, window=20, sinks=sinks) ** 2).sum()
    >>> jax.grad(loss)(jax.numpy.zeros(8)).shape
    (8,)
    """
    q, k, v = (_array(name, x) for name, x in zip("qkv", (q, k, v), strict=True))
    start, stop = (None, None) if spans is None else span_sides(spans)
    arrays = {"bias": bias, "relative_bias": relative_bias, "mask": mask, "alibi": alibi,
              "sinks": sinks, "kv_lengths": kv_lengths, "start": start, "stop": stop}  # fmt: skip
    options = {"scale": scale, "softcap": softcap, "causal": causal, "window": window,
               "threads": threads, "precision": precision}  # fmt: skip
    if dropout is not None:
        options["rate"], arrays["seed"] = _rate_and_seed(dropout)
        options["dropout_offset"] = dropout_start(dropout_offset)
    (options if q_offset is None or isinstance(q_offset, int) else arrays)["q_offset"] = q_offset
    results = _attend(q, k, v, arrays, return_lse=return_lse, backend=backend, **options)
    if q.ndim == k.ndim == v.ndim == 2:
        results = [x[0] for x in results]
    return tuple(results) if return_lse else results[0]


_NAMES = {"q": "query", "k": "key", "v": "value", "causal": "is_causal",
          "window": "local_window_size", "return_lse": "return_residual"}  # fmt: skip
_WORDS = {"start": "spans", "stop": "spans", "seed": "dropout"}  # where an operand's is another

# How many axes an array has less than q, k and v if given in full; slopes and sinks always are.
_FEWER_AXES = {
    "q": 0, "k": 0, "v": 0, "bias": 0, "mask": 0, "start": 1, "stop": 1, "q_offset": 3,
    "kv_lengths": 3,
}  # fmt: skip


def _rate_and_seed(dropout) -> tuple[float, jax.Array]:
    """The seed as two words of 32 bits, the lower one first."""
    if not isinstance(dropout, (tuple, list)) or not isinstance(dropout[-1], jax.Array):
        dropout_of(dropout, None)
        rate, seed = dropout
        words = np.array([int(seed) & 0xFFFFFFFF, int(seed) >> 32], np.uint32)
        return float(rate), jnp.asarray(words)
    if len(dropout) != 2:
        raise ValueError(f"dropout: expected (rate, key), got {len(dropout)} items")
    rate, key = dropout
    dropout_of((rate, 0), None)
    return float(rate), jax.random.bits(key, (2,), "uint32")


def _attend(
    q, k, v, arrays: dict[str, Any], return_lse, sequence_first=False, backend=None, **options
):  # fmt: skip
    """``[out]`` or ``[out, lse]`` of arrays with all their axes: `jax.vmap` adds its own in front
    of them.
    """
    axes = max(q.ndim, k.ndim, v.ndim, 3)
    for name, x in {"q": q, "k": k, "v": v}.items():
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(
                f"{name}: expected float16, bfloat16, float32 or float64, got {x.dtype}"
            )
    for name, x in {**options, "return_lse": return_lse}.items():
        if name != "scale":
            _check_static(name, x)
    arrays = {"q": q, "k": k, "v": v, **arrays}
    if isinstance(options["scale"], jax.Array):  # traced perhaps, and with a gradient
        arrays["q"], options["scale"] = _scaled(q, options["scale"]), 1.0
    for name in ("scale", "softcap"):
        if options.get(name) is not None:
            options[name] = number(name, options[name])
    given = {name: _array(_WORDS.get(name, name), x) for name, x in arrays.items() if x is not None}
    operands = [_expanded(x, axes - _FEWER_AXES.get(name, axes)) for name, x in given.items()]
    if options["window"] is not None:
        options["window"] = window_sides(options["window"])
    typed = tuple((name, type(x), x) for name, x in options.items())
    return_lse = flag("return_lse", return_lse)
    call = Call(tuple(given), typed, backend, return_lse, axes, sequence_first)
    return attend(call, *operands)


def _array(name: str, x):
    """One of JAX's, or an error that begins with `name`."""
    if isinstance(x, jax.Array):
        return x
    x = plain(name, x)
    try:
        return jnp.asarray(x)
    except TypeError:
        raise TypeError(f"{name}: expected numbers that JAX has, got {x.dtype}") from None


def _check_static(name: str, x) -> None:
    """An error if an option is traced: only arrays and the scale can be."""
    for value in x if isinstance(x, (tuple, list)) else (x,):
        if isinstance(value, jax.core.Tracer):
            raise TypeError(
                f"{name}: expected a value that is known when it is traced, got a tracer; name it "
                "in static_argnames of jax.jit, there is no gradient of it"
            )


def _scaled(q, scale):
    if scale.ndim:
        raise ValueError(f"scale: expected a real number, got array of shape {scale.shape}")
    return q * scale.astype(q.dtype)


def _expanded(x, axes: int):
    return jnp.expand_dims(x, range(axes - x.ndim))


def _with_batch(name: str, x):
    if x.ndim not in (3, 4):
        raise ValueError(f"{name}: expected 3 or 4 axes, (batch, length, heads, dim), got {x.ndim}")
    return _expanded(x, 4)


def _lengths(name: str, value, batch: int):
    if value is None:
        return None
    x = _array(name, value)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"{name}: expected integers, got {x.dtype}")
    if x.shape != (batch,):
        raise ValueError(f"{name}: expected shape ({batch},), one per sequence, got {x.shape}")
    return x[:, None]


def _stops(n_queries: int, n_keys: int, query_lengths, key_lengths):
    """Where the keys end that a query sees, (B, 1, T or 1)."""
    stop = jnp.asarray(n_keys) if key_lengths is None else key_lengths
    if query_lengths is not None:
        stop = jnp.where(jnp.arange(n_queries) < query_lengths, stop, 0)
    return stop[:, None]
