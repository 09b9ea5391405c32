"""Tiny models of the classes of Hugging Face Transformers, with random weights, and inputs."""

import dataclasses
import inspect
import re
import types
import typing

import torch

VOCABULARY, IMAGE, PATCH, MELS = 99, 32, 8, 16

# The size of a field of a config by its name, the first that matches.
SIZES = [
    (r"mamba_(n|num)_heads", 4),
    (r"mamba_(d_head|head_dim)|mamba_d_state|ssm_state_size|mamba_d_ssm", 16),
    (r"mamba_n_groups", 1),
    (r".*drop(out|path)?(_.*)?|.*_pdrop|layerdrop|.*_dropout|.*layerdrop", 0.0),
    (r"(.*_)?vocab(ulary)?_size(_.*)?", VOCABULARY),
    (
        r"(max|n)_position(_embedding)?s|max_(source|target)_positions|n_ctx|max_sequence_length",
        128,
    ),
    (r"(num|n)_(key_value|kv)_heads|swa_num_key_value_heads|.*_key_value_heads", 2),
    (r".*attention_heads|(num|n)_heads?|index_n_heads|linear_num_.*heads", 4),
    (r"(.*_)?head_dim|d_kv|attention_head_size|linear_.*_head_dim|rotary_dim", 8),
    (r"(.*_)?intermediate_size|.*ffn_dim|d_ff|ffn_hidden_size|n_inner|inner_dim|mlp_dim", 64),
    (r"(.*_)?(hidden_size|hidden_dim|d_model|embed_dim|n_embd|model_dim|embedding_size)", 32),
    (r"projection_dim|.*proj(ection)?_(size|dim)|out_hidden_size|output_dim|.*_lora_rank", 32),
    (r"(.*_)?num_(.*_)?layers|(.*_)?n?_?layers?|depth|n_layer|.*_num_blocks", 6),
    (r"num_(local_|routed_)?experts|n_routed_experts|moe_num_experts", 4),
    (r"num_experts_per_tok|moe_k|moe_topk|top_k_experts|num_selects", 2),
    (r"n_group|topk_group|n_shared_experts|moe_layer_interval|decoder_sparse_step", 1),
    (r"sliding_window|sliding_window_size|attention_chunk_size|local_attention|window_size", 7),
    (r"index_topk", 4),
    (r"image_size|img_size|resolution", IMAGE),
    (r"patch_size", PATCH),
    (r"num_mel_bins|feature_size|mel_dim|n_mels", MELS),
]
# What else is tried, in this order, before a rule of SIZES: None leaves the default.
_HEAD_DIM = r"(.*_)?head_dim|d_kv|attention_head_size|linear_.*_head_dim|rotary_dim"
_WIDTH = r"(.*_)?(hidden_size|hidden_dim|d_model|embed_dim|n_embd|model_dim|embedding_size)"
VARIANTS = [
    [],
    [(_HEAD_DIM, None), (_WIDTH, 64)],
    [(_HEAD_DIM, None), (_WIDTH, 256), (r"(.*_)?(num_)?(attention_)?heads?|n_head", 2)],
    [(_HEAD_DIM, None), (_WIDTH, 128), (r"(.*_)?(num_)?(attention_)?heads?|n_head", 2)],
    [(r"(.*_)?(key_value|kv)_heads", 4), (r"head_dim", None)],
    [(r".*layers|depth|n_layer|.*window.*", None)],
    [(r".*layers|depth|n_layer|.*heads?|patch_size|image_size|.*mel.*", None), (_HEAD_DIM, None),
     (_WIDTH, None)],
]  # fmt: skip
CONV = {"conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3),
        "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}  # fmt: skip
# What the rules above cannot know.
ALSO: dict[str, dict] = {
    "bamba": {"attn_layer_indices": [1, 3, 5]},
    "bridgetower_vision_model": {"hidden_size": 64},
    "chameleon": {"vocabulary_map": {"<image>": 60}},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"] * 3},
    "emu3": {"vocabulary_map": {"<image>": 60}},
    "esm": {"vocab_size": VOCABULARY},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 3},
}


def tiny(config_class, variant=0):
    """A config with small sizes where it has the fields, and its sub-configs so."""
    words = {}
    for field in dataclasses.fields(config_class):
        value = _size(field, [*VARIANTS[variant], *SIZES])
        if value is not None:
            words[field.name] = value
    if config_class.sub_configs:
        default = config_class()
        for name in config_class.sub_configs:
            sub = type(getattr(default, name, None))
            if dataclasses.is_dataclass(sub):
                words[name] = tiny(sub, variant)
    words |= ALSO.get(config_class.model_type, {}) | ALSO.get(config_class.__name__, {})
    return config_class(**words)


def _size(field, sizes):
    kinds = _kinds(field.type)
    if field.name in CONV and isinstance(field.default, type(CONV[field.name]) | list):
        return CONV[field.name]
    if field.default is None and field.name not in ("num_key_value_heads", "head_dim"):
        return None
    for pattern, size in sizes:
        if re.fullmatch(pattern, field.name):
            number = isinstance(field.default, int | float | None)
            return size if type(size) in kinds and number else None
    if re.fullmatch(r".*_(token_id|token_index)", field.name) and isinstance(field.default, int):
        return field.default if field.default < VOCABULARY else 61 + field.default % 31
    return None


def _kinds(kind) -> set:
    if isinstance(kind, str):
        return {t for t in (int, float) if t.__name__ in kind}
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return set().union(*map(_kinds, typing.get_args(kind)))
    return {int, float} if kind is float else {kind}


def with_weights(model):
    """Weights large enough for every key to count."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for x in model.parameters():
            noise = torch.randn(x.shape, generator=generator).to(x.dtype)
            if x.dim() > 1:
                x.copy_(noise * max(x[0].numel(), 1) ** -0.5)
            else:
                x.add_(0.1 * noise * (x.abs().mean() or 1))
    return model.eval()


def inputs(model, batch=2, length=12):
    """Candidates for what the model takes, the most likely first."""
    names = inspect.signature(model.forward).parameters
    text = torch.randint(3, 60, (batch, length), generator=torch.Generator().manual_seed(2))
    seeded = torch.Generator().manual_seed(3)

    def noise(*shape):
        return torch.randn(batch, *shape, generator=seeded)

    more = {"decoder_input_ids": text.flip(0)} if "decoder_input_ids" in names else {}
    if "input_ids" in names:
        yield {"input_ids": text, **more}
        yield {"input_ids": text}
        if "bbox" in names:
            boxes = torch.ones(batch, length, 4, dtype=torch.long)
            yield {"input_ids": text, "bbox": boxes, **more}
    for name, shape in shapes(model.config, names, length):
        given = {name: noise(*shape), **more}
        if "grid_thw" in names:
            given[name] = given[name].flatten(0, 1)
            given["grid_thw"] = torch.tensor([[1, 4, 4]] * batch)
        yield given
        if name == "pixel_values" and "input_ids" in names:
            yield {"input_ids": text, **given}


def shapes(config, names, length):
    """``(name, shape without the batch)`` of inputs of numbers that the model may take."""
    if "grid_thw" in names:
        size = getattr(config, "in_channels", 3) * PATCH**2
        for name in [x for x in ("hidden_states", "pixel_values") if x in names]:
            yield from [(name, (16, 2 * size)), (name, (16, size))]
        return
    width, colors = getattr(config, "hidden_size", 32), getattr(config, "num_channels", 3)
    sizes = {getattr(config, "image_size", IMAGE): 0, IMAGE: 0, 64: 0, 224: 0}
    frames = getattr(config, "max_length", None) or 64
    choices = {
        "inputs_embeds": [(length, width), (length, 32)],
        "pixel_values": [(colors, x, x) for x in sizes if isinstance(x, int)],
        "pixel_values_videos": [(4, 3, IMAGE, IMAGE)],
        "input_features": [(MELS, 100), (64, MELS), (MELS, 256), (MELS, 3000)],
        "input_values": [(frames, MELS), (2000,), (1, 2000), (64, MELS), (12, 32)],
        "hidden_states": [(length, width), (length, 32)],
        "past_values": [(getattr(config, "context_length", 32), 1)],
    }
    for name, options in choices.items():
        if name in names:
            yield from ((name, shape) for shape in options)
