"""What holds for all tests."""

import os
import signal
from importlib.util import find_spec

# Tiny models gain nothing from a second thread, and torch's threads spin while they wait for each
# other: on a loaded machine the engine's tests took several times as long with two. Tests that are
# about threads, and servers that are started, set a number of their own.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A run that was started in the background ignores SIGINT, and so would the programs that tests
# start and interrupt. A handler of this process is not passed on to them.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A run tries the same examples each time, and no example fails for being slow: test machines are
# shared. `pytest --hypothesis-profile random` tries others. vLLM's environment has no hypothesis.
if find_spec("hypothesis") is not None:
    from hypothesis import settings

    settings.register_profile("random", deadline=None)
    settings.register_profile("same", deadline=None, derandomize=True)
    settings.load_profile("same")
