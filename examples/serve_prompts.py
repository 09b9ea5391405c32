"""Serving many prompts at once
============================

Requests of different lengths share the batch of one small transformer, and one system prompt.

The model of :doc:`generate_text` learns aphorisms here, in about ten seconds, and is then asked to
finish them. A request that comes in forks the slot that holds the system prompt, which copies no
keys; each step then takes the whole prompt of a new request together with one letter of each of the
others, and a request that has ended frees its slot for the next. All but attention sees the letters
of a step as one sequence; for attention each slot's are padded on the right, and ``counts`` tells
the cache how many are real (Yu et al. 2022, "Orca": iteration-level scheduling and selective
batching, section 3).

.. code-block:: sh

    pip install fastattn[plot] torch
    python examples/serve_prompts.py           # about twenty seconds
    python examples/serve_prompts.py --short   # less training and fewer requests, some seconds

It ends with an error unless each answer is, letter for letter, the one that the same request gets
on its own.
"""

from collections import deque
from time import perf_counter

import numpy as np
from common import arguments, save_picture
from generate_text import HEAD_DIM, KV_HEADS, LAYERS, SLOPES, forward, train, zen

import fastattn

SYSTEM = (
    "You are told how an aphorism of the Zen of Python begins. Finish it letter for letter and say "
    "nothing else, neither what it means nor whether it is true.\n\n"
)
SLOTS, LONGEST = 6, 80


class Request:
    """The first words of an aphorism, and the letters that the model has added to them."""

    def __init__(self, prompt, end):
        self.prompt, self.answer, self._end = prompt, [], end

    def hear(self, letter):
        self.answer.append(letter)

    @property
    def ended(self):
        return len(self.answer) == LONGEST or self.answer[-1:] == [self._end]


class Server:
    """A cache for each layer, with a slot for each request and slot 0 for the system prompt."""

    def __init__(self, weights, system, slots):
        self.weights, self.slots = weights, slots + 1
        self.caches = [fastattn.KVCache(self.slots, KV_HEADS, HEAD_DIM) for _ in range(LAYERS)]
        self.step({0: system})

    def admit(self):
        """A slot that has read the system prompt."""
        return [cache.fork(0) for cache in self.caches][-1]  # the same one in each

    def free(self, slot):
        for cache in self.caches:
            cache.free(slot)

    def step(self, new):
        """The most likely next letter of each slot, from the letters that are new in it."""
        counts = np.array([len(new.get(slot, ())) for slot in range(self.slots)])
        owner = np.repeat(np.arange(self.slots), counts)
        ends = counts.cumsum()
        row = np.arange(len(owner)) - (ends - counts)[owner]

        def padded(x):
            """Of (1, heads, letters, dim) that of each slot: (slots, heads, n, dim)."""
            rows = np.zeros((self.slots, counts.max(), x.shape[1], HEAD_DIM), x.dtype)
            rows[owner, row] = x[0].swapaxes(0, 1)
            return rows.swapaxes(1, 2)

        def attend(cache, q, k, v):
            cache.append(padded(k), padded(v), counts)
            out = cache.attend(padded(q), counts, alibi=SLOPES)
            return out[owner, :, row].swapaxes(0, 1)[None]

        layers = [lambda *qkv, cache=cache: attend(cache, *qkv) for cache in self.caches]
        ids = np.concatenate([new[slot] for slot in sorted(new)])
        scores = forward(self.weights, ids[None], layers)[0]
        return {slot: scores[ends[slot] - 1].argmax() for slot in new}


def serve(server, requests):
    """Answer the requests, as many at a time as there are slots; what each step was like."""
    waiting, running, steps = deque(enumerate(requests)), {}, []
    while waiting or running:
        new = {slot: requests[n].answer[-1:] for slot, n in running.items()}
        while waiting and len(running) < server.slots - 1:
            n, request = waiting.popleft()
            slot = server.admit()
            running[slot], new[slot] = n, request.prompt
        said = server.step(new)
        cache = server.caches[0]
        apart = sum(-(-length // 64) for length in cache.lengths[1:])
        steps.append((cache.pages_in_use, apart, dict(running)))
        for slot, letter in said.items():
            request = requests[running[slot]]
            request.hear(letter)
            if request.ended:
                server.free(slot)
                del running[slot]
    return steps


def answer_alone(weights, system, request):
    """The same with caches of its own."""
    caches = [fastattn.KVCache(1, KV_HEADS, HEAD_DIM) for _ in range(LAYERS)]

    def attend(cache, q, k, v):
        cache.append(k, v)
        return cache.attend(q, alibi=SLOPES)

    layers = [lambda *qkv, cache=cache: attend(cache, *qkv) for cache in caches]
    new = [*system, *request.prompt]
    while not request.ended:
        request.hear(forward(weights, np.array([new]), layers)[0, -1].argmax())
        new = request.answer[-1:]


def draw(pyplot, steps, prompts):
    figure, (pages, slots) = pyplot.subplots(
        2, 1, figsize=(8, 5), layout="constrained", sharex=True, height_ratios=(3, 2)
    )
    in_use, apart, running = zip(*steps, strict=True)
    edges = np.arange(len(steps) + 1)
    pages.stairs(apart, edges, color="#E69F00", label="if no request shared the system prompt's")
    pages.stairs(in_use, edges, color="#0072B2", fill=True, alpha=0.6, label="in use")
    pages.set(ylabel="pages of 64 tokens", ylim=(0, None), title="the cache of one layer")
    pages.legend(frameon=False, loc="lower center")
    pages.spines[["top", "right"]].set_visible(False)

    for n in range(len(prompts)):
        taken = [(step, slot) for step, now in enumerate(running)
                 for slot, request in now.items() if request == n]  # fmt: skip
        first, slot = taken[0]
        slots.barh(slot, len(taken), left=first, color=f"C{n % 10}", alpha=0.5, edgecolor="white")
        fits = prompts[n][: len(taken) * 4 // 5]
        slots.text(first + 1, slot, fits, va="center", fontsize=6)
    slots.set(xlabel="step", ylabel="slot", yticks=range(1, SLOTS + 1))
    slots.spines[["top", "right"]].set_visible(False)
    return figure


def main():
    given = arguments(__doc__, "less training and fewer requests")
    aphorisms = [line + "\n" for line in zen().split("\n") if line]
    rng = np.random.default_rng(0)
    text = SYSTEM + "".join("".join(rng.permutation(aphorisms)) for _ in range(20))
    letters = sorted(set(text))

    def encode(words):
        return [letters.index(c) for c in words]

    def decode(ids):
        return "".join(letters[n] for n in ids)

    start = perf_counter()
    weights, loss = train(np.array(encode(text)), len(letters), 40 if given.short else 300)
    print(f"trained in {perf_counter() - start:.0f} s, loss {loss:.3f}\n")

    asked = rng.permutation(aphorisms * 2)[: 10 if given.short else None]
    prompts = [" ".join(line.split()[: rng.integers(1, len(line.split()))]) for line in asked]
    system, end = encode(SYSTEM), letters.index("\n")
    together, alone = ([Request(encode(x), end) for x in prompts] for _ in range(2))

    start = perf_counter()
    steps = serve(Server(weights, system, SLOTS), together)
    seconds = perf_counter() - start
    for prompt, request in zip(prompts, together, strict=True):
        print(f"{prompt}|{decode(request.answer).rstrip()}")
    total = sum(len(request.answer) for request in together)
    print(f"\n{len(prompts)} requests together: {total / seconds:.0f} tokens per second,", end=" ")
    print(f"at most {max(step[0] for step in steps)} pages in use")

    start = perf_counter()
    for request in alone:
        answer_alone(weights, system, request)
    seconds = perf_counter() - start
    print(f"one after the other: {total / seconds:.0f} tokens per second")

    save_picture(given.output / "serve_prompts.png", draw, steps, prompts)
    if any(a.answer != b.answer for a, b in zip(together, alone, strict=True)):
        raise SystemExit("the answer to a request depends on what is served beside it")
    print("each answer is the one that its request gets alone")


# %%
if __name__ == "__main__":
    main()
