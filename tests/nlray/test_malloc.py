"""Memory that is freed serves the next tensors."""

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from nlray.malloc import keep_freed_memory
if "keep" in sys.argv:
    keep_freed_memory()
def faults():
    # Together larger than what glibc keeps by itself.
    for _ in range(3):
        tensors = [torch.ones(4 << 20) for _ in range(8)]
        del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
before = faults()
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc has these settings")
def test_the_next_tensors_need_no_new_pages():
    from nlray.malloc import ENVIRONMENT

    bare = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}

    def faults(*arguments, **environment):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, *arguments], env=bare | environment, capture_output=True, text=True, timeout=120, check=True
        )
        return int(done.stdout)

    given_back = faults()
    assert faults("keep") < given_back / 10
    assert faults(**ENVIRONMENT) < given_back / 10
