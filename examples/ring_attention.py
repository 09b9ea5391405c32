"""Attention across processes
==========================

Each process holds a shard of the sequence, keys and values travel around a ring, and all is exact.

In the forward pass shards of keys and values go around the ring; a process attends to each and
merges the parts by their lse. In the backward pass the shards go around again, together with the
gradients that they collect on the way, and end where they began: Liu, Zaharia and Abbeel (2023),
"Ring Attention with Blockwise Transformers for Near-Infinite Context".

.. code-block:: sh

    pip install fastattn
    python examples/ring_attention.py

With mpi4py, ``ring.pass_on(x)`` is ``comm.sendrecv(x, after, source=before)`` with the ranks of the
neighbours. It ends with an error if results or gradients are not those of one process.
"""

import multiprocessing

import numpy as np

import fastattn

PROCESSES, HEADS, LENGTH, DIM = 2, 4, 600, 32


class Ring:
    """The place of one process among `size`, and its pipes to the neighbours."""

    def __init__(self, rank, size, before, after):
        self.rank, self.size, self.before, self.after = rank, size, before, after

    def pass_on(self, x):
        """Send `x` to the next process and return what the one before has sent."""
        # One of them must receive first, or all wait for room in their pipes.
        if self.rank == 0:
            received = self.before.recv()
            self.after.send(x)
            return received
        self.after.send(x)
        return self.before.recv()


# %%
# Forward. Under a causal mask positions count on the whole sequence, so each call says by
# ``q_offset`` where its queries are as seen from its keys.


def attend(ring, q, k, v):
    """The result and the lse of this process's queries, attending causally to all keys."""
    parts, k_v = [], (k, v)
    for step in range(ring.size):
        owner = (ring.rank - step) % ring.size
        offset = (ring.rank - owner) * q.shape[1]
        parts.append(fastattn.scaled_dot(q, *k_v, causal=True, q_offset=offset, return_lse=True))
        k_v = ring.pass_on(k_v)
    return fastattn.merge(*parts)


# %%
# Backward. `fastattn.scaled_dot_backward` takes the result and the lse of the whole, and the keys
# of one shard. It returns that shard's share of the gradient of the queries, and what these queries
# give to the gradients of its keys and values.


def pull_back(ring, grad_out, q, k, v, out, lse):
    """The gradients of this process's queries, keys and values."""
    dq = np.zeros_like(q)
    shard = (k, v, np.zeros_like(k), np.zeros_like(v))
    for step in range(ring.size):
        owner = (ring.rank - step) % ring.size
        offset = (ring.rank - owner) * q.shape[1]
        k, v, dk, dv = shard
        more = fastattn.scaled_dot_backward(
            grad_out, q, k, v, out, lse, causal=True, q_offset=offset
        )
        dq += more[0]
        shard = ring.pass_on((k, v, dk + more[1], dv + more[2]))
    return dq, *shard[2:]


# %%
# A process gets its shards, works, and reports. The parent puts the pieces together and compares
# them with the same in one process.


def work(ring, report, q, k, v, grad_out):
    out, lse = attend(ring, q, k, v)
    report.put((ring.rank, out, *pull_back(ring, grad_out, q, k, v, out, lse)))


def main():
    rng = np.random.default_rng(0)
    arrays = rng.standard_normal((4, HEADS, LENGTH, DIM), dtype=np.float32)
    shards = np.split(arrays, PROCESSES, axis=2)

    pipes = [multiprocessing.Pipe() for _ in range(PROCESSES)]
    results = multiprocessing.SimpleQueue()
    processes = []
    for rank, shard in enumerate(shards):
        ring = Ring(rank, PROCESSES, pipes[rank - 1][1], pipes[rank][0])
        processes.append(multiprocessing.Process(target=work, args=(ring, results, *shard)))
        processes[-1].start()
    found = sorted((results.get() for _ in processes), key=lambda result: result[0])
    for process in processes:
        process.join()

    q, k, v, grad_out = arrays
    out, pullback = fastattn.vjp(fastattn.scaled_dot, q, k, v, causal=True)
    for name, whole, *pieces in zip(
        ("out", "dq", "dk", "dv"), (out, *pullback(grad_out)), *(f[1:] for f in found), strict=True
    ):
        difference = np.abs(np.concatenate(pieces, axis=1) - whole).max()
        print(f"{name:3} of {PROCESSES} processes, each with {LENGTH // PROCESSES} positions: "
              f"within {difference:.1e} of one process")  # fmt: skip
        if not difference < 1e-5:
            raise SystemExit(f"{name} differs")


# %%
if __name__ == "__main__":
    main()
