"""How programs that measure their own memory begin: ``status(key)`` is in MiB."""

STATUS = """
import sys
import numpy as np
import fastattn

def status(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024
"""

# And those that measure one call: ``extra(call)`` is by how many MiB it raises the peak of the
# process beyond what is held before and what it returns; ``filled(*shape, dtype)`` is an array that
# lies in memory, of a dtype by its name.
EXTRA = (
    STATUS
    + """
def extra(call):
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak is what is held now
    before = status("VmRSS")
    results = call()
    results = results if isinstance(results, tuple) else (results,)
    return status("VmHWM") - before - sum(x.nbytes for x in results) / 2**20

def filled(*shape, dtype="float32"):
    if dtype == "bfloat16":
        from ml_dtypes import bfloat16 as dtype
    return np.full(shape, 0.01, dtype)
"""
)
