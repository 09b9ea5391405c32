"""Multi-head attention: projections around `scaled_dot`, with parameters that are NumPy arrays."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from . import torch_state
from .attention import solve
from .core.arguments import count, flag, plain, renamed, shaped
from .core.dtypes import chosen_dtype, float_dtype, widest
from .core.linear import project, rows
from .core.option_table import DIFFERENTIABLE, check
from .core.options import check_wrt
from .core.problem import make_problem
from .core.signatures import attention
from .jvp import has_tangents, pushed_forward, tangents_of
from .vjp import differentiated, differentiates

__all__ = ["MultiHeadAttention"]


class MultiHeadAttention:
    """Multi-head attention: projections of queries, keys, values and results around `scaled_dot`.

    It is ``concat(heads) @ w_o + b_o``, where head ``h`` is the attention of its columns of
    ``query @ w_q + b_q``, ``key @ w_k + b_k`` and ``value @ w_v + b_v``.

    Parameters
    ----------
    embed_dim : int
        Width of the query's vectors and of the result's; a multiple of `num_heads`.
    num_heads : int
        Each of dimension ``embed_dim // num_heads``.
    kv_heads : int, optional
        Heads of keys and values, a divisor of `num_heads`, which is the default: fewer are shared
        (grouped-query attention).
    key_dim : int, optional
        Width of the key's vectors; `embed_dim` by default.
    value_dim : int, optional
        Width of the value's vectors; `key_dim` by default.
    bias : bool, default True
        Add `b_q`, `b_k`, `b_v` and `b_o`.
    dtype : dtype, default float32
        Of the parameters: float16, bfloat16, float32 or float64.
    rng : numpy.random.Generator or seed, optional
        For the first values: uniform in ``+-sqrt(6 / (rows + columns))``, biases 0 (Glorot and
        Bengio, 2010, "Understanding the difficulty of training deep feedforward neural networks",
        equation 16).

    Attributes
    ----------
    w_q : ndarray, (embed_dim, embed_dim)
    w_k : ndarray, (key_dim, kv_heads * head_dim)
    w_v : ndarray, (value_dim, kv_heads * head_dim)
    w_o : ndarray, (embed_dim, embed_dim)
    b_q, b_k, b_v, b_o : ndarray, or None without bias
        They may be replaced by array_likes of the same shape, of any float dtype.

    Raises
    ------
    TypeError, ValueError
        The message begins with the argument's name.

    Notes
    -----
    Vaswani et al. (2017), "Attention Is All You Need", section 3.2.2.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> layer = fastattn.MultiHeadAttention(512, 8, rng=0)
    >>> x = np.random.default_rng(1).standard_normal((32, 10, 512), np.float32)
    >>> out, weights = layer(x, return_weights=True)
    >>> out.shape, weights.shape
    ((32, 10, 512), (32, 8, 10, 10))

    Across modalities, the words of a text may attend to the patches of a picture:

    >>> layer = fastattn.MultiHeadAttention(512, 8, kv_heads=2, key_dim=768, rng=0)
    >>> layer(x, np.ones((32, 196, 768), np.float32)).shape
    (32, 10, 512)
    """

    def __init__(
        self, embed_dim, num_heads, *,
        kv_heads=None, key_dim=None, value_dim=None, bias=True, dtype="float32", rng=None,
    ) -> None:  # fmt: skip
        self.embed_dim = count("embed_dim", embed_dim)
        self.num_heads = count("num_heads", num_heads)
        self.kv_heads = self.num_heads if kv_heads is None else count("kv_heads", kv_heads)
        self.key_dim = self.embed_dim if key_dim is None else count("key_dim", key_dim)
        self.value_dim = self.key_dim if value_dim is None else count("value_dim", value_dim)
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"num_heads: expected a divisor of embed_dim {embed_dim}, got {num_heads}"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"kv_heads: expected a divisor of num_heads {num_heads}, got {kv_heads}"
            )
        self.bias = flag("bias", bias)
        self.head_dim = self.embed_dim // self.num_heads
        dtype = chosen_dtype("dtype", dtype)
        try:
            rng = np.random.default_rng(rng)
        except (TypeError, ValueError) as error:
            raise type(error)(f"rng: expected a Generator or a seed, got {rng!r}") from None
        for name, shape in self._shapes().items():
            setattr(self, name, _first(name, shape, rng).astype(dtype))
        if not self.bias:
            self.b_q = self.b_k = self.b_v = self.b_o = None

    def __repr__(self):
        names = ("kv_heads", "key_dim", "value_dim", "bias")
        given = "".join(f", {name}={getattr(self, name)}" for name in names)
        return f"MultiHeadAttention({self.embed_dim}, {self.num_heads}{given})"

    @attention
    def __call__(self, query, key=None, value=None, **options):
        """Attend.

        Parameters
        ----------
        query : array_like, (..., Sq, embed_dim)
            What attends.
        key : array_like, (..., Sk, key_dim), optional
            `query` by default: self-attention. Leading axes broadcast.
        value : array_like, (..., Sk, value_dim), optional
            `key` by default.
        **options
            Of `fastattn.scaled_dot`, except ``out`` and ``block_table``; ``(..., Hq, Sq, Sk)``
            there is ``(..., num_heads, Sq, Sk)`` here.

        Returns
        -------
        out : ndarray, (..., Sq, embed_dim)
            The widest dtype of the inputs and the weights.
        lse, row_max : ndarray, (..., num_heads, Sq), if ``return_lse`` and ``return_max``
            Logarithm of each head's softmax denominator, and the largest score.
        weights : ndarray, (..., num_heads, Sq, Sk), if ``return_weights``
            Of each head.

        Raises
        ------
        TypeError, ValueError
            Before any work; the message begins with the argument's name.
        """
        backend = options.pop("backend", None)
        inputs, parameters, dtype = self._inputs(query, key, value, options)
        p = self._projected(
            inputs, parameters, dtype, lambda heads: make_problem(*heads, **options)
        )
        results = solve(p, backend, None)
        out, *rest = results if isinstance(results, tuple) else (results,)
        out = project(_merged(out), parameters["w_o"], parameters.get("b_o"), dtype)
        return (out, *rest) if rest else out

    @property
    def parameters(self) -> dict[str, np.ndarray]:
        """Those that there are, by name."""
        return {name: getattr(self, name) for name in self._shapes()}

    @classmethod
    def from_torch(cls, module):
        """The same layer as a ``torch.nn.MultiheadAttention``, with a copy of its parameters.

        Parameters
        ----------
        module : torch.nn.MultiheadAttention
            Its dropout is left out, as in its evaluation mode. Sequences are ``(..., length,
            width)`` here whatever its ``batch_first`` is.

        Returns
        -------
        MultiHeadAttention
            Its parameters in the module's dtype, on the CPU.

        Raises
        ------
        TypeError
            If `module` is no such layer.
        ValueError
            If it has ``add_bias_kv`` or ``add_zero_attn``.
        """
        needed = ("embed_dim", "num_heads", "kdim", "vdim", "in_proj_bias", "bias_k")
        if not all(hasattr(module, name) for name in needed):
            raise TypeError(
                f"module: expected a torch.nn.MultiheadAttention, got {type(module).__name__}"
            )
        if module.bias_k is not None or module.add_zero_attn:
            extra = "add_zero_attn" if module.bias_k is None else "add_bias_kv"
            raise ValueError(f"module: expected no add_bias_kv or add_zero_attn, got {extra}")
        layer = cls(
            module.embed_dim, module.num_heads, key_dim=module.kdim, value_dim=module.vdim,
            bias=module.in_proj_bias is not None,
        )  # fmt: skip
        layer.load_torch(module.state_dict())
        return layer

    def load_torch(self, state) -> None:
        """Take the parameters of a ``torch.nn.MultiheadAttention`` from its state dict.

        Parameters
        ----------
        state : mapping of str to tensor or array_like
            ``in_proj_weight`` or ``q_proj_weight``, ``k_proj_weight`` and ``v_proj_weight``;
            ``out_proj.weight``; with bias ``in_proj_bias`` and ``out_proj.bias``. They are copied.

        Raises
        ------
        TypeError, ValueError
            If one is missing, too many, of another shape, or none of real numbers; then nothing is
            changed.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state: expected a state dict, got {type(state).__name__}")
        arrays = torch_state.renamed({name: _array(name, value) for name, value in state.items()})
        shapes = self._shapes()
        if arrays.keys() != shapes.keys():
            raise ValueError(
                f"state: expected {sorted(shapes)} (w_o is out_proj.weight), got {sorted(arrays)}"
            )
        for name, shape in shapes.items():
            if arrays[name].shape != shape:
                got = arrays[name].shape
                raise ValueError(f"state: expected {name} of shape {shape}, got {got}")
        for name, x in arrays.items():
            setattr(self, name, np.array(x, order="C"))

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Of each parameter, in order."""
        inner = self.kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "w_q": (self.embed_dim, self.embed_dim),
            "w_k": (self.key_dim, inner),
            "w_v": (self.value_dim, inner),
            "w_o": (self.embed_dim, self.embed_dim),
        }
        if self.bias:
            shapes |= {f"b_{name[-1]}": shape[1:] for name, shape in shapes.items()}
        return shapes

    def _inputs(self, query, key, value, options):
        """``((query, key, value), parameters, dtype)``, checked, as are the names of `options`."""
        out = options.pop("out", None)
        if out is not None:
            raise TypeError(f"out: expected None, got {type(out).__name__}")
        check("MultiHeadAttention", options)
        key = query if key is None else key
        value = key if value is None else value
        inputs = {"query": query, "key": key, "value": value}
        arrays = {name: plain(name, x) for name, x in inputs.items()}
        widths = (self.embed_dim, self.key_dim, self.value_dim)
        for (name, x), width in zip(arrays.items(), widths, strict=True):
            float_dtype(name, x)
            if x.ndim < 2 or x.shape[-1] != width:
                raise ValueError(f"{name}: expected shape (..., length, {width}), got {x.shape}")
        n_keys, n_values = (arrays[name].shape[-2] for name in ("key", "value"))
        if n_values != n_keys:
            raise ValueError(f"value: expected length {n_keys} as in key, got {n_values}")
        given = self.parameters
        parameters = {
            name: shaped(name, given[name], shape) for name, shape in self._shapes().items()
        }
        dtype = widest({float_dtype(name, x) for name, x in (arrays | parameters).items()})
        return tuple(arrays.values()), parameters, dtype

    def _projected(self, inputs, parameters, dtype, pose):
        """What `pose` makes of q, k and v, each (..., heads, length, head_dim): these have their
        values after it, so that it finds what is wrong before any work.
        """
        widths = (parameters[f"w_{name}"].shape[1] for name in "qkv")
        into = [np.empty((*x.shape[:-1], n), dtype) for x, n in zip(inputs, widths, strict=True)]
        try:
            posed = pose(list(map(_split, into, (self.num_heads, self.kv_heads, self.kv_heads))))
        except (TypeError, ValueError) as error:
            raise renamed(error, {"q": "query", "k": "key", "v": "value"}) from None
        for name, x, out in zip("qkv", inputs, into, strict=True):
            project(x, parameters[f"w_{name}"], parameters.get(f"b_{name}"), dtype, out)
        return posed


@differentiates(MultiHeadAttention, 1, 3)
def _multi_head_attention(
    layer, query, key=None, value=None, *, wrt, backend=None, return_lse=False, **options
):  # fmt: skip
    inputs, parameters, dtype = layer._inputs(query, key, value, options)
    check_wrt(wrt, {**parameters, **{name: options.get(name) for name in DIFFERENTIABLE}})
    own = tuple(name for name in wrt if name in parameters)
    other = tuple(name for name in wrt if name not in own)

    def pose(heads):
        return make_problem(*heads, gradients=True, wrt=other, return_lse=True, **options)

    p = layer._projected(inputs, parameters, dtype, pose)
    results, back = differentiated(p, backend, return_lse)
    joined, *rest = results if isinstance(results, tuple) else (results,)
    joined = _merged(joined)
    w_q, w_k, w_v, w_o = (parameters[f"w_{name}"] for name in "qkvo")
    out = project(joined, w_o, parameters.get("b_o"), dtype)

    def pullback(grad_out, grad_lse=None):
        grad_out = shaped("grad_out", grad_out, out.shape)
        grads = {"o": grad_out.astype(dtype, copy=False)}
        heads = back(_split(project(grads["o"], w_o.T, None, dtype), layer.num_heads), grad_lse)
        grads |= zip("qkv", map(_merged, heads[:3]), strict=True)
        found = dict(zip(other, heads[3:], strict=True))
        for name, x in zip("qkvo", (*inputs, joined), strict=True):
            if f"w_{name}" in own:
                found[f"w_{name}"] = project(rows(x).T, rows(grads[name]), None, dtype)
            if f"b_{name}" in own:
                found[f"b_{name}"] = rows(grads[name]).sum(axis=0)
        dq, dk, dv = (
            project(grads[name], w.T, None, dtype)
            for name, w in zip("qkv", (w_q, w_k, w_v), strict=True)
        )
        if value is None:
            dk = dk + dv
        if key is None:
            dq = dq + dk
        given = [dq, *([] if key is None else [dk]), *([] if value is None else [dv])]
        return (*given, *(found[name] for name in wrt))

    return ((out, *rest) if rest else out), pullback


@has_tangents(MultiHeadAttention, least=1)
def _multi_head_attention_tangents(layer, arrays, tangents, **options):
    arrays = arrays + (None,) * (3 - len(arrays))
    tangents = tangents + tangents[-1:] * (3 - len(tangents))
    inputs, parameters, dtype = layer._inputs(*arrays, options)
    given = dict(zip("qkv", tangents, strict=True))
    moving = {
        name: project(t, parameters[f"w_{name}"], None, dtype)
        for name, t in given.items()
        if t is not None
    }
    heads = {"q": layer.num_heads, "k": layer.kv_heads, "v": layer.kv_heads}
    p, backend, return_lse = layer._projected(
        inputs, parameters, dtype, lambda heads: tangents_of(heads, options)
    )
    moving_heads = [_split(moving[x], n) if x in moving else None for x, n in heads.items()]
    found = pushed_forward(p, moving_heads, backend, return_lse)
    w_o, b_o = parameters["w_o"], parameters.get("b_o")
    (out, *lse), (d_out, *d_lse) = (x if isinstance(x, tuple) else (x,) for x in found)
    out, d_out = project(_merged(out), w_o, b_o, dtype), project(_merged(d_out), w_o, None, dtype)
    return ((out, *lse), (d_out, *d_lse)) if lse else (out, d_out)


def _first(name, shape, rng) -> np.ndarray:
    if len(shape) == 1:
        return np.zeros(shape)
    limit = np.sqrt(6 / sum(shape))
    return rng.uniform(-limit, limit, shape)


def _array(name, x) -> np.ndarray:
    """A tensor or an array as an array."""
    if hasattr(x, "detach"):
        x = x.detach().cpu()
    try:
        x = plain(name, x)
        float_dtype(name, x)
    except TypeError as error:
        raise TypeError(f"state: {error}") from None
    if not x.ndim:
        raise ValueError(f"state: expected {name} of 1 or 2 axes, got a number")
    return x


def _split(x, heads) -> np.ndarray:
    """(..., length, heads * dim) to (..., heads, length, dim), a view."""
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads).swapaxes(-2, -3)


def _merged(x) -> np.ndarray:
    """The inverse of `_split`; no copy is made of what `scaled_dot` returns for a split query."""
    x = x.swapaxes(-2, -3)
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])
