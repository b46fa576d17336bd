"""What holds for all tests."""

import os

# Tiny models gain nothing from a second thread, and torch's threads spin while they wait for each
# other: on a loaded machine the engine's tests took several times as long with two. Tests that are
# about threads, and servers that are started, set a number of their own.
os.environ.setdefault("OMP_NUM_THREADS", "1")
