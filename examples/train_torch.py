"""Training with PyTorch
=====================

A transformer whose attention is fastattn's adds two marked numbers in a long sequence.

The adding problem of Hochreiter and Schmidhuber (1997), "Long short-term memory", section 5.4: of
many random numbers two are marked, and their sum is wanted. `fastattn.integrations.torch` takes the
place of torch's own attention, so modules, autograd and optimizers are used as ever.

.. code-block:: sh

    pip install fastattn[torch]
    python examples/train_torch.py              # about half a minute
    python examples/train_torch.py --short      # shorter sequences, a few seconds
"""

import argparse
from time import perf_counter

import torch
from torch import nn

from fastattn.integrations.torch import scaled_dot_product_attention

WIDTH, HEADS, BATCH = 32, 2, 32
GUESSING = 1 / 6  # the variance of the sum: what the best constant leaves
SOLVED = GUESSING / 20


class Block(nn.Module):
    """Attention and a feed-forward layer, each added to what came in."""

    def __init__(self):
        super().__init__()
        self.norm, self.norm_mixed = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.packed = nn.Linear(WIDTH, 3 * WIDTH)
        self.mixed = nn.Linear(WIDTH, WIDTH)
        self.feed = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x):
        packed = self.packed(self.norm(x)).unflatten(-1, (3, HEADS, -1))
        query, key, value = packed.permute(2, 0, 3, 1, 4)  # views: nothing is copied
        attended = scaled_dot_product_attention(query, key, value)
        x = x + self.mixed(attended.transpose(1, 2).flatten(-2))
        return x + self.feed(self.norm_mixed(x))


class Adder(nn.Module):
    """Reads (number, mark) pairs; its answer is read off one more token in front."""

    def __init__(self):
        super().__init__()
        self.inputs = nn.Linear(2, WIDTH)
        self.question = nn.Parameter(torch.randn(WIDTH))
        self.blocks = nn.Sequential(Block(), Block())
        self.answer = nn.Linear(WIDTH, 1)

    def forward(self, pairs):
        question = self.question.expand(len(pairs), 1, WIDTH)
        x = torch.cat([question, self.inputs(pairs)], dim=1)
        return self.answer(self.blocks(x)[:, 0])[:, 0]


def draw(length):
    """``(pairs, sums)``: (batch, length, 2) and (batch,)."""
    numbers, marks = torch.rand(BATCH, length), torch.zeros(BATCH, length)
    marks.scatter_(1, torch.rand(BATCH, length).topk(2).indices, 1.0)
    return torch.stack([numbers, marks], dim=-1), (numbers * marks).sum(dim=1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--short", action="store_true", help="10 numbers instead of 60")
    length, steps = (10, 300) if parser.parse_args().short else (60, 600)

    torch.manual_seed(0)
    torch.set_num_threads(1)  # a model this small gains nothing from more
    model = Adder()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    began = perf_counter()
    for step in range(steps):
        pairs, sums = draw(length)
        loss = nn.functional.mse_loss(model(pairs), sums)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % (steps // 10) == 0:
            print(f"step {step:4}  mean squared error {loss.item():.5f}")
    print(f"{(perf_counter() - began) / steps * 1e3:.1f} ms a step")

    with torch.no_grad():
        errors = [nn.functional.mse_loss(model(p), s).item() for p, s in map(draw, [length] * 20)]
    error = sum(errors) / len(errors)
    print(f"on new sequences {error:.5f}, the best constant {GUESSING:.5f}")
    if not error < SOLVED:
        raise SystemExit(f"a mean squared error of {error:.5f}, less than {SOLVED:.5f} wanted")


# %%
if __name__ == "__main__":
    main()
