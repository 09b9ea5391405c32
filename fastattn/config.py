"""What is here: the versions, the machine and the backends."""

from __future__ import annotations

__all__ = ["show_config"]


def show_config() -> None:
    """Print the versions, the machine, the instruction sets, the threads and the backends, as
    ``python -m fastattn info`` does.
    """
    from .bench.machine import info
    from .bench.report import print_info

    print_info(info())
