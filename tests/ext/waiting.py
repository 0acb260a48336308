"""Waiting for what another thread or process brings about."""

import time


def until(condition, seconds=20):
    """Wait until something is true and give what it is; fail if it does not come about.

    Args:
        condition: Called again and again.
        seconds: Much more than it takes, as the machine may be slow.
    """
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"it has not come about within {seconds} s"
        time.sleep(0.005)
    return found
