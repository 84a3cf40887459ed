"""The allocator keeps what a step frees: large tensors are no longer paged in anew, unless the user has set it otherwise."""

import os
import platform
import subprocess
import sys

import pytest

COUNT_FAULTS = """
import resource, sys, torch
from effvit_zoo.measure.allocator import keep_freed_memory
print(keep_freed_memory())
def churn():
    for _ in range(2):
        kept = [torch.ones(mb * 2**18) for mb in (16, 48, 16, 48)]  # MB; all freed at once
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    churn()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
churn()
print(min(faults() for _ in range(4)))  # it may take some rounds until every size has its place
"""


def faults(monkeypatch, **variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    done = subprocess.run([sys.executable, "-c", COUNT_FAULTS], capture_output=True, text=True, check=True)
    was_set, count = done.stdout.split()
    return was_set == "True", int(count)


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc's allocator that is told")
def test_freed_memory_is_used_again(monkeypatch):
    for name in [name for name in os.environ if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES"]:
        monkeypatch.delenv(name)
    was_set, kept = faults(monkeypatch)
    assert was_set
    left_alone, mapped_anew = faults(monkeypatch, MALLOC_MMAP_THRESHOLD_="131072")
    assert not left_alone
    assert mapped_anew > 20 * kept
