"""Requests, counted as the context layer tells of them."""

from bisect import bisect_left
from collections.abc import Callable

from flask_muset.context import Exchange
from flask_muset.metrics.registry import BY_NAME
from flask_muset.metrics.series import Families
from flask_muset.metrics.store import UNITS, Cell

__all__ = ["OTHER_METHOD", "UNMATCHED", "HttpObserver", "method_label"]

#: The endpoint of requests that match no route, and of those that are answered before routing.
UNMATCHED = "__unmatched__"
#: The method of requests with one that HTTP does not define.
OTHER_METHOD = "_OTHER"
_METHODS = {
    name: name
    for name in (
        "CONNECT",
        "DELETE",
        "GET",
        "HEAD",
        "OPTIONS",
        "PATCH",
        "POST",
        "PUT",
        "QUERY",
        "TRACE",
    )
}
_known = _METHODS.get
_SAMPLE_EVERY_S = 1.0


def method_label(method: str) -> str:
    """A method that HTTP defines, else `_OTHER`."""
    return _METHODS.get(method.upper(), OTHER_METHOD)


#: What a request adds to: the count, the sum of seconds and its buckets.
_Route = tuple[Cell, Cell, list[Cell]]


class HttpObserver:
    """Counts each exchange.

    What happens for every request is written out here: a function call costs as much as the update.

    Args:
        families: Where.
        sample: Called with the time as a request begins, at most once a second.
    """

    def __init__(self, families: Families, sample: Callable[[float], None]) -> None:
        self._requests = families["http_requests_total"]
        self._seconds = families["http_request_duration_seconds"]
        self._bounds = BY_NAME["http_request_duration_seconds"].buckets
        self._active: Cell = families["http_requests_active"].get().cell
        self._store = families.store
        self._sample = sample
        self._sample_at = 0.0
        # Bounded by the series that it stands for.
        self._routes: dict[tuple[str, str | None, int], _Route] = {}

    def begin(self, exchange: Exchange) -> None:
        """A request has come."""
        if exchange.began >= self._sample_at:
            self._sample_at = exchange.began + _SAMPLE_EVERY_S
            self._sample(exchange.began)
        active = self._active
        with self._store._lock:
            if active.view is None:
                self._store.bind(active)
            active.view[active.index] += 1.0

    def end(self, exchange: Exchange) -> None:
        """It is known how it went."""
        status = exchange.status
        if exchange.failed and status < 500:
            status = 500
        key = (_known(exchange.environ["REQUEST_METHOD"], OTHER_METHOD), exchange.route, status)
        route = self._routes.get(key) or self._route(key)
        requests, total, buckets = route
        seconds: float = exchange.duration_s  # type: ignore[assignment]
        exact = int(seconds * UNITS) / UNITS
        bucket = buckets[bisect_left(self._bounds, seconds)]
        with self._store._lock:
            if requests.view is None or total.view is None or bucket.view is None:
                self._store.bind(requests, total, bucket)
            requests.view[requests.index] += 1.0
            total.view[total.index] += exact
            bucket.view[bucket.index] += 1.0

    def close(self, _exchange: Exchange) -> None:
        """The server is done with it."""
        active = self._active
        with self._store._lock:
            if active.view is not None:  # else it began before a fork
                active.view[active.index] -= 1.0

    def _route(self, key: tuple[str, str | None, int]) -> _Route:
        method, rule, status = key
        endpoint = UNMATCHED if rule is None else rule
        number, has_own = self._requests.find((method, endpoint, str(status)))
        seconds, has_seconds = self._seconds.find((method, endpoint))
        route = number.cell, seconds.total, seconds.buckets
        if has_own and has_seconds:
            self._routes[key] = route
        return route
