"""The programs lie in the repository's root: make them importable. And a warning is an error."""
import os
import sys
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:             # -n 2: two processes of one thread each
    os.environ["OMP_NUM_THREADS"] = "1"             # read when torch is imported

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
WARNINGS = (
    "error",                                        # what a library warns of today breaks tomorrow
    "ignore:.*torch.jit:DeprecationWarning",        # the official metrics are TorchScript files
    "ignore:Detected pickle protocol:UserWarning",  # a test makes such a file on purpose
)


def pytest_configure(config):
    for line in WARNINGS:
        config.addinivalue_line("filterwarnings", line)
    config.addinivalue_line("markers", "slow: full size, minutes and gigabytes; run by -m slow")
    config.addinivalue_line("markers", "browser: drives a real Chromium; only with -m browser")
    if not config.option.markexpr:
        config.option.markexpr = "not slow and not browser"


@pytest.fixture(scope="module")
def one_thread():
    """These networks are so small that a second thread costs more than it saves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
