"""Entries as they lie in a store that is shared: a header, the tags, the payload, a checksum.

    0   magic, 2 bytes     begins no msgpack, no UTF-8 text and no pickle
    2   version, 1 byte    another one is not read
    3   flags, 1 byte      1 the payload is compressed, 2 the entry is negative
    4   began_us, 8 bytes  unsigned, so that its bytes sort as its numbers do: `BEGAN`
    12  created_us, fresh_us, gone_us, 8 bytes each, IEEE 754: infinity is NEVER
    36  length of the payload before compression, 4 bytes
    40  length of the tags, 4 bytes
    44  tags               an array of strings in msgpack; nothing where there is none
        payload            to the last four bytes
        CRC-32             of all that is before it, 4 bytes, little-endian

All numbers but the last are big-endian; moments are microseconds of the store's clock.
"""

import struct
import zlib
from typing import Final

import msgspec

from flask_muset.cache_strategies.codec import MAX_BYTES, Unreadable
from flask_muset.cache_strategies.entry import ABSENT, Entry

__all__ = ["BEGAN", "began_bytes", "pack", "unpack"]

#: Where `began_us` is.
BEGAN: Final = slice(4, 12)

_VERSION: Final = 1
#: The magic and the version, with no flag.
_HEAD: Final = int.from_bytes(b"\xc1m" + bytes([_VERSION, 0]), "big")
_COMPRESSED: Final = 1
_NEGATIVE: Final = 2
_ALL_FLAGS: Final = _COMPRESSED | _NEGATIVE

_HEADER: Final = struct.Struct(">IQdddII")
_CRC: Final = struct.Struct("<I")
_START: Final = _HEADER.size
_END: Final = -_CRC.size
#: The CRC-32 of any bytes that end with their own CRC-32, little-endian: one call checks all.
_WHOLE: Final = 0x2144DF1C

#: Below this it costs more than it saves (measured: 200 bytes grow, 1 KiB shrinks to a third).
_COMPRESS_FROM: Final = 1024
_COMPRESS_LEVEL: Final = 1
_WORTH_IT: Final = 0.9

_read_header = _HEADER.unpack_from
_crc32 = zlib.crc32
_new = Entry.__new__
_pack_tags = msgspec.msgpack.Encoder().encode
_unpack_tags = msgspec.msgpack.Decoder(tuple[str, ...]).decode


def pack(entry: Entry, shift_us: int) -> bytes:
    """Make the bytes of an entry.

    Args:
        entry: With a payload of at most `MAX_BYTES`, and tags that can be UTF-8.
        shift_us: Microseconds that make a moment of this process one of the store.

    Raises:
        ValueError: The payload is too long, or a tag is no text.
    """
    raw_bytes = len(entry.payload)
    if raw_bytes > MAX_BYTES:
        raise ValueError(
            f"the payload has {raw_bytes} bytes, an entry takes {MAX_BYTES}; cache it in parts"
        )
    body, flags = _compressed(entry.payload)
    tags = _pack_tags(entry.tags) if entry.tags else b""
    header = _HEADER.pack(
        _HEAD | flags | (_NEGATIVE if entry.is_negative else 0),
        entry.began_us,
        entry.created_at * 1e6 + shift_us,
        entry.fresh_until * 1e6 + shift_us,
        entry.gone_at * 1e6 + shift_us,
        raw_bytes,
        len(tags),
    )
    whole = header + tags + body
    return whole + _CRC.pack(_crc32(whole))


def unpack(data: bytes, shift_us: int) -> Entry:
    """Make the entry again.

    Args:
        data: What a store has.
        shift_us: As in `pack`, of this process.

    Raises:
        Unreadable: They are not the bytes of an entry, not whole, or of another version.
    """
    try:
        head, began_us, created, fresh, gone, raw_bytes, tags_bytes = _read_header(data)
    except struct.error:
        raise Unreadable(f"{len(data)} bytes that are no envelope") from None
    flags = head ^ _HEAD
    if flags > _ALL_FLAGS:
        raise Unreadable(f"{len(data)} bytes that are no envelope of version {_VERSION}")
    if _crc32(data) != _WHOLE:
        raise Unreadable(f"an envelope of {len(data)} bytes that is not whole")
    # Each hit of a shared store passes here, and __init__ takes as long as all the rest.
    entry = _new(Entry)
    entry.began_us = began_us
    entry.created_at = (created - shift_us) / 1e6
    entry.fresh_until = (fresh - shift_us) / 1e6
    entry.gone_at = (gone - shift_us) / 1e6
    entry.is_negative = flags >= _NEGATIVE
    entry.shared = ABSENT
    start = _START + tags_bytes
    entry.tags = _read_tags(data[_START:start]) if tags_bytes else ()
    body = data[start:_END]
    entry.payload = body = _inflated(body, raw_bytes) if flags & _COMPRESSED else body
    if len(body) != raw_bytes:
        raise Unreadable(f"a payload of {len(body)} bytes instead of {raw_bytes}")
    return entry


def began_bytes(entry: Entry) -> bytes:
    """The bytes at `BEGAN` in its envelope: the later, the greater as a string of bytes."""
    return entry.began_us.to_bytes(8, "big")


def _read_tags(data: bytes) -> tuple[str, ...]:
    try:
        return _unpack_tags(data)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise Unreadable(f"an envelope whose tags cannot be read: {error}") from error


def _compressed(payload: bytes) -> tuple[bytes, int]:
    """The payload as it goes into the envelope, and its flags."""
    if len(payload) >= _COMPRESS_FROM:
        small = zlib.compress(payload, _COMPRESS_LEVEL)
        if len(small) <= len(payload) * _WORTH_IT:
            return small, _COMPRESSED
    return payload, 0


def _inflated(body: bytes, raw_bytes: int) -> bytes:
    """What was compressed, if it is as long as was said: never more is made of it."""
    if not 0 < raw_bytes <= MAX_BYTES:
        raise Unreadable(f"a payload of {raw_bytes} bytes")
    inflator = zlib.decompressobj()
    try:
        # One more than there may be, so that the end of the stream is seen.
        raw = inflator.decompress(body, raw_bytes + 1)
    except zlib.error as error:
        raise Unreadable(f"a payload that cannot be decompressed: {error}") from error
    if not inflator.eof or inflator.unused_data:
        raise Unreadable(f"a payload that does not end after {raw_bytes} bytes")
    return raw
