"""`fastattn.integrations.transformers`: its masks say what those of eager say."""

import itertools

import pytest

torch = pytest.importorskip("torch", reason="it is what this integrates with")
pytest.importorskip("transformers", reason="it is what this integrates with")

from transformers import masking_utils  # noqa: E402

from fastattn.integrations.transformers_masks import Mask, SpanMask, make_mask  # noqa: E402


def mask_functions(batch, length):
    """Those of the library, by name."""
    ids = torch.arange(length).expand(batch, -1) // 4
    positions = torch.arange(length).expand(batch, -1) % 4
    left = torch.arange(batch) * 2
    window = masking_utils.sliding_window_causal_mask_function(3)
    functions = {
        "causal": masking_utils.causal_mask_function,
        "everything": masking_utils.bidirectional_mask_function,
        "window": window,
        "window on both sides": masking_utils.sliding_window_bidirectional_mask_function(3),
        "chunks": masking_utils.chunked_causal_mask_function(4, left),
    }
    in_packs = {f"packed {name}": packed(x, positions, ids) for name, x in functions.items()}
    return functions, in_packs


def packed(function, positions, ids):
    return masking_utils.and_masks(
        masking_utils.remap_positions_for_packed_sequence(function, positions),
        masking_utils.packed_sequence_mask_function(ids),
    )


@pytest.mark.parametrize("q_length, kv_length, q_offset, kv_offset", [
    (9, 9, 0, 0), (1, 9, 8, 0), (4, 9, 5, 0), (1, 3, 8, 6), (5, 7, 6, 4), (4, 12, 0, 0),
    (0, 3, 3, 0),
])  # fmt: skip
def test_spans_are_the_librarys_masks(q_length, kv_length, q_offset, kv_offset):
    batch, length = 3, q_offset + q_length
    real = torch.ones(batch, length, dtype=torch.bool)
    left, right = real.clone(), real.clone()
    left[1, :2] = left[2, :] = False
    right[1, -2:] = False
    whole, in_packs = mask_functions(batch, length)
    functions = {**whole, **in_packs} if q_length == kv_length else whole
    for (name, function), padding in itertools.product(
        functions.items(), (None, real, left, right)
    ):
        sizes = batch, q_length, kv_length, q_offset, kv_offset, function, padding
        found, want = make_mask(*sizes), masking_utils.eager_mask(*sizes)
        assert type(found) is SpanMask, name
        assert found.shape == want.shape and found.dtype == want.dtype
        assert torch.equal(found.written_out(), want), name
        if make_mask(*sizes, allow_is_bidirectional_skip=True) is None:
            assert not want.any(), name


def test_none_is_every_key():
    """Whatever the library would leave to `is_causal`, the mask says."""
    real = torch.ones(2, 9, dtype=torch.bool)
    everything = {"mask_function": masking_utils.bidirectional_mask_function}
    skip = {"attention_mask": real, "allow_is_bidirectional_skip": True}
    assert make_mask(2, 9, 9, attention_mask=real, allow_is_causal_skip=True) is not None
    assert make_mask(2, 1, 9, q_offset=torch.tensor(8), allow_is_causal_skip=True) is not None
    assert make_mask(2, 4, 9, q_offset=5, **everything, **skip) is None
    assert make_mask(2, 4, 9, q_offset=5, **everything) is not None
    assert make_mask(2, 4, 12, q_offset=5, **everything, **skip) is not None


@pytest.mark.parametrize("sizes, words", [
    ((1, 5, 5, 0), {"causal": True, "q_offset": 0}),
    ((2, 3, 8, 5), {"causal": True, "q_offset": 5}),
    ((2, 3, 12, 0), {"causal": True, "q_offset": 0}),
    ((2, 1, 8, 7), {}),
])  # fmt: skip
def test_causal_masks_are_causal_calls(sizes, words):
    assert make_mask(*sizes).words == words


def own(batch, head, i, j):
    return j % 2 == 0


def test_what_is_not_understood_is_asked_for_every_key():
    either = masking_utils.or_masks(masking_utils.causal_mask_function, own)
    blocks = masking_utils.blockwise_overlay(torch.tensor([[0, 0, -1, 1, 0]]))
    for function, use_vmap in ((own, True), (either, True), (own, False), (blocks, False)):
        found = make_mask(1, 5, 5, mask_function=function, use_vmap=use_vmap)
        want = masking_utils.eager_mask(1, 5, 5, mask_function=function, use_vmap=use_vmap)
        assert type(found) is Mask
        assert torch.equal(found.written_out(), want)
        assert torch.equal(found.words["mask"], want == 0)


def test_a_function_of_the_librarys_names_that_means_something_else():
    """As of another version of it."""

    def sliding_window_overlay(sliding_window):
        def inner_mask(batch, head, i, j):
            return j >= i - sliding_window

        inner_mask.__module__ = masking_utils.__name__
        inner_mask.__qualname__ = "sliding_window_overlay.<locals>.inner_mask"
        return inner_mask

    def renamed_closure(width):
        def inner_mask(batch, head, i, j):
            return j > i - width

        inner_mask.__module__ = masking_utils.__name__
        inner_mask.__qualname__ = "sliding_window_overlay.<locals>.inner_mask"
        return inner_mask

    for function in (sliding_window_overlay(2), renamed_closure(2)):
        found = make_mask(1, 6, 6, mask_function=function)
        assert torch.equal(
            found.written_out(), masking_utils.eager_mask(1, 6, 6, mask_function=function)
        )


def test_what_models_compute_of_a_mask_is_what_they_compute_of_eagers():
    padding = torch.arange(6) < torch.tensor([[6], [4]])
    holes = padding & (torch.arange(6) != 2)
    scores = torch.randn(2, 3, 6, 6)
    operations = [
        lambda x: scores + x, lambda x: x + scores, lambda x: scores.clone().add_(x),
        lambda x: scores.masked_fill(x.bool(), -1.0), lambda x: torch.where(x < 0, 1.0, scores),
        lambda x: ~x[:, :, -1, :].reshape(-1).bool(), lambda x: x.double(), lambda x: x == 0,
        lambda x: torch.cat([x, x], dim=-1), lambda x: x.squeeze(1), lambda x: x.sum(),
        lambda x: x[:, 0], lambda x: x.expand(2, 3, 6, 6), lambda x: x.view(2, 6, 6),
        lambda x: 1 - x, lambda x: x.min(), lambda x: x[..., [0, 2]],
        lambda x: x.transpose(2, 3), lambda x: x[:, :, 1:, :4] * 2,
    ]  # fmt: skip
    modes = (torch.no_grad, torch.inference_mode)
    for (real, kind), mode in itertools.product(((padding, SpanMask), (holes, Mask)), modes):
        with mode():
            mask = make_mask(2, 6, 6, attention_mask=real)
            eager = masking_utils.eager_mask(2, 6, 6, attention_mask=real)
            assert type(mask) is kind
            assert "-3.4028e+38" in repr(mask)
            for operation in operations:
                found = operation(mask)
                found = found.written_out() if isinstance(found, Mask) else found
                assert torch.equal(found, operation(eager))
        with pytest.raises(TypeError, match=r"^attention_mask: expected to be read only"):
            mask[:, :, 0] = 0
    half = make_mask(2, 6, 6, attention_mask=padding, dtype=torch.float16)
    assert half.dtype == torch.float16
    assert half.written_out().min() == torch.finfo(torch.float16).min


def test_a_part_of_a_mask_is_one():
    mask = make_mask(2, 6, 6)[:, :, -2:, :]
    assert type(mask) is Mask
    assert mask.words["mask"].tolist() == [[[[True] * 5 + [False], [True] * 6]]] * 2
