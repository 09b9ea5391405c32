"""Attention on JAX's arrays on the CPU, without copies, under `jit`, `grad` and `vmap`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..core.arguments import integer, number, plain, renamed
from ..core.option_table import OPTIONS, PARTS, check, split
from .jax_operators import LEADING, Call, attend

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
    options = {"bias": bias, "mask": mask, "scale": scale, "causal": is_causal, "q_offset": 0,
               "window": local_window_size, "return_lse": return_residual}  # fmt: skip
    if query_seq_lengths is not None or key_value_seq_lengths is not None:
        lengths = {"query_seq_lengths": query_seq_lengths,
                   "key_value_seq_lengths": key_value_seq_lengths}  # fmt: skip
        n_queries, n_keys = (_lengths(name, x, q.shape[0]) for name, x in lengths.items())
        options["spans"] = 0, _stops(q.shape[1], k.shape[1], n_queries, n_keys)
    try:
        out, *lse = _attend(q, k, v, options, sequence_first=True)
    except (TypeError, ValueError) as error:
        raise renamed(error, _NAMES) from None
    out = out.reshape(*jnp.shape(query)[:-1], out.shape[-1])
    if not lse:
        return out
    residual = jax.lax.stop_gradient(lse[0]).swapaxes(-1, -2).astype(k.dtype)
    return out, residual.reshape(out.shape[:-1])


def scaled_dot(q, k, v, **options):
    """`fastattn.scaled_dot` on JAX's arrays, with gradients.

    They are those of `q`, `k`, `v`, `scale`, `bias`, `relative_bias`, `alibi` and `sinks`.

    Parameters
    ----------
    q, k, v : Array, (..., heads, length, dim)
        On the CPU; float16, bfloat16, float32 or float64.
    **options
        As of `fastattn.scaled_dot`, except ``block_table``, ``out`` and ``return_weights``. Arrays
        may be JAX's, traced or not, and so may `scale`, which multiplies `q` where it is one
        number, and the numbers of `dropout_offset`. The seed of `dropout` may be a key of
        `jax.random`, traced or not. Other options cannot be traced, which is a TypeError.
        `jax.vmap` gives every place the same dropout, unless it maps the key or the offset.

    Returns
    -------
    out : Array, (..., Hq, Sq, Dv)
        As of `fastattn.scaled_dot`.
    lse : Array, (..., Hq, Sq), if `return_lse`
        It passes gradients on, too.
    row_max : Array, (..., Hq, Sq), if `return_max`
        It passes none on.

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
    check("jax", options)
    q, k, v = (_array(name, x) for name, x in zip("qkv", (q, k, v), strict=True))
    results = _attend(q, k, v, options)
    if q.ndim == k.ndim == v.ndim == 2:
        results = [x[0] for x in results]
    return tuple(results) if len(results) > 1 else results[0]


_NAMES = {"q": "query", "k": "key", "v": "value", "causal": "is_causal",
          "window": "local_window_size", "return_lse": "return_residual"}  # fmt: skip


def _attend(q, k, v, options: dict[str, Any], sequence_first=False) -> list[jax.Array]:
    """``[out]``, then lse and the maximum if asked, of arrays with all their axes: `jax.vmap` adds
    its own in front of them.
    """
    axes = max(q.ndim, k.ndim, v.ndim, 3)
    for name, x in {"q": q, "k": k, "v": v}.items():
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(
                f"{name}: expected float16, bfloat16, float32 or float64, got {x.dtype}"
            )
    options = {name: x for name, x in options.items() if x is not None}
    for name, x in options.items():
        if not OPTIONS[name].takes_arrays:
            _check_static(name, x)
    if "softcap" in options:
        options["softcap"] = number("softcap", options["softcap"])
    if "scale" in options and np.ndim(options["scale"]) != 1:
        q, options["scale"] = _scaled(q, options["scale"])
    if "dropout_offset" in options:
        options["dropout_offset"] = _offset(options["dropout_offset"])
    arrays, values = split(options)
    if "seed" in arrays:
        arrays["seed"] = _words(arrays["seed"])
    return_lse, return_max = (values.pop(x, False) for x in ("return_lse", "return_max"))
    backend = values.pop("backend", None)
    named = {"q": q, "k": k, "v": v}
    named |= {name: _array(PARTS[name].option, x) for name, x in arrays.items()}
    operands = [
        jnp.expand_dims(x, range(axes - 3 + len(LEADING[name]) - x.ndim)) if name in LEADING else x
        for name, x in named.items()
    ]
    typed = tuple((name, type(x), x) for name, x in values.items())
    call = Call(tuple(named), typed, backend, return_lse, return_max, axes, sequence_first)
    return attend(call, *operands)


def _words(seed) -> jax.Array:
    """The seed as two words of 32 bits, the lower one first, or those that a key gives."""
    if isinstance(seed, jax.Array):
        try:
            return jax.random.bits(seed, (2,), "uint32")
        except (TypeError, ValueError):
            what = f"{seed.dtype} of shape {seed.shape}"
            raise TypeError(f"dropout: expected a key of jax.random, got {what}") from None
    return jnp.asarray(np.array([int(seed) & 0xFFFFFFFF, int(seed) >> 32], np.uint32))


def _offset(value):
    """The numbers of `dropout_offset`, as an array if one of them is one of JAX's."""
    if not (isinstance(value, (tuple, list)) and any(isinstance(x, jax.Array) for x in value)):
        return value
    items = [x if isinstance(x, jax.Array) else integer("dropout_offset", x) for x in value]
    for x in items:
        if np.ndim(x):
            raise TypeError(f"dropout_offset: expected an integer, got array of shape {x.shape}")
    try:
        return jnp.stack([jnp.asarray(x) for x in items])
    except OverflowError as error:
        raise ValueError(
            f"dropout_offset: expected numbers that JAX has, beside one of its own, got {error}"
        ) from None


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


def _scaled(q, scale) -> tuple[jax.Array, float]:
    """`q` times a scale that is traced, perhaps, and has a gradient; and the scale that is left."""
    if isinstance(scale, jax.Array):
        if scale.ndim:
            raise ValueError(
                f"scale: expected a number, or one per query head, got array of shape {scale.shape}"
            )
        return q * scale.astype(q.dtype), 1.0
    return q, number("scale", scale)


def _with_batch(name: str, x):
    if x.ndim not in (3, 4):
        raise ValueError(f"{name}: expected 3 or 4 axes, (batch, length, heads, dim), got {x.ndim}")
    return jnp.expand_dims(x, range(4 - x.ndim))


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
