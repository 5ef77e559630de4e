"""Memory that is freed serves the next tensors."""

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from nlray.process.malloc import keep_freed_memory
if "keep" in sys.argv:
    keep_freed_memory()
def faults(rounds):
    # Each larger than the 32 MiB up to which glibc may keep one by itself.
    for _ in range(rounds):
        tensors = [torch.ones(12 << 20) for _ in range(4)]
        del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
# What small objects leave of the heap's end is found in the first rounds.
before = faults(6)
print(faults(3) - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc has these settings")
def test_the_next_tensors_need_no_new_pages():
    from nlray.process.malloc import ENVIRONMENT

    bare = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}

    def faults(*arguments, **environment):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, *arguments], env=bare | environment, capture_output=True, text=True, timeout=120, check=True
        )
        return int(done.stdout)

    given_back = faults()
    assert faults("keep") < given_back / 10
    assert faults(**ENVIRONMENT) < given_back / 10
