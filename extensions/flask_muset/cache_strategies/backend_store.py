"""A store over any other backend of Flask-Caching or cachelib, which keeps our entries as bytes.

What is in the backend, below `muset:`:

    e:<key>   an entry, an envelope
    d:<tag>   microseconds of the wall clock when the entries of a tag were made invalid for good,
    s:<tag>   and when they became stale; the empty tag stands for all entries

Whoever reads an entry reads what was made invalid, so that all processes agree. Who may load or
write is known in each process alone: a load of another process that has begun before a delete may
put the old value back there, though not for this process. Processes on several machines agree on
tags as well as their clocks agree.

The backend's own serializer reads what is stored, pickle for most of cachelib's: whoever may write
to such a backend may run code here, whatever our bytes are. It also waits as long as it likes.
"""

import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import Any, Protocol

from flask_muset.cache_strategies.codec import Unreadable
from flask_muset.cache_strategies.entry import Busy, Entry, Lease, Write
from flask_muset.cache_strategies.envelope import pack, unpack
from flask_muset.cache_strategies.local_store import LocalStore
from flask_muset.cache_strategies.stores import Changing, Tell, tell_nobody
from flask_muset.clock import SYSTEM
from flask_muset.errors import CacheUnavailable
from flask_muset.locks import give_lock

__all__ = ["Backend", "BackendStore"]

_log = logging.getLogger(__name__)

#: What every backend takes as a key; memcached takes no other and no longer one.
_is_plain = re.compile(r"[\x22-\x7e]{1,200}").fullmatch
#: Longest time in the backend. Not for ever: cachelib's own throw out first what never expires.
#: What tells that entries are invalid must outlast them.
_LONGEST_S = 365 * 86_400
_MOMENT_S = 2 * _LONGEST_S
#: A moment that is later is none that a process has written.
_LAST_US = 2**62
_MANY = 10_000
#: After a warning that a change was refused; one key may be refused for ever.
_SILENCE_S = 60.0


class Backend(Protocol):
    """What is used of a backend, as `cachelib.base.BaseCache` has it."""

    def get(self, key: str) -> Any:
        """The value, None if there is none."""
        ...

    def get_many(self, *keys: str) -> list[Any]:
        """The values in the order of their keys."""
        ...

    def set(self, key: str, value: Any, timeout: int | None = None) -> Any:
        """Keep a value for some seconds; whether it did."""
        ...

    def delete(self, key: str) -> Any:
        """Forget a value; whether it was there and did."""
        ...


class _Away(Exception):  # noqa: N818 - it is none to anybody else
    """The backend has raised an exception."""


class BackendStore(Changing):
    """A Store whose entries are in a backend, and whose leases are in this process.

    While the backend fails, reads find nothing and changes are remembered: this process serves
    nothing that they have made invalid, and deletes it before it reads again. When too many are
    remembered, nothing that is older than the last of them is served by any process.

    Args:
        backend: Is asked without a bound of time; it may raise whatever it likes.
        lease_s: Seconds after which somebody else loads for a holder that is gone.
        tell: Is told of operations that could not be carried out: name, `unavailable` or
            `unreadable`, None.

    Raises:
        ValueError: `lease_s` is not above 0.
    """

    _lock: Any

    def __init__(
        self,
        backend: Backend,
        *,
        lease_s: float = 10.0,
        tell: Tell = tell_nobody,
    ) -> None:
        self._backend = backend
        self._name = type(backend).__name__
        self._turns = _Turns(lease_s)
        self._tell = tell
        self._is_away = False
        self._silent_until = 0.0
        #: By name: what began at this moment or before is not served by this process. The newest
        #: ones: a load that goes on may still bring what is older.
        self._since: dict[str, int] = {}
        #: The same, of what the backend has not been told.
        self._owed: dict[str, int] = {}
        give_lock(self)

    def __repr__(self) -> str:
        return f"<BackendStore over {self._name}>"

    # --- Reading

    def read(self, key: str, /) -> Entry | None:
        """The entry, None if there is none or the backend fails."""
        return self.read_many([key]).get(key)

    def read_many(self, keys: Sequence[str], /) -> dict[str, Entry]:
        """Those that there are; none if the backend fails."""
        named = {_name(_ENTRY, key): key for key in keys}
        if not named:
            return {}
        try:
            self._pay()
            return self._read(named)
        except _Away:
            return {}

    def _read(self, named: Mapping[str, str]) -> dict[str, Entry]:
        found = self._get([*_ALL.values(), *named])
        shift_us = _shift_us()
        opened = {name: self._open(found[name], shift_us) for name in named}
        entries = {name: entry for name, entry in opened.items() if entry is not None}
        found.update(self._get(_names_of_tags(entries.values())))
        now = SYSTEM.now()
        return {
            named[name]: entry
            for name, entry in entries.items()
            if self._is_alive(name, entry, found) and now < entry.gone_at
        }

    def _get(self, names: Sequence[str]) -> dict[str, Any]:
        if not names:
            return {}
        values = self._ask("get", self._backend.get_many, *names)
        return dict(zip(names, values, strict=True))

    def _open(self, data: Any, shift_us: int) -> Entry | None:
        if data is None:
            return None
        try:
            return unpack(data if isinstance(data, bytes) else b"", shift_us)
        except Unreadable as error:
            _log.debug("an entry cannot be read: %s", error)
            self._tell("get", "unreadable", None)
            return None

    def _is_alive(self, name: str, entry: Entry, found: Mapping[str, Any]) -> bool:
        """Whether it may be served; one that has become stale is made so."""
        # So that a change by this process is later than all that it has served.
        self._turns.note(entry.began_us)
        dead_us, stale_us = (
            max(self._when(one, found) for one in (_ALL[kind], *_names(kind, entry.tags)))
            for kind in (_DEAD, _STALE)
        )
        if entry.began_us <= max(dead_us, self._when(name, {})):
            return False
        if entry.began_us <= stale_us:
            at = (stale_us - _shift_us()) / 1e6
            entry.fresh_until = min(entry.fresh_until, at, SYSTEM.now())
        return True

    def _when(self, name: str, found: Mapping[str, Any]) -> int:
        """When it was made invalid, as the backend says or as this process knows; 0 for never."""
        there = found.get(name) or 0
        if not (isinstance(there, int) and 0 <= there < _LAST_US):
            # Nobody knows what it was, so nothing is served that is there now.
            there = self._turns.now_us()
            self._owe({name: there})
        if there:
            self._turns.note(there)
        return max(there, self._since.get(name, 0), self._owed.get(name, 0))

    # --- Changing

    def _change(self, changes: Mapping[str, Entry | None]) -> bool:
        self._turns.delete_many(list(changes))
        jobs, since = {}, {}
        for key, entry in changes.items():
            name, moment = _name(_ENTRY, key), self._turns.now_us()
            jobs[name] = None if entry is None else self._packed(entry, moment)
            since[name] = moment if entry is None else moment - 1
        return self._carry_out(jobs, since)

    def _packed(self, entry: Entry, began_us: int) -> tuple[bytes, int]:
        """What is set, and for how many seconds."""
        entry.began_us = began_us
        lasts_s = min(entry.gone_at - SYSTEM.now(), _LONGEST_S)
        # A second more: cachelib cuts the fraction of the present one off.
        return pack(entry, _shift_us()), max(1, math.ceil(lasts_s) + 1)

    def _carry_out(
        self, jobs: Mapping[str, tuple[Any, int] | None], since: Mapping[str, int]
    ) -> bool:
        """Set or delete; what is not done, whatever the reason, is owed."""
        self._remember(since)
        left = dict(since)
        try:
            self._pay()
            for name, job in jobs.items():
                if self._erase(name) if job is None else self._set(name, *job):
                    self._paid(name, left.pop(name))
        except _Away:
            pass
        finally:
            if left:
                self._owe(left)
        return not left

    def _set(self, name: str, value: Any, lasts_s: int) -> bool:
        if self._ask("set", self._backend.set, name, value, timeout=lasts_s):
            return True
        return self._refused("set")

    def _erase(self, name: str) -> bool:
        # Most say False also of what was not there.
        if self._ask("delete", self._backend.delete, name):
            return True
        if self._ask("get", self._backend.get, name) is None:
            return True
        return self._refused("delete")

    def _remember(self, since: Mapping[str, int]) -> None:
        with self._lock:
            for name, moment in since.items():
                self._since[name] = max(moment, self._since.pop(name, 0))
            while len(self._since) > _MANY:
                del self._since[next(iter(self._since))]

    # --- What the backend was not told

    def _owe(self, since: Mapping[str, int]) -> None:
        with self._lock:
            for name, moment in since.items():
                self._owed[name] = max(moment, self._owed.pop(name, 0))
            if len(self._owed) > _MANY:
                latest = max(self._owed.values())
                self._owed.clear()
                self._owed[_ALL[_DEAD]] = latest

    def _paid(self, name: str, moment: int) -> None:
        with self._lock:
            if self._owed.get(name, moment + 1) <= moment:
                del self._owed[name]

    def _pay(self) -> None:
        """Tell the backend what is owed, up to the first that fails; that is the last next time."""
        for name, moment in list(self._owed.items()):
            is_entry = name.startswith(_ENTRIES)
            if not (self._erase(name) if is_entry else self._set(name, moment, _MOMENT_S)):
                self._owe({name: moment})
                break
            self._paid(name, moment)

    # --- Loads

    def lease(
        self, key: str, known: Entry | None, /, *, anyway: bool = False
    ) -> Entry | Lease | Busy:
        """Ask for the right to load a key in this process."""
        got = self._turns.lease(key, None, anyway=anyway)
        try:
            # In this order: whoever has had the lease before has put in what he has loaded.
            entry = self.read(key)
        except BaseException:
            self._let_go(got)
            raise
        if entry is None or (known is not None and entry.began_us == known.began_us):
            return got
        self._let_go(got)
        return entry

    def _let_go(self, got: Entry | Lease | Busy) -> None:
        if isinstance(got, Lease):
            self._turns.settle(got, None)

    def settle(self, lease: Lease, entry: Entry | None, /, *, backoff_s: float = 0.0) -> bool:
        """End a lease."""
        is_kept = entry is not None and self._turns.holds(lease) and self._load(lease, entry)
        self._turns.settle(lease, None, backoff_s=backoff_s)
        return is_kept

    def _load(self, lease: Lease, entry: Entry) -> bool:
        """Put in what was loaded; whether it is there."""
        name, job = _name(_ENTRY, lease.key), self._packed(entry, lease.began_us)
        is_kept = False
        try:
            self._pay()
            is_kept = self._set(name, *job)
        except _Away:
            pass
        except BaseException:
            # Cut off in the middle, so nobody knows whether it is there or comes later.
            self._owe({name: lease.began_us})
            raise
        # Who changes the key from now on does so after what was put in.
        if self._turns.holds(lease):
            if is_kept:
                self._paid(name, lease.began_us)
            return is_kept
        self._carry_out({name: None}, {name: lease.began_us})
        return False

    # --- Writes of the source

    def begin_write(self, key: str, /) -> Write:
        """Say that the source will be written; the value goes now."""
        write = self._turns.begin_write(key)
        name = _name(_ENTRY, key)
        self._carry_out({name: None}, {name: write.began_us})
        return write

    def end_write(self, write: Write, entry: Entry | None, /) -> bool:
        """Say that the source was written."""
        name, moment, job = _name(_ENTRY, write.key), self._turns.now_us(), None
        if entry is not None and self._turns.is_alone(write):
            job = self._packed(entry, moment)
        is_done = self._carry_out({name: job}, {name: moment if job is None else moment - 1})
        # Who begins from now on does so after what was kept.
        is_alone = self._turns.is_alone(write)
        self._turns.end_write(write, None)
        if job is not None and not is_alone:
            return self.delete(write.key)
        return is_done

    # --- Invalidation

    def forget(self, pattern: str, /) -> int:
        """No backend can list its keys: raises CacheUnavailable."""
        raise CacheUnavailable(
            f"the keys that match {pattern!r} cannot be deleted, because {self._name} cannot list "
            "its keys; give the entries a tag and delete that, or give CacheStrategies a Redis "
            "instead of a cache."
        )

    def invalidate_tag(self, tag: str, /, *, keep_stale: bool) -> bool:
        """Make all entries of a tag invalid, for all processes."""
        self._turns.invalidate_tag(tag, keep_stale=keep_stale)
        name, moment = _name(_STALE if keep_stale else _DEAD, tag), self._turns.now_us()
        return self._carry_out({name: (moment, _MOMENT_S)}, {name: moment})

    # --- Beside

    def explain(self, key: str, /) -> dict[str, Any]:
        """What there is about a key.

        Returns:
            `level` is `backend` or None; `lease`, of this process, is `none`, `load`, `write` or
            `backoff`; `backend` is the name of its class, `is_away` whether it failed the last
            time, and `repairs` how much it still has to be told. With an entry also its age and
            what is left of it in seconds, its bytes, tags and whether it stands for something that
            was not found.
        """
        entry, now = self.read(key), SYSTEM.now()
        said = {
            "level": None if entry is None else "backend",
            "lease": self._turns.explain(key)["lease"],
            "backend": self._name,
            "is_away": self._is_away,
            "repairs": len(self._owed),
        }
        if entry is not None:
            said |= entry.describe(now)
        return said

    def close(self) -> None:
        """There is nothing to let go of: the backend is its owner's."""

    def _ask(self, operation: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            found = function(*args, **kwargs)
        except Exception as error:
            self._tell(operation, "unavailable", None)
            if not self._is_away:
                self._is_away = True
                _log.warning("%s fails, what it has is loaded anew: %s", self._name, error)
            raise _Away from error
        if self._is_away:
            self._is_away = False
            _log.info("%s answers again", self._name)
        return found

    def _refused(self, operation: str) -> bool:
        """Count a change that the backend says it has not made; always False."""
        self._tell(operation, "unavailable", None)
        now = SYSTEM.now()
        if now >= self._silent_until:
            self._silent_until = now + _SILENCE_S
            _log.warning("%s has refused to %s a value; it is tried again", self._name, operation)
        return False


class _Turns(LocalStore):
    """Who may load or write, as a LocalStore knows it that keeps nothing, by the wall clock.

    Args:
        lease_s: As for LocalStore.
    """

    def __init__(self, lease_s: float) -> None:
        super().__init__(0, lease_s=lease_s)

    def _tick(self) -> int:
        self._now_us = max(self._now_us + 1, round(SYSTEM.wall() * 1e6))
        return self._now_us

    def now_us(self) -> int:
        """Microseconds of now, later than all that were told or noted."""
        with self._lock:
            return self._tick()

    def note(self, us: int) -> None:
        """Another process was here at this moment."""
        with self._lock:
            self._now_us = max(self._now_us, us)

    def holds(self, lease: Lease) -> bool:
        """Whether what its holder has loaded may still be put in."""
        with self._lock:
            return self._loads.get(lease.key, (0,))[0] == lease.began_us

    def is_alone(self, write: Write) -> bool:
        """Whether the key was changed by nobody else since the write has begun."""
        with self._lock:
            writes = self._writes.get(write.key)
            return writes is not None and write.began_us in writes.until and not writes.is_mixed


def _name(kind: str, text: str) -> str:
    """The key in the backend for a key or a tag of any text."""
    if _is_plain(text):
        return f"muset:{kind}:{text}"
    digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=20)
    return f"muset:{kind}#{digest.hexdigest()}"


_ENTRY, _DEAD, _STALE = "e", "d", "s"
_ENTRIES = f"muset:{_ENTRY}"
#: All entries.
_ALL = {kind: _name(kind, "") for kind in (_DEAD, _STALE)}


def _names(kind: str, tags: Iterable[str]) -> list[str]:
    return [_name(kind, tag) for tag in tags]


def _names_of_tags(entries: Iterable[Entry]) -> list[str]:
    tags = {tag for entry in entries for tag in entry.tags}
    return [*_names(_DEAD, tags), *_names(_STALE, tags)]


def _shift_us() -> int:
    """What makes a moment of this process one of the wall clock."""
    return round((SYSTEM.wall() - SYSTEM.now()) * 1e6)
