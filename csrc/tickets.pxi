# Part of kernels.pyx: the order in which work items add to a gradient that they share.

cdef struct Tickets:
    # Key heads that share an operand by broadcasting add to one gradient, in the order of their
    # work items, as tickets say, so that the sum does not depend on the threads.
    Py_ssize_t sharers  # the most key heads of one gradient
    Py_ssize_t blocks  # of each gradient; each has a ticket counter
    int64_t *gradient  # (key heads): the index of their gradient
    int64_t *before  # (key heads): how many add to the same gradient earlier
    int64_t *count  # (gradients, blocks): the ticket to be served next


cdef Py_ssize_t gradient_index(
    const CallParams *params, const Operand *grad, Py_ssize_t head
) noexcept nogil:
    """The index of the gradient that a key head adds to."""
    cdef Py_ssize_t batch = head // params.kv_heads, index = 0, step = 1
    cdef int axis
    for axis in range(params.n_batch - 1, -1, -1):
        if grad.batch[axis] != 0:
            index += batch % params.shape[axis] * step
            step *= params.shape[axis]
        batch //= params.shape[axis]
    return index + head % params.kv_heads * step if grad.head != 0 else index


cdef int64_t *assign_tickets(
    const CallParams *params, const int64_t *key_heads, Tickets *tickets, const Operand *grad,
    Py_ssize_t blocks, int64_t *room,
) noexcept nogil:
    """Assign the tickets in `room`, which is zeroed. Return the end of what they take."""
    cdef Py_ssize_t n, head, heads = params.key_heads
    tickets.sharers, tickets.blocks = 1, blocks
    tickets.gradient, tickets.before, tickets.count = room, room + heads, room + 2 * heads
    for n in range(heads):
        head = key_heads[n]
        tickets.gradient[head] = gradient_index(params, grad, head)
        tickets.before[head] = tickets.count[tickets.gradient[head]]
        tickets.count[tickets.gradient[head]] += 1
        tickets.sharers = max(tickets.sharers, tickets.count[tickets.gradient[head]])
    memset(tickets.count, 0, heads * sizeof(int64_t))
    return tickets.count + heads * max(blocks, 1)


cdef inline int64_t *ticket_counter(
    const Tickets *tickets, Py_ssize_t head, Py_ssize_t block
) noexcept nogil:
    return tickets.count + tickets.gradient[head] * tickets.blocks + block


cdef inline bint wait_for_ticket(
    const int64_t *counter, int64_t ticket, bint *stopped
) noexcept nogil:
    """Wait until it is the ticket's turn. False if the call was stopped."""
    while load_acquire(counter) < ticket:
        if stopped[0]:
            return False
        sched_yield()
    return True
