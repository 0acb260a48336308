"""Entries on the wire: they come back whole, or they are unreadable."""

import contextlib
import functools
import json
import math
import os
import pickle
import random
import struct
import tracemalloc
import zlib

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flask_muset.cache_strategies.codec import MAX_BYTES, Codec, Unreadable
from flask_muset.cache_strategies.entry import ABSENT, NEVER, Entry
from flask_muset.cache_strategies.envelope import BEGAN, began_bytes, pack, unpack
from flask_muset.clock import SYSTEM
from flask_muset.testing import virtual_clock

SHIFT_US = 1_790_000_000_000_000

repeatable = functools.partial(
    settings,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


def make(payload=b"payload", **options):
    options.setdefault("created_at", 1000.25)
    return Entry(payload, **options)


def sealed(data):
    """Bytes with the checksum that they must have."""
    return data + zlib.crc32(data).to_bytes(4, "little")


def forged(raw_bytes, body, *, flags=1, version=1, tags=b""):
    """An envelope that is whole, of whoever knows the format."""
    head = struct.pack(
        ">2sBBQdddII", b"\xc1m", version, flags, 7, 1.0, 2.0, 3.0, raw_bytes, len(tags)
    )
    return sealed(head + tags + body)


moments = st.floats(-1e7, 1e9)
entries = st.builds(
    Entry,
    st.binary(max_size=300) | st.builds(bytes.__mul__, st.binary(max_size=9), st.just(400)),
    created_at=moments,
    fresh_until=moments | st.just(NEVER),
    gone_at=moments | st.just(NEVER),
    tags=st.lists(st.text(max_size=20), max_size=4).map(tuple),
    is_negative=st.booleans(),
    began_us=st.integers(0, 2**64 - 1),
)


@repeatable(max_examples=200)
@given(entries, st.integers(-(2**51), 2**51))
def test_entries_come_back(entry, shift_us):
    """All of an entry comes back, moments to the microsecond and NEVER as NEVER."""
    found = unpack(pack(entry, shift_us), shift_us)
    assert (found.payload, found.tags) == (entry.payload, entry.tags)
    assert type(found.payload) is bytes
    assert (found.is_negative, found.began_us) == (entry.is_negative, entry.began_us)
    assert found.shared is ABSENT
    assert all(hasattr(found, name) for name in Entry.__slots__)
    for name in ("created_at", "fresh_until", "gone_at"):
        before, after = getattr(entry, name), getattr(found, name)
        assert before == after or math.isclose(before, after, rel_tol=0, abs_tol=1e-6)


def test_moments_are_those_of_the_clock_of_the_store():
    """A process whose clock began elsewhere reads the same moments on its own clock."""
    with virtual_clock():
        now = SYSTEM.now()
        entry = make(created_at=now, fresh_until=now + 60, gone_at=now + 90.5)
    data = pack(entry, SHIFT_US)
    found = unpack(data, SHIFT_US - 5_000_000)
    assert found.created_at == pytest.approx(now + 5, abs=1e-6)
    assert found.fresh_until - found.created_at == pytest.approx(60, abs=1e-6)
    assert found.gone_at - found.created_at == pytest.approx(90.5, abs=1e-6)


def test_a_moment_longer_ago_than_the_clock_of_the_store():
    """What was stale before the store's clock began stays so."""
    entry = make(fresh_until=-1e6)
    assert unpack(pack(entry, 0), 0).fresh_until == -1e6


@repeatable(max_examples=200)
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_where_the_moment_of_the_load_is(one, other):
    """The bytes at BEGAN are those of began_bytes, and sort as their moments do."""
    early, late = (make(began_us=us) for us in sorted((one, other)))
    assert pack(early, SHIFT_US)[BEGAN] == began_bytes(early)
    assert len(began_bytes(early)) == 8
    assert began_bytes(early) <= began_bytes(late)


def test_compression_where_it_pays():
    """From 1 KiB, and only if a tenth is saved; the payload comes back either way."""
    noise = random.Random(1).randbytes(4000)
    for payload, is_small in (
        (b"a" * 1023, False),
        (b"a" * 1024, True),
        (noise, False),
        (noise + b"a" * 300, False),
        (noise + b"a" * 600, True),
        (b"", False),
    ):
        data = pack(make(payload), SHIFT_US)
        assert (len(data) < len(payload)) is is_small
        assert data[3] == int(is_small)
        assert unpack(data, SHIFT_US).payload == payload


def test_an_entry_that_is_too_large_is_an_error():
    """What nobody would read is not written; the message has the size and the cure."""
    with pytest.raises(ValueError, match=f"{MAX_BYTES + 1} bytes.*cache it in parts"):
        pack(make(bytes(MAX_BYTES + 1)), SHIFT_US)


def test_a_damaged_envelope_is_unreadable():
    """Any byte changed, lost or added is noticed, in a small and in a compressed envelope."""
    for payload in (Codec().encode({"id": 1}), b"compressible " * 200):
        data = pack(make(payload, tags=("user:1", "tëam"), is_negative=True), SHIFT_US)
        for at in range(len(data)):
            damaged = data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]
            for wrong in (damaged, data[:at], data[:at] + data[at + 1 :], data[at:] * bool(at)):
                with pytest.raises(Unreadable):
                    unpack(wrong, SHIFT_US)
        with pytest.raises(Unreadable):
            unpack(data + b"\0", SHIFT_US)


@repeatable(max_examples=300)
@given(st.binary(max_size=120))
def test_random_bytes(data):
    """Bytes of nobody are unreadable, also with the right beginning and the right checksum."""
    for wrong in (data, b"\xc1m\x01" + data):
        with pytest.raises(Unreadable):
            unpack(wrong, SHIFT_US)
    with contextlib.suppress(Unreadable):
        unpack(sealed(b"\xc1m\x01" + data), SHIFT_US)


@repeatable(max_examples=300)
@given(entries, st.data())
def test_damage_by_whoever_knows_the_checksum(entry, data):
    """An envelope that was changed and sealed again is an entry or unreadable, nothing else."""
    changed = bytearray(pack(entry, SHIFT_US)[:-4])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, min(len(changed), 60)))
        cut = data.draw(st.integers(0, 3))
        changed[at : at + cut] = data.draw(st.binary(max_size=3))
    with contextlib.suppress(Unreadable):
        unpack(sealed(bytes(changed)), SHIFT_US)


class Planted:
    """Runs a function when it is unpickled."""

    ran = 0

    def __reduce__(self):
        return (plant, ())


def plant():
    Planted.ran += 1


def test_foreign_bytes_are_unreadable():
    """A planted pickle runs nothing; JSON, msgpack, zlib and nothing at all are no envelope."""
    foreign = [pickle.dumps(Planted(), n) for n in range(pickle.HIGHEST_PROTOCOL + 1)]
    foreign += [b"", b"\xc1", b"\xc1m\x01\x00", json.dumps({"a": 1}).encode(), b"x" * 500]
    foreign += [Codec().encode({"a": 1}), zlib.compress(b"x" * 500), os.urandom(300)]
    for data in foreign:
        with pytest.raises(Unreadable):
            unpack(data, SHIFT_US)
    assert Planted.ran == 0


def test_an_envelope_begins_like_nothing_else():
    """No reader of another format takes an envelope for its own."""
    data = pack(make(), SHIFT_US)
    with pytest.raises(pickle.UnpicklingError):
        pickle.loads(data)
    with pytest.raises(Unreadable):
        Codec().decode(data)
    with pytest.raises(UnicodeDecodeError):
        data[:2].decode()


def test_other_versions_and_flags_are_unreadable():
    """What a newer version wrote is a miss, however whole it is."""
    assert unpack(forged(3, b"abc", flags=0), 0).payload == b"abc"
    for options in ({"version": 0}, {"version": 2}, {"version": 255}, {"flags": 4}, {"flags": 128}):
        with pytest.raises(Unreadable, match="no envelope of version 1"):
            unpack(forged(3, b"abc", **{"flags": 0, **options}), 0)


def test_lengths_that_lie_are_unreadable():
    """The payload must be as long as is said, compressed or not, and end where it ends."""
    small = zlib.compress(b"a" * 2000)
    assert unpack(forged(2000, small), 0).payload == b"a" * 2000
    for raw_bytes, body, flags in (
        (2, b"abc", 0),
        (4, b"abc", 0),
        (0, b"abc", 0),
        (1999, small, 1),
        (2001, small, 1),
        (0, small, 1),
        (0, zlib.compress(b""), 1),
        (2**32 - 1, small, 1),
        (2000, small[:-1], 1),
        (2000, small + b"x", 1),
        (2000, b"a" * 2000, 1),
    ):
        with pytest.raises(Unreadable):
            unpack(forged(raw_bytes, body, flags=flags), 0)


def test_a_bomb_does_not_go_off():
    """A few bytes that would be 200 MB cost no more than what they say that they are."""
    bomb = zlib.compress(bytes(200_000_000), 9)
    for raw_bytes in (1, 100_000, MAX_BYTES + 1, 2**32 - 1):
        data = forged(raw_bytes, bomb)
        tracemalloc.start()
        try:
            with pytest.raises(Unreadable):
                unpack(data, 0)
            assert tracemalloc.get_traced_memory()[1] < 2_000_000
        finally:
            tracemalloc.stop()


def test_tags_that_lie_are_unreadable():
    """Tags that are no texts, no array, too short or too long make the whole unreadable."""
    good = msgspec.msgpack.encode(("a", "b"))
    assert unpack(forged(3, b"abc", flags=0, tags=good), 0).tags == ("a", "b")
    for tags in (
        msgspec.msgpack.encode(["a", 1]),
        msgspec.msgpack.encode("ab"),
        msgspec.msgpack.encode({"a": 1}),
        b"\x91\xa1\xff",
        b"\x92\xa1a",
        b"\xdd\xff\xff\xff\xff",
        good + b"\xc0",
    ):
        with pytest.raises(Unreadable):
            unpack(forged(3, b"abc", flags=0, tags=tags), 0)
    for length in (1, len(good) + 1, 100, 2**32 - 1):
        head = bytearray(forged(3, b"abc", flags=0, tags=good)[:-4])
        head[40:44] = length.to_bytes(4, "big")
        with pytest.raises(Unreadable):
            unpack(sealed(bytes(head)), 0)
