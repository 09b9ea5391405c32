"""`fastattn.integrations.transformers`: the logits of Hugging Face models are those of eager."""

import copy
import doctest
import itertools

import numpy as np
import pytest

import fastattn

torch = pytest.importorskip("torch", reason="it is what this integrates with")
transformers = pytest.importorskip("transformers", reason="it is what this integrates with")

from transformers import masking_utils  # noqa: E402

from fastattn.integrations import transformers as integration  # noqa: E402
from fastattn.integrations.transformers_masks import SpanMask, make_mask  # noqa: E402

# Their own, and of the tiny configurations.
pytestmark = pytest.mark.filterwarnings("ignore")

LENGTH, WINDOW = 20, 7
SIZES = {
    "vocab_size": 99, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 128, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": None, "attention_dropout": 0.0,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 16}
SLIDING = {**GROUPED, "sliding_window": WINDOW}
FAMILIES = {
    "bert": ("BertForMaskedLM", "BertConfig", {
        **SIZES, "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "mistral": ("MistralForCausalLM", "MistralConfig", SLIDING),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {
        **SLIDING, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 16}),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", {
        **SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2,
        "experts_implementation": "eager"}),  # the others know no float64
}  # fmt: skip
DECODERS = [name for name in FAMILIES if name != "bert"]


@pytest.fixture(autouse=True, scope="module")
def _registered():
    integration.register()


def make(name):
    """A model whose weights are large enough for every key to count."""
    torch.manual_seed(0)
    model_class, config_class, options = FAMILIES[name]
    config = getattr(transformers, config_class)(**options)
    model = getattr(transformers, model_class)(config).eval()
    with torch.no_grad():
        for x in model.parameters():
            x.mul_(4) if x.dim() > 1 else x.add_(0.3 * torch.randn_like(x))
    return model


def tokens():
    return torch.randint(3, 99, (3, LENGTH), generator=torch.Generator().manual_seed(1))


def paddings():
    left = torch.ones(3, LENGTH, dtype=torch.long)
    left[1, :5] = left[2, :9] = 0
    holes = left.clone()
    holes[1, 9:11] = 0
    return {"none": None, "all real": left | 1, "left": left, "right": left.flip(1),
            "holes": holes}  # fmt: skip


def switched(model, implementation):
    model.set_attn_implementation(implementation)
    return model


# --------------------------------------------------------------------------------- whole models


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_eagers(name):
    """For all that is real, within twice of what two results may differ that are both as far from
    those of float64 as eager's. (Eager's float64 itself is NaN where a query sees no key.)
    """
    model, ids = make(name), tokens()
    with torch.inference_mode():
        exact = switched(copy.deepcopy(model).double(), "eager")(ids).logits
        error = (switched(model, "eager")(ids).logits - exact).abs().max().item()
        for padding, mask in paddings().items():
            real = torch.ones_like(ids).bool() if mask is None else mask.bool()
            want, found = (
                switched(model, x)(ids, attention_mask=mask).logits[real]
                for x in ("eager", "fastattn")
            )
            assert (found - want).abs().max().item() <= 4 * error, padding
    assert error < 1e-5 * exact.abs().max().item()


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_is_eagers(name, cache):
    """Past the window, where the caches of sliding layers forget."""
    model, ids = make(name), tokens()
    for mask in (paddings()["none"], paddings()["left"]):
        eager, found = (
            switched(model, implementation).generate(
                ids, attention_mask=mask, max_new_tokens=6, do_sample=False, output_scores=True,
                return_dict_in_generate=True, cache_implementation=cache,
            )
            for implementation in ("eager", "fastattn")
        )  # fmt: skip
        assert torch.equal(found.sequences, eager.sequences)
        for got, want in zip(found.scores, eager.scores, strict=True):
            # Two float32 results of a few layers, each some roundings off.
            size = want.abs().max().item()
            torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * size)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_training_gradients_are_eagers(name, padding):
    model, ids, mask = make(name).train(), tokens(), paddings()[padding]
    # What a padded query predicts is no loss: eager makes up an answer where it sees nothing.
    labelled = mask.bool() & mask.roll(1, dims=1).bool()
    labels = torch.where(labelled, ids, -100)
    gradients = []
    for implementation in ("eager", "fastattn"):
        model.zero_grad()
        loss = switched(model, implementation)(ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        gradients.append(
            {n: x.grad.clone() for n, x in model.named_parameters() if x.grad is not None}
        )
    eager, found = gradients
    assert found.keys() == eager.keys()
    largest = max(x.abs().max().item() for x in eager.values())
    for parameter, got in found.items():
        torch.testing.assert_close(got, eager[parameter], rtol=1e-4, atol=1e-6 * largest)


def test_position_bias_and_cross_attention():
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=0,
    )  # fmt: skip
    model, ids = transformers.T5ForConditionalGeneration(config).eval(), tokens()
    mask = paddings()["right"]
    with torch.inference_mode():
        want, got = (
            switched(model, x)(ids, attention_mask=mask, decoder_input_ids=ids[:, :9]).logits
            for x in ("eager", "fastattn")
        )
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * want.abs().max().item())


def test_packed_sequences():
    """Several documents in a row are each as if it stood alone."""
    lengths = (6, 9, 5)
    ids = tokens()[:1]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    for name in ("llama", "mistral"):
        model = switched(make(name), "fastattn")
        with torch.inference_mode():
            packed = model(ids, position_ids=positions, use_cache=False).logits
            alone = [model(x).logits for x in ids.split(lengths, dim=1)]
        torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=0, atol=1e-5)


def test_compiled():
    """Traced, masks are plain tensors, and attention is an operator of the graph."""
    model, ids, mask = switched(make("mistral"), "fastattn"), tokens(), paddings()["left"]
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        want, found = (
            x(ids, attention_mask=mask, use_cache=False).logits for x in (model, compiled)
        )
    torch.compiler.reset()
    size = want.abs().max().item()
    torch.testing.assert_close(found[mask.bool()], want[mask.bool()], rtol=0, atol=1e-5 * size)


# ------------------------------------------------------------------- what reaches fastattn, and how


@pytest.mark.parametrize("name", FAMILIES)
def test_structure_reaches_the_kernels(monkeypatch, name):
    """Without an array of queries x keys, but for padding amid a sequence."""
    words = []

    def attend(q, k, v, **given):
        words.append({name for name, x in given.items() if x is not None and x is not False})
        return scaled_dot(q, k, v, **given)

    scaled_dot = fastattn.scaled_dot
    monkeypatch.setattr(fastattn, "scaled_dot", attend)
    model, ids = switched(make(name), "fastattn"), tokens()
    dense = {"mask", "bias"}
    for padding, mask in paddings().items():
        words.clear()
        with torch.inference_mode():
            model(ids, attention_mask=mask)
        assert all(dense.isdisjoint(given) for given in words) == (padding != "holes")
        if padding in ("left", "right"):
            assert all("spans" in given for given in words)
    with torch.inference_mode():
        words.clear()
        model(ids)
    windows = sum("spans" in given for given in words)
    assert windows == {"mistral": 2, "gemma2": 1, "gpt_oss": 1}.get(name, 0)
    assert sum("causal" in given for given in words) == (0 if name == "bert" else 2 - windows)
    assert all(("softcap" in given) == (name == "gemma2") for given in words)
    assert all(("sinks" in given) == (name == "gpt_oss") for given in words)


def test_no_tensor_is_copied(monkeypatch):
    """Heads side by side in memory, as models project them, come back so."""
    seen = []

    def attend(q, k, v, **options):
        out = np.zeros_like(q)
        seen.append([q, k, v, out])
        return out

    monkeypatch.setattr(fastattn, "scaled_dot", attend)
    arrays = [torch.randn(2, 5, 4, 8).transpose(1, 2) for _ in range(3)]
    out, _ = integration.attention(torch.nn.Module(), *arrays, None)
    assert out.shape == (2, 5, 4, 8) and out.is_contiguous()
    addresses = [x.__array_interface__["data"][0] for x in seen[0]]
    assert addresses == [x.data_ptr() for x in (*arrays, out)]


# ------------------------------------------------------------------------------------------ masks


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
    packed = {
        f"packed {name}": masking_utils.packed_sequence_compatibility_function(x, positions, ids)
        for name, x in functions.items()
    }
    return functions, packed


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
    whole, packed = mask_functions(batch, length)
    functions = {**whole, **packed} if q_length == kv_length else whole
    for (name, function), padding in itertools.product(
        functions.items(), (None, real, left, right)
    ):
        sizes = batch, q_length, kv_length, q_offset, kv_offset, function, padding
        found = make_mask(*sizes, allow_is_causal_skip=False)
        assert type(found) is SpanMask, name
        want = masking_utils.sdpa_mask(*sizes, allow_is_causal_skip=False)
        assert found.shape == want.shape and found.dtype == want.dtype
        assert torch.equal(found.written_out(), want), name
        for causal in (False, True):
            skips = {"allow_is_causal_skip": causal, "allow_is_bidirectional_skip": not causal}
            if make_mask(*sizes, **skips) is None:  # which attention takes for this:
                means = torch.ones_like(want)
                if causal and q_length > 1:
                    means = means.tril()
                assert torch.equal(want, means), (name, causal)


def test_nothing_is_said_where_nothing_is_the_same():
    real = torch.ones(2, 9, dtype=torch.bool)
    everything = masking_utils.bidirectional_mask_function
    assert make_mask(2, 9, 9, attention_mask=real) is None
    assert make_mask(2, 1, 9, q_offset=torch.tensor(8), attention_mask=real) is None
    assert make_mask(2, 1, 12, q_offset=8, attention_mask=real) is not None
    assert make_mask(2, 4, 9, q_offset=5, attention_mask=real) is not None
    skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": True}
    assert make_mask(2, 4, 9, mask_function=everything, attention_mask=real, **skips) is None


def test_other_masks_are_written_out():
    def own(batch, head, i, j):
        return j % 2 == 0

    either = masking_utils.or_masks(masking_utils.causal_mask_function, own)
    for function, use_vmap in ((own, True), (either, True), (own, False)):
        found = make_mask(1, 5, 5, mask_function=function, use_vmap=use_vmap,
                          allow_is_causal_skip=False)  # fmt: skip
        assert type(found) is torch.Tensor
        assert found[0, 0, 0].tolist() == [True, False, True, False, True]


def test_a_span_mask_is_a_tensor():
    """Models that change their masks find a bool tensor of the shape that it says."""
    padding = torch.arange(6) < torch.tensor([[6], [4]])
    mask = make_mask(2, 6, 6, attention_mask=padding, allow_is_causal_skip=False)
    dense = torch.ones(6, 6, dtype=torch.bool).tril() & padding[:, None, None]
    operations = [
        lambda x: x[:, :, -2:, :4], lambda x: x & ~x.roll(1), lambda x: x.to(torch.float64),
        lambda x: torch.cat([x, x], dim=-1), lambda x: torch.where(x, 0.0, -1.0), lambda x: ~x,
        lambda x: x.expand(2, 3, 6, 6), lambda x: x.clone(), lambda x: x.sum(),
    ]  # fmt: skip
    assert type(mask) is SpanMask and type(mask.contiguous()) is SpanMask
    for operation in operations:
        assert type(operation(mask)) is torch.Tensor
        assert torch.equal(operation(mask), operation(dense))
    assert "True" in repr(mask)


# ---------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("options, message", [
    ({"dropout": 0.1}, "dropout: 0.1 given, 0 wanted; there is no dropout"),
    ({"head_mask": torch.ones(4)}, "head_mask: Tensor given, None wanted"),
    ({"output_attentions": True}, "output_attentions: True given, None wanted"),
    ({"cu_seq_lens_q": torch.tensor([0, 5])}, "cu_seq_lens_q: Tensor given"),
    ({"indices": torch.zeros(1)}, "indices: Tensor given"),
    ({"softcap": -1.0}, "softcap: expected a finite number > 0, got -1.0"),
])  # fmt: skip
def test_refused(options, message):
    x = torch.randn(1, 4, 5, 8)
    with pytest.raises(ValueError, match=f"^{message}"):
        integration.attention(torch.nn.Module(), x, x, x, None, **options)


def test_models_dropout_is_refused_in_training_only():
    config = transformers.BertConfig(**{**SIZES, "attn_implementation": "fastattn"})
    model = transformers.BertModel(config)
    assert model.eval()(tokens()).last_hidden_state.isfinite().all()
    with pytest.raises(ValueError, match=r"^dropout: 0.1 given, 0 wanted"):
        model.train()(tokens())
    with pytest.raises(ValueError, match=r"^output_attentions: True given"):
        model.eval()(tokens(), output_attentions=True)


def test_what_asks_for_nothing_passes():
    x = torch.randn(1, 4, 5, 8)
    want, _ = integration.attention(torch.nn.Module(), x, x, x, None)
    options = {"position_ids": torch.arange(5), "use_cache": True, "output_attentions": False,
               "num_items_in_batch": 3, "sliding_window": 4, "head_mask": None}  # fmt: skip
    found, _ = integration.attention(torch.nn.Module(), x, x, x, None, **options)
    assert torch.equal(found, want)


def test_docstrings():
    failed, attempted = doctest.testmod(integration)
    assert attempted > 0
    assert failed == 0
