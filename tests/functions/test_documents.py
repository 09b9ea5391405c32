"""Packed documents (contract, sections 1 and 3)."""

import numpy as np
import pytest

import fastattn


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths_k", [None, [7, 0, 3, 11]])
def test_each_document_by_itself(target, lengths_k, causal):
    lengths_q = [5, 4, 0, 20]
    keys = lengths_q if lengths_k is None else lengths_k
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, n, 8)) for n in (sum(lengths_q), sum(keys), sum(keys)))
    spans = fastattn.document_spans(lengths_q, lengths_k, causal=causal)
    out = target.attend(q, k, v, spans=spans)
    i, j = 0, 0
    for n_queries, n_keys in zip(lengths_q, keys, strict=True):
        rows, columns = slice(i, i + n_queries), slice(j, j + n_keys)
        alone = target.attend(q[:, rows], k[:, columns], v[:, columns], causal=causal)
        np.testing.assert_allclose(out[:, rows], alone, atol=1e-14)
        i, j = i + n_queries, j + n_keys


def test_dtype_and_emptiness():
    start, stop = fastattn.document_spans(np.array([], np.int32))
    assert start.shape == stop.shape == (0,)
    assert start.dtype == stop.dtype == np.int64


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.5],), TypeError, "lengths_q: expected integers, got float64"),
        (([-1],), ValueError, "lengths_q: expected lengths of at least 0, got -1"),
        (([[1]],), ValueError, "lengths_q: expected 1 axis, got 2"),
        (([2**62, 2**62],), ValueError, "lengths_q: expected lengths of less than"),
        (([1], [2**63]), ValueError, "lengths_k: expected lengths of less than"),
        (([1, 2], [1]), ValueError, "lengths_k: expected 2 documents, got 1"),
        (([1], None, 1), TypeError, "causal: expected bool, got int"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match="^" + message):
        fastattn.document_spans(*arguments)
