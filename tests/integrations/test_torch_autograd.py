"""Gradients against those that torch's autograd finds for the formula, in float64."""

import numpy as np
import pytest
from helpers.gradients import ARRAY_OPTIONS, random_like
from helpers.problems import Shape, options
from helpers.strategies import EVERY_OPTION, few, shapes, subsets
from hypothesis import given
from hypothesis import strategies as st

from fastattn import reference
from fastattn.core.problem import make_problem
from fastattn.dispatch import NAMED_ONLY

torch = pytest.importorskip("torch", reason="torch is the other side of these tests")


def formula(p, q, k, v, scale=None, bias=None, relative_bias=None, alibi=None, sinks=None):
    """``(out, lse)`` of `p` in torch's own operations; the rows that see a key or a sink."""
    group = p.heads // k.shape[-3]
    k, v = (x.repeat_interleave(group, dim=-3) for x in (k, v))
    scale = p.scale if scale is None else scale[..., None, None]
    s = scale * (q @ k.mT)
    if p.softcap is not None:
        s = p.softcap * torch.tanh(s / p.softcap)
    if bias is not None:
        s = s + bias
    if relative_bias is not None:
        heads, index = (torch.from_numpy(np.array(x)) for x in reference.distance_index(p))
        s = s + relative_bias[heads, index]
    if alibi is not None:
        i, j = reference.positions(p)
        s = s - alibi[:, None, None] * torch.from_numpy(np.abs(i - j).astype(float))
    s = s.masked_fill(~torch.from_numpy(reference.visible(p)), -torch.inf)
    if sinks is not None:
        s = torch.cat([s, sinks[:, None, None].expand(*s.shape[:-1], 1)], dim=-1)
    some = ~torch.isneginf(s).all(dim=-1, keepdim=True)
    s = torch.where(some, s, 0)
    weights = torch.where(some, torch.softmax(s, dim=-1), 0)
    lse = torch.where(some[..., 0], torch.logsumexp(s, dim=-1), 0)
    return weights[..., : p.n_keys] @ v, lse


def check_against_autograd(target, shape, names, seed):
    chosen = options(names, shape, seed)
    wrt = tuple(name for name in ARRAY_OPTIONS if name in chosen)
    q, k, v = shape.arrays("float64", seed)
    (out, lse), pullback = target.vjp(q, k, v, wrt=wrt, return_lse=True, **chosen)
    grads = random_like(out), random_like(lse, 8)
    found = pullback(*grads)

    p = make_problem(q, k, v, **chosen)
    tensors = [torch.from_numpy(np.array(x, float)).requires_grad_()
               for x in (q, k, v, *(chosen[name] for name in wrt))]  # fmt: skip
    theirs = formula(p, *tensors[:3], **dict(zip(wrt, tensors[3:], strict=True)))
    np.testing.assert_allclose(out, theirs[0].detach(), rtol=1e-12, atol=1e-12)
    wanted = torch.autograd.grad(theirs, tensors, [torch.from_numpy(x) for x in grads])
    for name, got, want in zip(("q", "k", "v", *wrt), found, wanted, strict=True):
        # Both round some hundred terms of ordinary size in float64; alibi's are up to 60 times it.
        size = 1 + want.abs().max().item() if want.numel() else 1
        got, want = np.nan_to_num(got), np.nan_to_num(want.numpy())
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12 * size, err_msg=name)


@pytest.mark.parametrize("names", [(), *((name,) for name in EVERY_OPTION)], ids="+".join)
def test_each_option(target, names):
    check_against_autograd(target, Shape(2, 4, 20, 30, 8, kv_heads=2, value_dim=5), names, 1)


@few
@given(shape=shapes(), names=subsets(EVERY_OPTION), seed=st.integers(0, 2**16))
def test_every_option(target, shape, names, seed):
    check_against_autograd(target, shape._replace(batch=2), names, seed)


@few
@given(shape=shapes(), names=subsets(EVERY_OPTION), seed=st.integers(0, 2**16))
def test_reference(target, shape, names, seed):
    """The definition itself, once."""
    if target.backend != "numpy":
        pytest.skip("the reference does not depend on the target")
    reference_target = target._replace(backend=NAMED_ONLY[0].name)
    check_against_autograd(reference_target, shape._replace(batch=2), names, seed)
