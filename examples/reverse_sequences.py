"""A GRU encoder and decoder
=========================

In PyTorch, with attention between them, they learn to reverse sequences.

A bidirectional encoder reads the letters; the decoder says them backwards, one at a time, and looks
at every step for what it needs among the encoder's states. The score of a state is its dot product
with the decoder's, or their cosine; `fastattn.integrations.torch` computes the attention and its
gradients, and torch all the rest. The picture shows where the trained decoders look.

.. code-block:: sh

    pip install fastattn[torch,plot]
    python examples/reverse_sequences.py           # about half a minute
    python examples/reverse_sequences.py --short   # shorter sequences and one score, some seconds
"""

from time import perf_counter

import torch
from common import arguments, save_picture
from torch import nn

import fastattn
from fastattn import plot
from fastattn.integrations.torch import scaled_dot

LETTERS, WIDTH, BATCH = 26, 64, 128
BEGIN = LETTERS  # what the decoder reads before its first letter
TEMPERATURE = 0.1


def by_dot_product(query, key):
    return query, key, 1.0


def by_cosine(query, key):
    normalize = nn.functional.normalize
    return normalize(query, dim=-1), normalize(key, dim=-1), 1 / TEMPERATURE


class Reverser(nn.Module):
    """Luong et al. (2015), "Effective Approaches to Attention-based NMT", section 3.1."""

    def __init__(self, score):
        super().__init__()
        self.score = score
        self.letters = nn.Embedding(LETTERS + 1, WIDTH)
        self.encoder = nn.GRU(WIDTH, WIDTH // 2, batch_first=True, bidirectional=True)
        self.decoder = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.combined = nn.Linear(2 * WIDTH, WIDTH)
        self.answer = nn.Linear(WIDTH, LETTERS)

    def encode(self, given):
        """The states at all letters, and the last ones of both directions for the decoder."""
        states, last = self.encoder(self.letters(given))
        return states, last.transpose(0, 1).flatten(1)[None]

    def decode(self, said, states, last):
        """``(scores of the next letters, the decoder's states, the last of them)``."""
        hidden, last = self.decoder(self.letters(said), last)
        query, key, scale = self.score(hidden, states)
        context = scaled_dot(query[:, None], key[:, None], states[:, None], scale=scale)[:, 0]
        both = torch.cat([context, hidden], dim=-1)
        return self.answer(torch.tanh(self.combined(both))), hidden, last

    def forward(self, given, wanted):
        """The scores of all letters, told at each what came before it."""
        begin = torch.full_like(wanted[:, :1], BEGIN)
        return self.decode(torch.cat([begin, wanted[:, :-1]], dim=1), *self.encode(given))[0]

    @torch.no_grad()
    def reverse(self, given):
        """``(letters, weights)``, each letter said from its own words before."""
        states, last = self.encode(given)
        said, hidden = [torch.full_like(given[:, :1], BEGIN)], []
        for _ in range(given.shape[1]):
            scores, state, last = self.decode(said[-1], states, last)
            said.append(scores.argmax(dim=-1))
            hidden.append(state)
        query, key, scale = self.score(torch.cat(hidden, dim=1), states)
        _, weights = fastattn.scaled_dot(query[:, None].numpy(), key[:, None].numpy(),
                                         states[:, None].numpy(), scale=scale,
                                         return_weights=True)  # fmt: skip
        return torch.cat(said[1:], dim=1), weights[:, 0]


def draw_letters(longest, shortest=3):
    """Letters (BATCH, length) of a random length, and the same backwards."""
    length = torch.randint(shortest, longest + 1, ()).item()
    given = torch.randint(LETTERS, (BATCH, length))
    return given, given.flip(1)


def train(model, longest, steps):
    """The losses, printed now and then."""
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, steps)
    losses = []
    began = perf_counter()
    for step in range(steps):
        given, wanted = draw_letters(longest)
        scores = model(given, wanted)
        loss = nn.functional.cross_entropy(scores.flatten(0, 1), wanted.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % (steps // 10) == 0 or step == steps - 1:
            print(f"step {step:4}  loss {losses[-1]:.4f}")
    print(f"{(perf_counter() - began) / steps * 1e3:.1f} ms a step")
    return losses


def letters(numbers):
    return [chr(ord("a") + n) for n in numbers.tolist()]


def draw(pyplot, maps):
    figure, panels = pyplot.subplots(
        1, len(maps), figsize=(4.5 * len(maps), 4), squeeze=False, layout="constrained"
    )
    for ax, (name, (given, said, weights)) in zip(panels[0], maps.items(), strict=True):
        plot.attention(weights, said, given, ax=ax, vmax=1)
        ax.set(xlabel="read", ylabel="said", title=f"by {name}")
    return figure


def main():
    options = arguments(__doc__, "up to 4 letters instead of 8, by cosine alone")
    longest, steps = (4, 300) if options.short else (8, 800)
    scores = {"cosine": by_cosine}
    if not options.short:
        scores["dot product"] = by_dot_product

    torch.set_num_threads(1)  # a model this small gains nothing from more
    maps = {}
    for name, score in scores.items():
        torch.manual_seed(0)
        print(f"score by {name}")
        model = Reverser(score)
        losses = train(model, longest, steps)
        given, wanted = draw_letters(longest, longest)
        said, weights = model.reverse(given)
        right = (said == wanted).float().mean().item()
        first = letters(given[0]), letters(said[0]), weights[0]
        print(f"{''.join(first[0])} -> {''.join(first[1])}, {right:.1%} of new letters are right\n")
        maps[name] = first
        if not (losses[-1] < 0.1 * losses[0] and right > 0.9):
            raise SystemExit("it has not learned to reverse")
    save_picture(options.output / "reverse_sequences.png", draw, maps)


# %%
if __name__ == "__main__":
    main()
