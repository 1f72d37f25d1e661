"""Memory that is freed is used again."""

import platform
import subprocess
import sys

import pytest

PAGES = """
import resource
from jetspec_hf.training.memory import keep_freed_memory
import torch
keep_freed_memory()
for i in range(30):
    if i == 10:  # it takes some rounds until one place is used again and again
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(10_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are")
def test_what_is_freed_is_not_mapped_anew() -> None:
    printed = subprocess.run([sys.executable, "-c", PAGES], capture_output=True, text=True, check=True).stdout
    assert int(printed) < 10_000_000 * 4 // 4096  # pages of one of the last twenty
