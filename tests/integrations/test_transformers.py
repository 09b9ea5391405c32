"""`fastattn.integrations.transformers`: the logits of Hugging Face models are those of eager."""

import copy
import doctest

import numpy as np
import pytest

import fastattn

torch = pytest.importorskip("torch", reason="it is what this integrates with")
transformers = pytest.importorskip("transformers", reason="it is what this integrates with")

from fastattn.integrations import transformers as integration  # noqa: E402
from fastattn.integrations.transformers_masks import make_mask  # noqa: E402

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
    model, ids, left = switched(make("mistral"), "fastattn"), tokens(), paddings()["left"]
    compiled = torch.compile(model, backend="aot_eager")
    for mask in (left, None):
        with torch.no_grad():
            want, found = (
                x(ids, attention_mask=mask, use_cache=False).logits for x in (model, compiled)
            )
        size, real = want.abs().max().item(), left.bool()
        torch.testing.assert_close(found[real], want[real], rtol=0, atol=1e-5 * size)
    torch.compiler.reset()


def served(model, implementation, prompts):
    """``(new tokens, their log-probabilities)`` of each prompt by continuous batching, in pages of
    8 tokens and steps of at most 16, so that prompts are cut and mixed.
    """
    model.set_attn_implementation(implementation)
    results = model.generate_batch(
        prompts, progress_bar=False,
        generation_config=transformers.GenerationConfig(
            max_new_tokens=8, do_sample=False, eos_token_id=-1),
        continuous_batching_config=transformers.ContinuousBatchingConfig(
            num_blocks=24, page_size=8, max_batch_tokens=16, return_logprobs=True),
    )  # fmt: skip
    assert model.config._attn_implementation == implementation
    return [(x.generated_tokens, torch.tensor(x.logprobs)) for x in results.values()]


def alone(model, prompt):
    """The same of one prompt by ``generate``."""
    model.set_attn_implementation("eager")
    found = model.generate(
        torch.tensor([prompt]), max_new_tokens=8, do_sample=False, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    top = torch.cat(found.logits).log_softmax(-1).amax(-1)
    return found.sequences[0, len(prompt) :].tolist(), top


@pytest.mark.parametrize("name", DECODERS)
def test_continuous_batching(name):
    """Each request gets what it gets alone, past the window; no mask is made."""
    model = make(name)
    prompts = [x[:n].tolist() for x, n in zip(tokens(), (20, 5, 13), strict=True)]
    wanted = [alone(model, prompt) for prompt in prompts]
    wanted += served(model, "sdpa", prompts) if name == "llama" else []
    found = served(model, "fastattn", prompts) * (2 if name == "llama" else 1)
    for (got, top), (want, wanted_top) in zip(found, wanted, strict=True):
        assert got == want
        # Two float32 results of a few layers, each some roundings off.
        torch.testing.assert_close(top, wanted_top, rtol=0, atol=3e-5)


def test_continuous_batching_of_padded_batches():
    """Tokens behind the last request, which compiled batches have, get 0."""
    q, k, v = torch.randn(3, 1, 2, 7, 8)
    ends = torch.tensor([0, 3, 3, 5], dtype=torch.int32)
    options = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "write_index": []}
    out, _ = integration.attention(torch.nn.Module(), q, k, v, None, **options)
    want, _ = integration.attention(
        torch.nn.Module(), *(x[:, :, :3] for x in (q, k, v)), torch.ones(3, 3).tril().bool()
    )
    torch.testing.assert_close(out[:, :3], want)
    assert (out[:, 5:] == 0).all()
    with pytest.raises(ValueError, match=r"^position_bias: expected None, got Tensor"):
        integration.attention(torch.nn.Module(), q, k, v, None, position_bias=q, **options)


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


def softmax(q, k, v, scores=0.0):
    return ((q @ k.mT * q.shape[-1] ** -0.5 + scores).softmax(-1) @ v).transpose(1, 2)


def test_no_mask_is_every_key():
    """Whatever the module and the library say of `is_causal`, as with eager."""
    q, k, v = torch.randn(3, 1, 4, 5, 8, dtype=torch.float64)
    module = torch.nn.Module()
    for module.is_causal, options in ((True, {}), (False, {}), (True, {"is_causal": True})):
        found, _ = integration.attention(module, q, k, v, None, **options)
        torch.testing.assert_close(found, softmax(q, k, v), rtol=0, atol=1e-14)


def test_masks_of_users():
    q, k, v = torch.randn(3, 2, 4, 5, 8, dtype=torch.float64)
    seen = torch.rand(2, 1, 5, 5) < 0.5
    seen[..., 0] = True
    numbers = torch.randn(2, 4, 5, 5).double().masked_fill(~seen, torch.finfo(torch.float64).min)
    bias = torch.randn(1, 4, 5, 5, dtype=torch.float64)
    for mask, scores in ((numbers, numbers), (seen, torch.where(seen, 0.0, -torch.inf))):
        found, _ = integration.attention(torch.nn.Module(), q, k, v, mask, position_bias=bias)
        torch.testing.assert_close(found, softmax(q, k, v, scores + bias), rtol=0, atol=1e-14)


@pytest.mark.parametrize("place", [
    (5, 5, 0), (5, 9, 2), (1, 9, 3),  # queries, keys, the first query's position
], ids=str)  # fmt: skip
@pytest.mark.parametrize("kind", ["causal", "bidirectional", "padded", "chosen"])
def test_relative_bias(kind, place):
    """As a position bias of queries x keys, its gradient too, where the mask puts the queries."""
    n, keys, offset = place
    q, k, v = (torch.randn(2, 4, m, 8, dtype=torch.float64) for m in (n, keys, keys))
    table = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    options = {}
    if kind == "bidirectional":
        options["mask_function"] = transformers.masking_utils.bidirectional_mask_function
    if kind == "padded":
        options["mask_function"] = transformers.masking_utils.bidirectional_mask_function
        options["attention_mask"] = torch.arange(keys).expand(2, -1) < 4
    mask = make_mask(2, n, keys, offset, **options)
    given = {"indices": torch.zeros(2, n, 1, dtype=torch.long)} if kind == "chosen" else {}
    distance = torch.arange(keys) - (torch.arange(n) + offset)[:, None]
    bias = table[:, distance.clip(-3, 3) + 3][None]
    want, found = (
        integration.attention(torch.nn.Module(), q, k, v, mask, **given, **more)[0]
        for more in ({"position_bias": bias}, {"relative_bias": table})
    )
    torch.testing.assert_close(found, want, rtol=0, atol=1e-13)
    gradients = [torch.autograd.grad(x.square().sum(), table)[0] for x in (found, want)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


def test_relative_bias_without_positions():
    q = torch.randn(1, 2, 5, 8)
    with pytest.raises(ValueError, match=r"^relative_bias: expected None with a part of a mask"):
        integration.attention(
            torch.nn.Module(), q, q, q, make_mask(1, 5, 6)[..., :5], relative_bias=torch.ones(2, 3)
        )
    found, _ = integration.attention(
        torch.nn.Module(), q, q, q, None, relative_bias=torch.tensor([[9.0, 0, 0], [9.0, 0, 0]])
    )
    near, _ = integration.attention(
        torch.nn.Module(), q, q, q, None, position_bias=9.0 * torch.ones(5, 5).tril(-1)[None, None]
    )
    torch.testing.assert_close(found, near)


def test_sinks_of_queries():
    """A logit for each query, its gradient too."""
    q, k, v = torch.randn(3, 2, 4, 5, 8, dtype=torch.float64)
    sinks = torch.randn(2, 4, 5, 1, dtype=torch.float64, requires_grad=True)
    scores = torch.cat([q @ k.mT * 8**-0.5, sinks], dim=-1)
    want = (scores.softmax(-1)[..., :-1] @ v).transpose(1, 2)
    found, _ = integration.attention(torch.nn.Module(), q, k, v, None, sinks=sinks)
    torch.testing.assert_close(found, want, rtol=0, atol=1e-14)
    gradients = [torch.autograd.grad(x.square().sum(), sinks)[0] for x in (found, want)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-13)


def test_chosen_keys():
    """The `indices` of sparse attention, within what the mask shows."""
    q, k, v = torch.randn(3, 2, 4, 5, 8, dtype=torch.float64)
    indices = torch.tensor([[[0, 1], [1, 0], [2, 0], [4, 0], [3, 4]]]).expand(2, -1, -1)
    chosen = torch.zeros(2, 1, 5, 5, dtype=torch.bool).scatter(-1, indices[:, None], True)
    seen = chosen & torch.ones(5, 5, dtype=torch.bool).tril()
    want = softmax(q, k, v, torch.where(seen, 0.0, -torch.inf))
    numbers = torch.zeros(5, 5).masked_fill(~torch.ones(5, 5).tril().bool(), -torch.inf)
    for mask in (make_mask(2, 5, 5), numbers[None, None]):
        found, _ = integration.attention(torch.nn.Module(), q, k, v, mask, indices=indices)
        torch.testing.assert_close(found, want, rtol=0, atol=1e-14)


# ------------------------------------------------------------- models that read masks in other ways


def assert_as_eager(model, **given):
    with torch.inference_mode():
        want, found = (switched(model, x)(**given)[0] for x in ("eager", "fastattn"))
    torch.testing.assert_close(found, want, rtol=0, atol=1e-4 * want.abs().max().item())


@pytest.mark.parametrize("sparse", [0, 1])
def test_a_model_without_sdpa_that_routes_by_its_masks(sparse):
    torch.manual_seed(0)
    config = transformers.NllbMoeConfig(
        vocab_size=99, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, num_experts=4,
        encoder_sparse_step=sparse, decoder_sparse_step=sparse,
    )  # fmt: skip
    model = transformers.NllbMoeModel(config).eval()
    for mask in paddings().values():
        assert_as_eager(model, input_ids=tokens(), decoder_input_ids=tokens(), attention_mask=mask)


def test_a_model_that_drops_queries():
    """Gemma 4 computes its last layers for the last queries only."""
    torch.manual_seed(0)
    config = transformers.Gemma4TextConfig(
        **{**SLIDING, "num_hidden_layers": 4}, num_kv_shared_layers=2, global_head_dim=16,
        vocab_size_per_layer_input=99, hidden_size_per_layer_input=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )  # fmt: skip
    model = transformers.Gemma4ForCausalLM(config).eval()
    for padding in ("none", "left", "holes"):
        mask = paddings()[padding]
        assert_as_eager(model, input_ids=tokens(), attention_mask=mask, logits_to_keep=4)


def test_what_models_tell_every_attention_function():
    config = transformers.HubertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        conv_dim=(16, 16), conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
    )  # fmt: skip
    sound = torch.sin(torch.arange(2000.0)[None])
    assert_as_eager(transformers.HubertModel(config).eval(), input_values=sound)
    model, lengths = make("llama"), torch.tensor([0, LENGTH], dtype=torch.int32)
    assert_as_eager(
        model, input_ids=tokens(), cu_seq_lens_q=lengths, cu_seq_lens_k=lengths,
        max_length_q=LENGTH, max_length_k=LENGTH, seq_idx=torch.zeros(3, LENGTH),
        token_type_ids=torch.zeros(3, LENGTH), anything="else",
    )  # fmt: skip


def test_beams():
    model, ids = make("llama"), tokens()
    eager, found = (
        switched(model, x).generate(ids, attention_mask=paddings()["left"], num_beams=3,
                                    max_new_tokens=5, do_sample=False)
        for x in ("eager", "fastattn")
    )  # fmt: skip
    assert torch.equal(found, eager)


def test_traced_by_jit_and_export():
    """Without a mask too: None would be causal for nobody."""
    model, ids, mask = switched(make("mistral"), "fastattn"), tokens(), paddings()["left"]

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids, mask=None):
            return self.model(ids, attention_mask=mask, use_cache=False).logits

    logits = Logits().eval()
    with torch.no_grad():
        for given in ((ids,), (ids, mask)):
            want = logits(*given)
            for traced in (
                torch.jit.trace(logits, given, check_trace=False),
                torch.export.export(logits, given, strict=False).module(),
            ):
                difference = (traced(*given) - want).abs()[mask.bool()].max()
                assert difference <= 1e-5 * want.abs().max()


# ---------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("options, message", [
    ({"head_mask": torch.ones(4)}, "head_mask: expected None, got Tensor"),
    ({"output_attentions": True}, "output_attentions: expected None, got True"),
    ({"block_indices": torch.zeros(1)}, "block_indices: expected None, got Tensor"),
    ({"softcap": -1.0}, "softcap: expected a finite number > 0, got -1.0"),
])  # fmt: skip
def test_refused(options, message):
    x = torch.randn(1, 4, 5, 8)
    with pytest.raises(ValueError, match=f"^{message}"):
        integration.attention(torch.nn.Module(), x, x, x, None, **options)


def test_models_drop_weights_in_training_only():
    sizes = {**SIZES, "hidden_dropout_prob": 0.0, "attn_implementation": "fastattn"}
    model = transformers.BertModel(transformers.BertConfig(**sizes))
    plain = model.eval()(tokens()).last_hidden_state
    assert torch.equal(plain, model(tokens()).last_hidden_state)
    drawn = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        drawn.append(model.train()(tokens()).last_hidden_state)
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], plain)
    drawn[0].sum().backward()
    with pytest.raises(ValueError, match=r"^output_attentions: expected None, got True"):
        model.eval()(tokens(), output_attentions=True)


@pytest.mark.parametrize("name, why", [
    ("Bloom", "computes attention by itself"), ("Mpt", "computes attention by itself"),
    ("GPTNeo", "computes attention by itself"), ("Falcon", "computes attention by itself"),
    ("Git", "made for the library's own"),
])  # fmt: skip
def test_models_without_the_interface(name, why):
    """Are told when they are made, and later left as they are, by the library's own warning."""
    model_class = getattr(transformers, f"{name}ForCausalLM")
    sizes = {"vocab_size": 99, "hidden_size": 32, "num_attention_heads": 4}
    layers = {"GPTNeo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]}}
    number = layers.get(name, {"num_hidden_layers": 2})
    config = getattr(transformers, f"{name}Config")(**sizes, **number)
    with pytest.raises(ValueError, match=f"^attn_implementation: .*'fastattn'; .*{why}"):
        model_class._from_config(copy.deepcopy(config), attn_implementation="fastattn")
    if name != "Git":
        model = model_class._from_config(config, attn_implementation="eager").eval()
        assert_as_eager(model, input_ids=tokens())


def test_docstrings():
    failed, attempted = doctest.testmod(integration)
    assert attempted > 0
    assert failed == 0
