"""What a process does with memory that it no longer needs."""

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_LARGEST = 1 << 30  # bytes


def keep_freed_memory() -> None:
    """Let the C library reuse what is freed, instead of giving it back to the kernel.

    On a CPU each step makes and frees gigabytes of logits, and by default each page of them is mapped and cleared anew:
    a quarter of the time. The process then holds on to the most that it ever needed. Of no effect where the C library
    is not glibc. The whole process is concerned, so this is for commands, not for libraries.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    c_library = ctypes.CDLL(None)
    c_library.mallopt(_MMAP_THRESHOLD, _LARGEST)
    c_library.mallopt(_TRIM_THRESHOLD, _LARGEST)
