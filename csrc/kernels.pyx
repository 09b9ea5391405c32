# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The macro-kernel: the loop over the tiles of a problem, on several threads.

``tile.c`` computes a tile; ``instruction_sets.c`` lists its copies, one for each instruction set.
"""

import numpy as np

cimport numpy as cnp
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.ref cimport Py_INCREF
from cpython.unicode cimport PyUnicode_AsUTF8
from cython.parallel cimport parallel, prange, threadid
from libc.float cimport DBL_EPSILON, FLT_EPSILON
from libc.math cimport INFINITY, fabs, log
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free, malloc
from libc.stdlib cimport getenv as c_getenv
from libc.string cimport memcpy, memset, strlen

cnp.import_array()

cdef extern from "Python.h":
    # Without `except`: the exception stays set until the call ends.
    int PyErr_CheckSignals() noexcept
    void *PyErr_Occurred() noexcept
    void PyErr_Clear() noexcept
    const char *PyUnicode_AsUTF8AndSize(object, Py_ssize_t *) noexcept
    long long PyLong_AsLongLongAndOverflow(object, int *) noexcept

cdef extern from "numpy/arrayobject.h":
    # Both steal a reference to the dtype.
    cnp.ndarray PyArray_Empty(int, cnp.npy_intp *, cnp.dtype, int)
    cnp.ndarray PyArray_NewLikeArray(cnp.ndarray, cnp.NPY_ORDER, cnp.dtype, int)

cdef extern from "platform.h" nogil:
    int omp_get_max_threads()
    int omp_get_num_procs()
    int omp_get_num_places()
    int omp_get_place_num_procs(int)
    void omp_get_place_proc_ids(int, int *)
    bint is_first_thread()
    int creatable_threads(int)
    int grow_pool(int)
    double seconds()
    int64_t load_acquire(const int64_t *)
    void store_release(int64_t *, int64_t)
    int64_t exchange(int64_t *, int64_t)

cdef extern from "sched.h" nogil:
    int sched_yield()

cdef extern from "unistd.h" nogil:
    int getpid()


def getenv(str name):
    """The environment variable `name`, or None: `os.getenv`, but faster."""
    cdef const char *value = c_getenv(PyUnicode_AsUTF8(name))
    return None if value is NULL else value.decode("utf-8", "surrogateescape")


include "tile.pxi"
include "kernel_choice.pxi"
include "threads.pxi"
include "call.pxi"
include "work_items.pxi"
include "tiles.pxi"
include "weight_maps.pxi"
include "plan.pxi"
include "forward.pxi"
include "tickets.pxi"
include "backward.pxi"
include "backward_call.pxi"
include "tangents.pxi"
include "sparse.pxi"
include "sparse_calls.pxi"
include "peak.pxi"
