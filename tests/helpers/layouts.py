"""The same values, lying in memory in another way."""

import numpy as np


def misaligned(x):
    """The same values at an odd address."""
    buffer = np.zeros(x.nbytes + 1, np.uint8)
    y = buffer[1:].view(x.dtype).reshape(x.shape)
    y[...] = x
    assert x.itemsize == 1 or not y.flags.aligned
    return y


def in_order(x, axes):
    """The same values, axes lying in memory in the order `axes`."""
    return np.ascontiguousarray(x.transpose(axes)).transpose(np.argsort(axes))


def every_other(x):
    """The same values, every axis with a gap after each element."""
    gap = 1 if x.dtype.kind in "iu" else np.nan
    y = np.full([2 * n for n in x.shape], gap, x.dtype)[tuple(slice(0, 2 * n, 2) for n in x.shape)]
    y[...] = x
    return y


def backwards(x):
    """The same values, every stride negative."""
    flip = (slice(None, None, -1),) * x.ndim
    return np.ascontiguousarray(x[flip])[flip]


def read_only(x):
    x = x.copy()
    x.flags.writeable = False
    return x


LAYOUTS = {
    "sequence first": lambda x: in_order(x, (0, 2, 1, 3)),
    "transposed": lambda x: in_order(x, (0, 1, 3, 2)),  # last axis not contiguous
    "Fortran": np.asfortranarray,
    "batch last": lambda x: in_order(x, (1, 2, 3, 0)),
    "backwards": backwards,
    "every other": every_other,
    "read-only": read_only,
    "misaligned": misaligned,
    "byte-swapped": lambda x: x.astype(x.dtype.newbyteorder()),
    "list": lambda x: x.tolist(),
}
