"""What the ``numba`` backend runs: vectors and the register tile (`vectors`), and the kernel of a
tile (`tile`). Importing one of these imports Numba; nothing else in the package does.
"""
