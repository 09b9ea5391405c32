"""The instructions of tensor cores, as device functions: in PTX, or as the simulator's threads do
them together.
"""

from .toolkit import SIMULATED

if SIMULATED:
    from .simulated_instructions import (
        commit,
        copy16,
        exp2,
        fence,
        load_matrices,
        mma_maker,
        pack_maker,
        shuffle_xor,
        wait_all,
        wgmma_maker,
    )
else:
    from .ptx import (
        commit,
        copy16,
        exp2,
        fence,
        load_matrices,
        mma_maker,
        pack_maker,
        shuffle_xor,
        wait_all,
        wgmma_maker,
    )

__all__ = [
    "commit", "copy16", "exp2", "fence", "load_matrices", "mma_maker", "pack_maker", "shuffle_xor",
    "wait_all", "wgmma_maker",
]  # fmt: skip
