"""One reading for many."""

import threading
import time

import pytest
from patched import run_patched
from waiting import until

from muset.services.shared_read import SharedRead


class Source:
    """Counts its readings, each of which waits until it may go on."""

    def __init__(self):
        self.begun = 0
        self.may_go_on = threading.Semaphore(0)

    def read(self):
        self.begun += 1
        number = self.begun
        assert self.may_go_on.acquire(timeout=20)
        if number == 3:
            raise ConnectionError("away")
        return number


def test_nobody_gets_what_was_read_before_he_asked():
    """One reads; those who come meanwhile share the next reading, or its error."""
    source, found, asking = Source(), {}, set()
    shared = SharedRead(source.read)

    def ask(name):
        asking.add(name)
        try:
            found[name] = shared()
        except ConnectionError as error:
            found[name] = str(error)

    def start(*names):
        threads = [threading.Thread(target=ask, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        until(lambda: asking.issuperset(names))
        time.sleep(0.1)
        return threads

    threads = start("first")
    until(lambda: source.begun == 1)
    threads += start("a", "b", "c")
    assert source.begun == 1
    source.may_go_on.release()
    until(lambda: source.begun == 2)
    threads += start("d", "e")
    source.may_go_on.release()
    source.may_go_on.release()
    for thread in threads:
        thread.join(20)
    assert found == {"first": 1, "a": 2, "b": 2, "c": 2, "d": "away", "e": "away"}


def test_without_others_it_is_a_plain_reading():
    """Each one who comes later reads anew."""
    numbers = iter(range(3))
    shared = SharedRead(lambda: next(numbers))
    assert [shared(), shared(), shared()] == [0, 1, 2]
    with pytest.raises(StopIteration):
        shared()


def test_who_asks_for_something_else_does_not_wait():
    """Only equal arguments share a reading, and nothing is remembered of those that are over."""
    inner = []

    def read(number):
        if number == 1:
            inner.append(shared(2))
        return number

    shared = SharedRead(read)
    assert (shared(1), inner) == (1, [2])
    with pytest.raises(TypeError):
        shared()
    assert not shared._lines


def test_who_is_cut_off_takes_nobody_with_him():
    """Another one of those who wait reads."""
    result = run_patched(
        """
        from flask_muset.deadline import deadline
        from flask_muset.errors import OperationTimeoutError
        from muset.services.shared_read import SharedRead

        calls = []

        def read():
            calls.append(1)
            gevent.sleep(30 if len(calls) == 1 else 0.05)
            return len(calls)

        shared = SharedRead(read)

        def impatient():
            try:
                with deadline(0.3):
                    return shared()
            except OperationTimeoutError:
                return "late"

        first = gevent.spawn(impatient)
        gevent.sleep(0.05)
        killed = gevent.spawn(shared)
        gevent.sleep(0.05)
        others = [gevent.spawn(shared) for _ in range(5)]
        gevent.sleep(0.05)
        killed.kill()
        result = [first.get(), [other.get(timeout=20) for other in others]]
        """
    )
    first, others = result
    assert first == "late"
    assert len(others) == 5
    assert max(others) <= 3
