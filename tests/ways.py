"""Every way of reaching a device that `tests/test_runtimes.py` holds to the same rules.

A new runtime is in `runtimes.RUNTIMES` and so is here already; a new way of reaching a device adds a line to `WAYS`.
"""

from collections.abc import Callable
from functools import partial

from hwnas.devices import Device
from hwnas.opening import open_device
from hwnas.runtimes import RUNTIMES

WAYS: dict[str, Callable[[], Device]] = {name: partial(open_device, name) for name in RUNTIMES}
"""Calls that give a device which is not yet open, by a name for the test's report."""
