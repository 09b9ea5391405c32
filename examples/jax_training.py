"""Training with JAX
=================

A small language model whose attention is fastattn's learns to repeat.

Random letters, and then the same ones again: whoever remembers can tell the second half. The model
is a decoder as ever, two blocks of causal attention and a feed-forward layer each, trained by Adam
under `jax.jit` and `jax.value_and_grad`. `fastattn.integrations.jax` takes the place of
`jax.nn.dot_product_attention`, whose signature it has.

.. code-block:: sh

    pip install fastattn[jax]
    python examples/jax_training.py              # about half a minute
    python examples/jax_training.py --short      # shorter sequences, a few seconds
"""

import argparse
from functools import partial
from time import perf_counter

import jax
import jax.numpy as jnp

from fastattn.integrations.jax import dot_product_attention

LETTERS, WIDTH, HEADS, BLOCKS, BATCH = 26, 64, 4, 2, 32
RATE, DECAYS, EPSILON = 3e-3, (0.9, 0.99), 1e-8


def make_parameters(key, length):
    shapes = {"letters": (LETTERS, WIDTH), "places": (length, WIDTH), "logits": (WIDTH, LETTERS)}
    for block in range(BLOCKS):
        shapes[f"packed {block}"] = (WIDTH, 3 * WIDTH)
        shapes[f"mixed {block}"] = (WIDTH, WIDTH)
        shapes[f"up {block}"] = (WIDTH, 4 * WIDTH)
        shapes[f"down {block}"] = (4 * WIDTH, WIDTH)
    keys = jax.random.split(key, len(shapes))
    return {
        name: jax.random.normal(key, shape) * shape[-2] ** -0.5
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def model(parameters, tokens):
    """The logits of what comes next, (batch, length, letters)."""
    p = parameters
    batch, length = tokens.shape
    x = p["letters"][tokens] + p["places"][:length]
    for block in range(BLOCKS):
        packed = normed(x) @ p[f"packed {block}"]
        query, key, value = jnp.split(packed.reshape(batch, length, 3 * HEADS, -1), 3, axis=2)
        attended = dot_product_attention(query, key, value, is_causal=True)
        x = x + attended.reshape(batch, length, WIDTH) @ p[f"mixed {block}"]
        x = x + jax.nn.gelu(normed(x) @ p[f"up {block}"]) @ p[f"down {block}"]
    return normed(x) @ p["logits"]


def normed(x):
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)


def draw(key, half):
    """Sequences, (batch, 2 * half)."""
    letters = jax.random.randint(key, (BATCH, half), 0, LETTERS)
    return jnp.concatenate([letters, letters], axis=1)


def loss_of(parameters, tokens):
    """The mean cross-entropy of the second half, and how much of it would be said right."""
    half = tokens.shape[1] // 2
    logits, wanted = model(parameters, tokens[:, :-1])[:, half - 1 :], tokens[:, half:]
    right = jnp.mean(logits.argmax(axis=-1) == wanted)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), wanted[..., None], axis=-1)
    return -chosen.mean(), right


@partial(jax.jit, static_argnames="half")
def train(parameters, moments, step, key, half):
    """One step of Adam (Kingma and Ba, 2015)."""
    tokens = draw(jax.random.fold_in(key, step), half)
    (loss, right), grads = jax.value_and_grad(loss_of, has_aux=True)(parameters, tokens)
    moments = [
        jax.tree.map(lambda m, g, d=decay, n=n: d * m + (1 - d) * g**n, moment, grads)
        for n, (moment, decay) in enumerate(zip(moments, DECAYS, strict=True), 1)
    ]
    first, second = (1 - decay ** (step + 1) for decay in DECAYS)
    parameters = jax.tree.map(
        lambda p, m, v: p - RATE * (m / first) / (jnp.sqrt(v / second) + EPSILON),
        parameters,
        *moments,
    )
    return parameters, moments, loss, right


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--short", action="store_true", help="10 letters instead of 64")
    half, steps = (10, 100) if parser.parse_args().short else (64, 300)

    key = jax.random.key(0)
    parameters = make_parameters(key, 2 * half)
    moments = [jax.tree.map(jnp.zeros_like, parameters)] * 2
    first = None
    began = perf_counter()
    for step in range(steps):
        parameters, moments, loss, right = train(parameters, moments, step, key, half)
        first = loss if first is None else first
        if step % (steps // 10) == 0:
            print(f"step {step:4}  cross-entropy {loss:.4f}  right {right:.1%}")
    jax.block_until_ready(parameters)
    print(f"{(perf_counter() - began) / steps * 1e3:.1f} ms a step, compiling included")

    loss, right = jax.jit(loss_of)(parameters, draw(jax.random.key(1), half))
    print(f"on new sequences {loss:.4f}, {right:.1%} right; {1 / LETTERS:.1%} by guessing")
    if not (loss < first / 10 and right > 0.95):
        raise SystemExit(f"{right:.1%} right, more than 95% wanted")


# %%
if __name__ == "__main__":
    main()
