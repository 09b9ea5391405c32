# Part of kernels.pyx: a call of the backward pass.

cdef struct BackwardCall:
    # A backward pass that is ready to run.
    BackwardParams backward
    Workspace workspace
    Py_ssize_t scratch_bytes, tickets_bytes
    int threads


cdef int run_backward(void *ready) except -1:
    """Run all tiles of a BackwardCall. An interruption skips the rest and raises."""
    cdef BackwardCall *call = <BackwardCall *>ready
    cdef BackwardParams *backward = &call.backward
    cdef CallParams *params = &backward.call
    cdef Workspace *workspace = &call.workspace
    cdef Py_ssize_t tiles_to_prepare = params.key_heads * params.items, n = params.blocks
    cdef Py_ssize_t items = params.key_heads // backward.sharers * n
    cdef int64_t *tickets = <int64_t *>allocate_workspace(
        workspace, call.threads, call.scratch_bytes,
        (backward.relative_biases + backward.dim_weights) * <Py_ssize_t>sizeof(double),
        call.tickets_bytes,
    )
    with nogil:
        memset(tickets, 0, call.tickets_bytes)
        tickets = assign_tickets(
            params, backward.key_heads, &backward.q_tickets, &params.out, params.items, tickets
        )
        if params.pages.data is NULL:
            tickets = assign_tickets(
                params, backward.key_heads, &backward.k_tickets, &backward.grad_k, n, tickets
            )
            tickets = assign_tickets(
                params, backward.key_heads, &backward.v_tickets, &backward.grad_v, n, tickets
            )
        backward.sums_ticket = tickets
        # Items start in order: a block waits only for blocks before it.
        if parallel_for(prepare_item, backward, workspace, tiles_to_prepare, call.threads):
            parallel_for(differentiate_item, backward, workspace, items, call.threads)
        free(workspace.allocated)
    if PyErr_Occurred() is not NULL:
        return -1
    return 0


cdef int init_gradients(
    BackwardParams *backward, Tile *tile, cnp.ndarray grad_relative_bias,
    cnp.ndarray grad_dim_weights,
) except -1:
    """What all tiles have in common for the gradients that are wanted, after `init_tile`."""
    cdef const CallParams *params = &backward.call
    tile.differentiating = True
    tile.grad_out_format = backward.grad_out.format
    tile.grad_out_dim, tile.result_dim = backward.grad_out.dim, backward.result.dim
    if backward.grad_k.data is not NULL:
        tile.grad_k_format, tile.grad_v_format = backward.grad_k.format, backward.grad_v.format
        tile.grad_k_key, tile.grad_v_key = backward.grad_k.row, backward.grad_v.row
    tile.wants_bias = backward.grad_bias.data is not NULL
    tile.rows_share_bias = tile.wants_bias and backward.grad_bias.row == 0
    tile.wants_sums = backward.row_sums.data is not NULL
    backward.relative_biases = backward.dim_weights = 0
    if grad_relative_bias is not None:
        tile.wants_relative_bias = True
        backward.grad_relative_bias = <double *>cnp.PyArray_DATA(grad_relative_bias)
        backward.relative_biases = params.relative_bias_bytes // params.kernels.real_bytes
    if grad_dim_weights is not None:
        tile.wants_dim_weights = True
        backward.grad_dim_weights = <double *>cnp.PyArray_DATA(grad_dim_weights)
        backward.dim_weights = tile.head_dim
    return 0


cdef int take_backward_operands(Plan plan, BackwardParams *backward) except -1:
    """The inputs and outputs of a plan, in the order of its arrays."""
    cdef CallParams *params = &backward.call
    plan.take_input(&backward.grad_out)
    plan.take_input(&params.q)
    plan.take_input(&params.k)
    plan.take_input(&params.v)
    plan.take_input(&backward.result)
    plan.take_input(&backward.lse)
    if backward.grad_lse.data is not NULL:
        plan.take_input(&backward.grad_lse)
    plan.take_output(0, &params.out)
    plan.take_output(1, &backward.grad_k)
    plan.take_output(2, &backward.grad_v)
    plan.take_output(3, &backward.rows)
    return 0


def differentiate(
    b, str compute_dtype, int threads, cnp.ndarray rows not None, cnp.ndarray grad_q not None,
    cnp.ndarray grad_k, cnp.ndarray grad_v, cnp.ndarray key_heads not None,
    cnp.ndarray grad_bias=None, cnp.ndarray row_sums=None, cnp.ndarray relative_bias=None,
    cnp.ndarray grad_relative_bias=None, cnp.ndarray grad_dim_weights=None, Plan plan=None,
):
    """Run the backward pass of `b`, a `fastattn.core.backward.Backward`.

    Add to `grad_q`, (batch, heads, queries, head_dim), which must be zero before, and fill
    `grad_k` and `grad_v`, (batch, kv_heads, keys, dim). Their dtype is the one that the kernels sum
    in, and their dims are contiguous. They are summed along axes of length 1 that the call
    broadcasts; without any, `grad_k` and `grad_v` may also be of half precision. Of keys in pages
    both are None.

    An lse beyond `b.coarse()` is computed again by the kernels. `rows`, float64 (batch, heads,
    queries, 3) and contiguous, is filled with the lse, the rest that its rounding lost, and the
    mean of the weights' gradients.
    `grad_bias` and `row_sums` are added to unless None. `grad_bias` broadcasts to the scores; it
    has the dtype of sums, or float64 if it broadcasts along the queries, and contiguous keys.
    `row_sums` is float64 (batch, heads, queries, 6) and contiguous: see `Tile.row_sums`, the last
    two of which are summed where the gradient of the scale is wanted. `grad_relative_bias`, float64
    and contiguous, is added to unless None, and has the shape of `relative_bias`; so is
    `grad_dim_weights`, float64 (head_dim,) and contiguous, of an additive score.
    `key_heads`, int64 (items, sharers), holds all flattened key heads; those of a row share one
    `grad_bias`. The rest is as for `attend`.
    """
    cdef BackwardCall own
    cdef BackwardCall *call = &own
    if plan is not None:
        call = <BackwardCall *>plan.begin(sizeof(BackwardCall), run_backward)
    cdef BackwardParams *backward = &call.backward
    cdef Tile *tile = &call.workspace.prototype
    cdef Py_ssize_t counts, most_threads, value_dim
    cdef CallParams *params = &backward.call
    p = b.problem
    cdef bint wants_scale = b.wants("scale")
    cdef cnp.ndarray v = p.v, scales = scales_of(p, wants_scale)
    cdef cnp.ndarray coarse = np.atleast_1d(b.coarse())
    value_dim = v.shape[v.ndim - 1]
    bind_problem(params, p, grad_q, scales, relative_bias)
    cdef bint dot = params.score_function == DOT
    bind_operand(params, &backward.grad_out, b.grad_out, 3)
    bind_operand(params, &backward.result, b.out, 3)
    bind_operand(params, &backward.lse, b.lse, 2)
    bind_operand(params, &backward.grad_lse, b.grad_lse, 2)
    bind_operand(params, &backward.rows, rows, 3)
    bind_operand(params, &backward.grad_bias, grad_bias, 3)
    bind_operand(params, &backward.row_sums, row_sums, 3)
    bind_operand(params, &backward.coarse, coarse, 1)
    backward.key_heads = <const int64_t *>cnp.PyArray_DATA(key_heads)
    backward.sharers = key_heads.shape[1]
    bind_operand(params, &backward.grad_k, grad_k, 3)
    bind_operand(params, &backward.grad_v, grad_v, 3)
    params.kernels = backward_kernels_for(
        compute_dtype, params.group * params.n_queries, params.head_dim, value_dim, dot
    )
    sequences = cut_sequences(params, p.packing, compute_dtype, value_dim, dot, True, False)
    if params.key_heads * params.blocks == 0 and grad_k is not None:
        grad_k.fill(0)
        grad_v.fill(0)
    if params.key_heads == 0:
        return
    most_threads = max(1, key_heads.shape[0] * params.blocks)
    call.threads = available_threads(min(threads, most_threads))
    init_tile(params, tile, relative_bias)
    tile.value_dim, tile.wants_scale = value_dim, wants_scale
    block_table = bind_stored_keys(params, tile, p)
    init_gradients(backward, tile, grad_relative_bias, grad_dim_weights)
    counts = 6 + max(params.items, 1) + 2 * max(params.blocks, 1)
    call.tickets_bytes = (counts * params.key_heads + 1) * <Py_ssize_t>sizeof(int64_t)
    call.workspace.rows = tile_rows(params)
    call.scratch_bytes = scratch_of(params, tile)
    if plan is None:
        run_backward(call)
        return
    plan.kept = read_by_plans(p), scales, relative_bias, coarse, key_heads, sequences
    plan.take_threads(&call.threads, most_threads)
    take_backward_operands(plan, backward)
