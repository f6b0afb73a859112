"""One thread for each test process (two threads on shared cores make timings and waits erratic), and no hub.

Property tests draw the same examples in every run, with no limit on an example's time. Helper modules lie in the folder
of the tests that use them, those of several folders in common/; tests and the processes that they start find them all.
"""

import os
import sys
from pathlib import Path

FOLDERS = [str(path) for path in sorted(Path(__file__).parent.iterdir()) if path.is_dir()]
sys.path[:0] = FOLDERS
os.environ["PYTHONPATH"] = os.pathsep.join([*FOLDERS, *filter(None, [os.environ.get("PYTHONPATH")])])

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
settings.register_profile(
    "extraopt", derandomize=True, deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("extraopt")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
