"""How programs that measure their own memory begin: ``status(key)`` is in MiB."""

STATUS = """
import sys
import numpy as np
import fastattn

def status(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024
"""
