"""The instructions of tensor cores, as device functions: in PTX, or as the simulator's threads do
them together.
"""

from importlib import import_module

from .toolkit import SIMULATED

__all__ = [
    "commit", "copy16", "exp2", "fence", "load_matrices", "mma_maker", "pack_maker", "shuffle_xor",
    "wait_all", "wgmma_maker",
]  # fmt: skip

_made = import_module(".simulated_instructions" if SIMULATED else ".ptx", __package__)
commit, copy16, exp2, fence = _made.commit, _made.copy16, _made.exp2, _made.fence
load_matrices, mma_maker, wgmma_maker = _made.load_matrices, _made.mma_maker, _made.wgmma_maker
pack_maker, shuffle_xor, wait_all = _made.pack_maker, _made.shuffle_xor, _made.wait_all
