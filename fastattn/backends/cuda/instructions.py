"""The instructions of tensor cores, as device functions: in PTX, or as the simulator's threads do
them together.
"""

from .toolkit import SIMULATED

if SIMULATED:
    from .simulated_instructions import (
        commit,
        copy16,
        exp2,
        load_matrices,
        mma_maker,
        pack_maker,
        shuffle_xor,
        wait_all,
    )  # fmt: skip
else:
    from .ptx import (
        commit,
        copy16,
        exp2,
        load_matrices,
        mma_maker,
        pack_maker,
        shuffle_xor,
        wait_all,
    )  # fmt: skip

__all__ = [
    "commit", "copy16", "exp2", "load_matrices", "mma_maker", "pack_maker", "shuffle_xor",
    "wait_all",
]  # fmt: skip
