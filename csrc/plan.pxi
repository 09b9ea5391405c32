# Part of kernels.pyx: calls that are prepared once and run on other arrays of the same layout.

# A longer key is none: only small calls gain by a plan, and their arrays have few axes.
cdef enum:
    KEY_BYTES = 1024

cdef struct Key:
    char bytes[KEY_BYTES]
    Py_ssize_t n


cdef inline bint extend_key(Key *key, const void *data, Py_ssize_t n) noexcept:
    if key.n + n > KEY_BYTES:
        return False
    memcpy(key.bytes + key.n, data, n)
    key.n += n
    return True


cdef bint add_layout(Key *key, array) noexcept:
    """Add the dtype, shape and strides of a NumPy array, and whether it is aligned. False if it is
    none, or if there is no room.
    """
    cdef cnp.ndarray x
    cdef int head[2]
    if type(array) is not cnp.ndarray:
        return False
    x = <cnp.ndarray>array
    head[0] = x.descr.type_num
    head[1] = x.ndim | <int>x.descr.byteorder << 8 | cnp.PyArray_ISALIGNED(x) << 16
    return (
        extend_key(key, head, sizeof(head))
        and extend_key(key, x.shape, x.ndim * sizeof(cnp.npy_intp))
        and extend_key(key, x.strides, x.ndim * sizeof(cnp.npy_intp))
    )


cdef bint add_option(Key *key, option) noexcept:
    """Add an option and its type: None, a flag, a number, a name, or a tuple of these.

    False if it is anything else, whose contents may change.
    """
    cdef double real
    cdef long long number
    cdef int overflow = 0
    cdef Py_ssize_t size
    cdef const char *text
    if option is None:
        return extend_key(key, "n", 1)
    if option is False:
        return extend_key(key, "f", 1)
    if option is True:
        return extend_key(key, "t", 1)
    if type(option) is str:
        text = PyUnicode_AsUTF8AndSize(option, &size)
        if text is NULL:
            PyErr_Clear()
            return False
        number = size
        return (
            extend_key(key, "s", 1) and extend_key(key, &number, sizeof(number))
            and extend_key(key, text, size)
        )
    if type(option) is float:
        real = option
        return extend_key(key, "d", 1) and extend_key(key, &real, sizeof(real))
    if type(option) is int:
        number = PyLong_AsLongLongAndOverflow(option, &overflow)
        return not overflow and extend_key(key, "i", 1) and extend_key(key, &number, sizeof(number))
    if type(option) is tuple:
        number = len(<tuple>option)
        if not extend_key(key, "(", 1) or not extend_key(key, &number, sizeof(number)):
            return False
        for item in <tuple>option:
            if not add_option(key, item):
                return False
        return True
    return False


def plan_key(tuple arrays not None, tuple options not None):
    """What decides how a call is computed, as bytes: two calls with equal keys may differ in the
    elements of their arrays alone. None if that cannot be told of such arguments, as where an
    option is an array.
    """
    cdef Key key
    cdef const char *backend = c_getenv("FASTATTN_BACKEND")
    cdef const InstructionSet *isa
    key.n = 0
    if backend is not NULL and not extend_key(&key, backend, strlen(backend)):
        return None
    for array in arrays:
        if not add_layout(&key, array):
            return None
    for option in options:
        if not add_option(&key, option):
            return None
    isa = chosen()
    if not extend_key(&key, &isa, sizeof(isa)):
        return None
    return PyBytes_FromStringAndSize(key.bytes, key.n)


cdef enum:
    MAX_OPERANDS = 8  # of the inputs of a plan, and of its outputs

cdef struct Output:
    # An array that each run of a plan makes: of a shape in C's order, or in the memory order of an
    # input, whose shape it has.
    Py_ssize_t operand  # where in the call its address belongs
    int like  # which input, or -1
    bint zeroed, returned
    int ndim
    cnp.npy_intp shape[64]


ctypedef int (*RunCall)(void *call) except -1

cdef class Plan:
    """A call that is prepared, to run on arrays of the layout that it was made for.

    `attend` and `differentiate` prepare the plan that they are given. It runs on one thread unless
    it `uses_threads`. `outputs` are such arrays as they fill, in the order of their arguments, each
    with the index of the input that it is like (-1: none, it is in C's order), and two flags: is it
    zeroed before, and is it returned? `kept` are the arrays that every run reads.
    """
    cdef void *call
    cdef size_t call_bytes
    cdef RunCall execute
    cdef int n_inputs, n_outputs
    cdef Py_ssize_t inputs[MAX_OPERANDS]
    cdef Output outputs[MAX_OPERANDS]
    cdef list dtypes  # of the outputs
    cdef object kept
    cdef readonly bint uses_threads
    cdef Py_ssize_t threads, most_threads  # where in the call their number belongs; the most
    cdef int64_t running  # on a thread, in `call`; others work in copies of it

    def __init__(self, outputs not None, bint uses_threads):
        cdef Output *output
        self.dtypes, self.uses_threads = [], uses_threads
        for array, like, zeroed, returned in outputs:
            output = &self.outputs[self.n_outputs]
            output.like, output.zeroed, output.returned = like, zeroed, returned
            output.ndim = array.ndim
            for axis in range(output.ndim):
                output.shape[axis] = array.shape[axis]
            self.dtypes.append(array.dtype)
            self.n_outputs += 1

    def __dealloc__(self):
        free(self.call)

    cdef void *begin(self, size_t call_bytes, RunCall execute) except NULL:
        """Room for the parameters of the call, zeroed."""
        self.call, self.call_bytes, self.execute = calloc(1, call_bytes), call_bytes, execute
        if self.call is NULL:
            raise MemoryError(f"{call_bytes} bytes")
        return self.call

    cdef void take_input(self, const Operand *operand) noexcept:
        """The next input is this operand of the call."""
        self.inputs[self.n_inputs] = <char *>operand - <char *>self.call
        self.n_inputs += 1

    cdef void take_output(self, int i, const Operand *operand) noexcept:
        self.outputs[i].operand = <char *>operand - <char *>self.call

    cdef void take_threads(self, const int *threads, Py_ssize_t most) noexcept:
        self.threads, self.most_threads = <char *>threads - <char *>self.call, most

    def run(self, tuple arrays not None, int threads):
        """What the call returns for these inputs."""
        cdef void *copy
        if not exchange(&self.running, True):
            try:
                return self.run_in(self.call, arrays, threads)
            finally:
                store_release(&self.running, False)
        copy = malloc(self.call_bytes)
        if copy is NULL:
            raise MemoryError(f"{self.call_bytes} bytes")
        try:
            memcpy(copy, self.call, self.call_bytes)
            return self.run_in(copy, arrays, threads)
        finally:
            free(copy)

    cdef run_in(self, void *call, tuple arrays, int threads):
        cdef cnp.ndarray array
        cdef Output *output
        cdef list results = [], made = []
        cdef int i
        for i in range(self.n_inputs):
            array = <cnp.ndarray>arrays[i]
            (<Operand *>(<char *>call + self.inputs[i])).data = <char *>cnp.PyArray_DATA(array)
        for i in range(self.n_outputs):
            output = &self.outputs[i]
            dtype = <cnp.dtype>self.dtypes[i]
            Py_INCREF(dtype)  # which both functions steal
            if output.like < 0:
                array = PyArray_Empty(output.ndim, output.shape, dtype, 0)
            else:
                array = PyArray_NewLikeArray(
                    <cnp.ndarray>arrays[output.like], cnp.NPY_KEEPORDER, dtype, 0
                )
            if output.zeroed:
                memset(cnp.PyArray_DATA(array), 0, cnp.PyArray_NBYTES(array))
            (<Operand *>(<char *>call + output.operand)).data = <char *>cnp.PyArray_DATA(array)
            (results if output.returned else made).append(array)
        threads = available_threads(min(threads, self.most_threads)) if self.uses_threads else 1
        (<int *>(<char *>call + self.threads))[0] = threads
        self.execute(call)
        return results[0] if self.n_outputs == 1 else tuple(results)
