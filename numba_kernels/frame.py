"""XLA's typed foreign function interface, as the kernels see it: a call frame, read as 64-bit words.

The interface is a C structure of XLA's, stable across releases (xla/ffi/api/c_api.h, which jaxlib ships). Word numbers:

    call frame   1 extension, 2 api, 3 context, 4 stage, 5..9 arguments, 10..14 results
    arguments    2 how many, 4 array of pointers to buffers (the results likewise)
    buffer       2 element type, 3 data, 4 rank, 5 dimensions
    api          4 version, 8 Error_Destroy, 17 ThreadPool_Schedule, 18 ThreadPool_NumThreads
    metadata     (of an extension of type 1) 3 metadata, whose word 3 takes the version and word 4 the traits
"""

from numba_kernels.native import allocate, call_pointer, load_int32, native, release, store_int64, word

WORD = 8
ARGUMENTS, RESULTS, ATTRIBUTES = 9, 14, 20
KIND, DATA, DIMS = 2, 3, 5
METADATA = 1
ERROR_DESTROY, SCHEDULE, NUM_THREADS = 8, 17, 18


@native
def answers_metadata(frame):  # type: ignore[no-untyped-def]
    """Whether the call only asks which version of the interface this is written for; it is answered then."""
    extension = word(frame, 1)
    if extension == 0 or load_int32(extension + WORD) != METADATA:
        return False
    metadata = word(extension, 3)
    store_int64(metadata + 3 * WORD, word(word(frame, 2), 4))  # the runtime's own: the words above are in all of them
    store_int64(metadata + 4 * WORD, 0)
    return True


@native
def ask(frame, function, arguments):  # type: ignore[no-untyped-def]
    """Call a function of the api; whether it succeeded. An error is dropped."""
    api = word(frame, 2)
    error = call_pointer(word(api, function), arguments)
    if error == 0:
        return True
    request = allocate(3 * WORD)
    store_int64(request, 3 * WORD)
    store_int64(request + WORD, 0)
    store_int64(request + 2 * WORD, error)
    call_pointer(word(api, ERROR_DESTROY), request)
    release(request)
    return False


@native
def num_threads(frame):  # type: ignore[no-untyped-def]
    """Threads of the pool that runs XLA's programs on this device; 1 if there is none."""
    request = allocate(5 * WORD)
    store_int64(request, 4 * WORD)
    store_int64(request + WORD, 0)
    store_int64(request + 2 * WORD, word(frame, 3))
    store_int64(request + 3 * WORD, request + 4 * WORD)
    store_int64(request + 4 * WORD, 1)
    count = word(request, 4) if ask(frame, NUM_THREADS, request) else 1
    release(request)
    return count


@native
def schedule(frame, task, data):  # type: ignore[no-untyped-def]
    """Have the pool call task(data) some time; whether it will."""
    request = allocate(5 * WORD)
    store_int64(request, 5 * WORD)
    store_int64(request + WORD, 0)
    store_int64(request + 2 * WORD, word(frame, 3))
    store_int64(request + 3 * WORD, task)
    store_int64(request + 4 * WORD, data)
    accepted = ask(frame, SCHEDULE, request)
    release(request)
    return accepted
