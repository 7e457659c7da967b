"""Whether an error says that memory is used up, in the words of all that may say so."""

from ddp_kit.errors import summary

# Of torch's allocators (their class says it too), the libraries below them, and the system.
WORDS = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
    "CUSPARSE_STATUS_ALLOC_FAILED",
    "CUFFT_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_NOT_SUPPORTED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "HIPBLAS_STATUS_ALLOC_FAILED",
    "rocblas_status_memory_error",
    "miopenStatusAllocFailed",
    "unable to find an engine to execute this computation",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one that it was raised from, is that memory is used up.

    A library below torch says it in words of its own: cuBLAS has no room for its handle, cuDNN
    supports no way that fits into what is left.
    """
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        if isinstance(cause, MemoryError) or _says_so(cause):
            return True
        cause = cause.__cause__
    return False


def _says_so(error: BaseException) -> bool:
    # torch.OutOfMemoryError is a RuntimeError, and so is all that libraries say through torch.
    if not isinstance(error, RuntimeError | OSError):
        return False
    text = summary(error).lower()
    return any(words.lower() in text for words in WORDS)
