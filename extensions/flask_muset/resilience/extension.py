"""Resilience: binds the parts of this folder to a Flask app."""

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from ipaddress import ip_network
from typing import TYPE_CHECKING, Any

from click import Group
from flask import Flask, Request, request
from werkzeug.exceptions import (
    BadRequest,
    GatewayTimeout,
    HTTPException,
    ServiceUnavailable,
    TooManyRequests,
)
from werkzeug.local import LocalProxy

from flask_muset import context
from flask_muset.configuration import redis_client
from flask_muset.deadline import deadline
from flask_muset.errors import MusetError
from flask_muset.load import GATE, Gate
from flask_muset.resilience.circuit_breaker import CircuitBreaker
from flask_muset.resilience.commands import MODES, make_commands
from flask_muset.resilience.config import PREFIX, Config, read_config
from flask_muset.resilience.guards import Part
from flask_muset.resilience.policy import Policy, breaker_of
from flask_muset.resilience.rate_limit import Hit, RateLimit, refused
from flask_muset.resilience.recovery import ErrorRecovery
from flask_muset.resilience.request_limits import RequestLimits
from flask_muset.resilience.retrying import RetryStrategy
from flask_muset.resilience.timeout import Timeout
from flask_muset.signals import (
    BREAKERS,
    BreakerEvent,
    BreakerState,
    Decision,
    PolicyEvent,
    SharingEvent,
    breaker_changed,
    policy_decided,
    sharing_changed,
)

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

    from flask_muset.redis import GuardedRedis
    from flask_muset.resilience.sharing import SharedBreakers

__all__ = [
    "UNLIMITED",
    "Resilience",
    "error_recovery",
    "force",
    "network_of",
    "policies_of",
    "sharing_state",
]

_KEY = "resilience"
_PERIOD_S = 60.0
#: The key of the environment that a request's hit is kept under.
_HIT = "flask_muset.rate_limit"
#: Stands before the names of ErrorRecovery's breakers where all workers share them.
_RECOVERY = "recovery:"

#: What a `rate_limit_key` function returns for a request that has no limit.
UNLIMITED = object()

#: The current app's ErrorRecovery.
error_recovery: ErrorRecovery = LocalProxy(  # type: ignore[assignment]
    lambda: context.state(_KEY, "Resilience").recovery
)

RateLimitKey = Callable[[Request], Any]
#: A part, or the class of one that the configuration makes.
Declared = Part | type[RetryStrategy] | type[CircuitBreaker]


class _Recovery(ErrorRecovery):
    """Breakers whose defaults are an app's."""

    def __init__(self, config: Config, sharing: "SharedBreakers | None") -> None:
        super().__init__()
        self._config = config
        self._sharing = sharing

    def _make(self, name: str, options: dict[str, Any]) -> CircuitBreaker:
        return _breaker(self._config, name, options)

    def _added(self, breaker: CircuitBreaker) -> None:
        if self._sharing is not None:
            self._sharing.add(_RECOVERY + breaker.name, breaker)


@dataclass(slots=True)
class _State:
    """What one app owns."""

    config: Config
    retry_strategy: RetryStrategy
    recovery: ErrorRecovery
    redis: "GuardedRedis | None" = None
    sharing: "SharedBreakers | None" = None
    policies: dict[str, tuple[Part, ...]] = field(default_factory=dict)
    _copies: dict[int, Part] = field(default_factory=dict)

    def parts_of(self, policy: Policy, declared: Sequence[Declared]) -> tuple[Part, ...]:
        """The parts of a policy in this app; the first app of all gets the very ones declared.

        Raises:
            ValueError: The configuration has an argument that does not fit.
        """
        made = [self._part(policy, part) for part in declared]
        parts = tuple(_overridden(self.config, policy.name, made))
        self._share(policy, parts)
        return parts

    def _share(self, policy: Policy, parts: Sequence[Part]) -> None:
        """Let all workers have one state of what is in a policy."""
        if self.redis is None or self.sharing is None:
            return
        for part in parts:
            # One part in two policies has the name of the first.
            part.name = part.name or policy.name
            if isinstance(part, CircuitBreaker):
                self.sharing.add(part.name, part)
            elif isinstance(part, RateLimit):
                part.share(self.redis, part.name)

    def _part(self, policy: Policy, part: Declared) -> Part:
        if part is CircuitBreaker:
            return _breaker(self.config, policy.name, {})
        if part is RetryStrategy:
            return _retry_strategy(self.config, {})
        assert isinstance(part, Part)  # noqa: S101 - the policy's own check has seen it
        if policy.is_bound:
            # One part in two policies is one in every app.
            part = self._copies.setdefault(id(part), _copy(part))
        if isinstance(part, CircuitBreaker):
            _in_mode(self.config, part)
        return part


class Resilience:
    """Keep an app up when what it depends on is not, and when too many come at once.

    The instance keeps nothing about an app but the policies declared on it, so one instance may
    serve several apps; each app has breakers, permits and limits of its own.

    Args:
        app: Set up at once; else call `init_app`.
        rate_limit_key: A function of the request that returns whose limit it counts against: a
            text, None for the client's address, or `UNLIMITED`.
        redis: Is used instead of a client made of the configuration.

    Config:
        RESILIENCE_ENABLED: False leaves requests as they are. Default True.
        RESILIENCE_MODE: "enforce", "observe" (count what would be refused) or "off".
        RESILIENCE_REQUEST_TIMEOUT: Seconds that a request has, 0 for no deadline. Default 30.
        RESILIENCE_REQUEST_TIMEOUT_MODE: In place of RESILIENCE_MODE.
        RESILIENCE_MAX_CONCURRENT_REQUESTS: Requests at once in a process, streams included,
            0 for no limit. Default 100.
        RESILIENCE_MAX_CONCURRENT_REQUESTS_MODE: In place of RESILIENCE_MODE.
        RESILIENCE_RATE_LIMIT_REQUESTS_PER_MINUTE: Requests of one caller, 0 for no limit. Default
            0: behind a proxy that the app does not know of, all callers have one address.
        RESILIENCE_RATE_LIMIT_MODE: In place of RESILIENCE_MODE.
        RESILIENCE_EXEMPT_PATHS: Paths that none of this holds for, with all that is below them.
            Default /health.
        RESILIENCE_ENABLE_CIRCUIT_BREAKER: False lets all calls through. Default True.
        RESILIENCE_CIRCUIT_BREAKER_THRESHOLD: Failures in a row that open a breaker. Default 5.
        RESILIENCE_CIRCUIT_BREAKER_TIMEOUT: Seconds that it stays open. Default 60.
        RESILIENCE_MAX_RETRIES: Retries after the first call. Default 3.
        RESILIENCE_RETRY_INITIAL_DELAY: Bound of the first wait, seconds. Default 1.
        RESILIENCE_RETRY_MAX_DELAY: Bound of every wait, seconds. Default 60.
        RESILIENCE_REDIS_URL: Where all workers have one state of circuit breakers and rate limits.
            Default None: each has its own.
        RESILIENCE_REDIS_MAX_CONNECTIONS: Calls of one process to it at once. Default 10.
        RESILIENCE_REDIS_BUDGET: Seconds that a call may take. Default 0.05.
        RESILIENCE_NAMESPACE: Tells apps that share a Redis apart. Default "default".
        RESILIENCE_POLICIES: By name of a policy and kind of a part, arguments that win over the
            code's, such as {"openai": {"timeout": {"seconds": 5}}}. The policies are declared
            before `init_app`. A Timeout that stands outermost is `total_timeout`.
    """

    def __init__(
        self,
        app: Flask | None = None,
        *,
        rate_limit_key: RateLimitKey | None = None,
        redis: "GuardedRedis | None" = None,
    ) -> None:
        self._rate_limit_key = rate_limit_key
        self._given_redis = redis
        self._declared: dict[str, tuple[Policy, tuple[Declared, ...]]] = {}
        self._apps: weakref.WeakSet[Flask] = weakref.WeakSet()
        if app is not None:
            self.init_app(app)

    def policy(self, name: str, *parts: Declared) -> Policy:
        """Declare a policy, before or after `init_app`; it holds for every app of this instance.

        Args:
            name: For people, events, metrics and configuration.
            *parts: The first is the outermost; see `Policy` for the order. The classes
                RetryStrategy and CircuitBreaker stand for ones that the configuration makes; no
                part at all stands for these two.

        Raises:
            ValueError: The name is taken, the order is another one, or the configuration has an
                argument that does not fit.
        """
        if name in self._declared:
            raise ValueError(f"policy {name!r} is declared already; use another name.")
        declared = parts or (RetryStrategy, CircuitBreaker)
        policy = Policy(name, [_undeclared(name, part) for part in declared])
        for app in self._apps:
            state: _State = app.extensions[_KEY]
            state.policies[name] = state.parts_of(policy, declared)
            policy.is_bound = True
        self._bind(policy)
        self._declared[name] = policy, declared
        return policy

    def init_app(self, app: Flask) -> None:
        """Read the configuration once, bind the policies and guard the app's requests.

        Raises:
            RuntimeError: It is set up on this app already.
            ValueError: A setting is not allowed.
        """
        config = read_config(app.config)
        redis = redis_client(self._given_redis, config, PREFIX, "resilience")
        sharing = None if redis is None else _sharing(app, redis)
        recovery = _Recovery(config, sharing)
        state = _State(config, _retry_strategy(config, {}), recovery, redis, sharing)
        for name in config.policies.keys() - self._declared.keys():
            raise ValueError(
                f"{PREFIX}POLICIES: no policy {name!r} is declared; declare it before init_app, or "
                f"use one of {sorted(self._declared)}."
            )
        for name, (policy, declared) in self._declared.items():
            state.policies[name] = state.parts_of(policy, declared)
        context.attach(app, _KEY, "Resilience", state)
        app.extensions[BREAKERS] = partial(_known_states, app)
        self._apps.add(app)
        for policy, _ in self._declared.values():
            policy.is_bound = True
            self._bind(policy)
        if config.enabled:
            _guard_requests(app, config, self._rate_limit_key, redis)
        app.cli.add_command(_commands(app))

    def _bind(self, policy: Policy) -> None:
        """Let a policy guard with the parts of its apps; a single app's are used without a look."""
        of_apps = [app.extensions[_KEY].policies[policy.name] for app in self._apps]
        if len(of_apps) == 1:
            policy.use(of_apps[0])
        elif of_apps:
            policy.use_by(self._current_parts(policy.name), of_apps)

    def _current_parts(self, name: str) -> Callable[[], tuple[Part, ...]]:
        def current() -> tuple[Part, ...]:
            state: _State = context.state(_KEY, "Resilience")
            if name not in state.policies:
                raise RuntimeError(
                    f"policy {name!r} is not of the current app; declare it on the Resilience "
                    "instance that the app was set up with."
                )
            return state.policies[name]

        return current


def policies_of(app: Flask) -> dict[str, tuple[Part, ...]]:
    """The parts of each policy of an app, those of `ErrorRecovery` as policies of one breaker."""
    state: _State = app.extensions[_KEY]
    found = dict(state.policies)
    for name, breaker in state.recovery.breakers().items():
        found[name if name not in found else f"{name} (error recovery)"] = (breaker,)
    return found


# --- One state for all workers --------------------------------------------------------------------


def _sharing(app: Flask, redis: "GuardedRedis") -> "SharedBreakers":
    # Only here, because it needs redis-py.
    from flask_muset.resilience.sharing import SharedBreakers

    # Weak: a policy outlives the app that it was bound to.
    app_of = weakref.ref(app)

    def tell(event: BreakerEvent | SharingEvent) -> None:
        app = app_of()
        if app is not None:
            is_breaker = isinstance(event, BreakerEvent)
            context.tell(breaker_changed if is_breaker else sharing_changed, app, event)

    return SharedBreakers(redis, tell=tell, tell_state=lambda state: tell(SharingEvent(state)))


def sharing_state(app: Flask) -> str:
    """Whether all workers of an app agree on its circuit breakers, as this process knows.

    Returns:
        `shared`; `doubt`, it is not known now; `local`, there is no Redis, or it is away and each
        process decides by itself.
    """
    sharing: SharedBreakers | None = app.extensions[_KEY].sharing
    if sharing is None:
        return "local"
    sharing.begin()
    return sharing.state


def force(app: Flask, name: str, mode: str, expires_s: float | None = None) -> bool:
    """Force a circuit breaker in all workers.

    Args:
        app: Whose it is.
        name: Of its policy as in `policies_of`, or `recovery:` and a name of `ErrorRecovery`'s.
        mode: `open`, `closed`, or `auto` to close it and let it decide by itself again.
        expires_s: Seconds after which it decides by itself again; None for never.

    Returns:
        Whether the other workers are told; if not, they are as soon as Redis is back, as long as
        this process lives. Without a Redis only this process has changed.

    Raises:
        ValueError: There is no such breaker, or an argument is not allowed.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}.")
    if mode == "auto" and expires_s is not None:
        raise ValueError(f"auto has no end; leave expires_s out, got {expires_s!r}.")
    breaker = _breaker_called(app, name)
    if mode == "open":
        breaker.force_open(expires_s)
    elif mode == "closed":
        breaker.force_closed(expires_s)
    else:
        breaker.reset()
    sharing: SharedBreakers | None = app.extensions[_KEY].sharing
    return sharing is not None and sharing.send(breaker)


def _breaker_called(app: Flask, name: str) -> CircuitBreaker:
    state: _State = app.extensions[_KEY]
    if name.startswith(_RECOVERY):
        found = state.recovery.breakers().get(name.removeprefix(_RECOVERY))
    else:
        found = _breakers_of(app).get(name)
    if found is None:
        raise ValueError(
            f"no policy {name!r} has a circuit breaker; use one of {sorted(_breakers_of(app))}."
        )
    return found


def _breakers_of(app: Flask) -> dict[str, CircuitBreaker]:
    """Those of an app, by the names of `policies_of`."""
    found = {name: breaker_of(parts) for name, parts in policies_of(app).items()}
    return {name: breaker for name, breaker in found.items() if breaker is not None}


def _known_states(app: Flask) -> Iterator[tuple[str, BreakerState]]:
    for breaker in _breakers_of(app).values():
        yield breaker.name, breaker.known_state


def _commands(app: Flask) -> Group:
    state: _State = app.extensions[_KEY]

    def look() -> Mapping[str, Mapping[str, Any]]:
        return {name: breaker.snapshot() for name, breaker in _breakers_of(app).items()}

    def change(name: str, mode: str, expires_s: float | None) -> bool:
        if name.startswith(_RECOVERY):
            # The workers make it when they first use it, and here nobody does.
            state.recovery.get_circuit_breaker(name.removeprefix(_RECOVERY))
        return force(app, name, mode, expires_s)

    has_redis = state.sharing is not None
    return make_commands(look, change, partial(sharing_state, app) if has_redis else None)


# --- Policies from the configuration --------------------------------------------------------------


def _retry_strategy(config: Config, options: Mapping[str, Any]) -> RetryStrategy:
    made = {
        "max_retries": config.max_retries,
        "initial_delay": config.retry_initial_delay_s,
        "max_delay": config.retry_max_delay_s,
    }
    return RetryStrategy(**{**made, **options})


def _breaker(config: Config, name: str, options: Mapping[str, Any]) -> CircuitBreaker:
    made = {
        "failure_threshold": config.circuit_breaker_threshold,
        "recovery_timeout": config.circuit_breaker_timeout_s,
    }
    return _in_mode(config, CircuitBreaker(name, **{**made, **options}))


def _in_mode(config: Config, breaker: CircuitBreaker) -> CircuitBreaker:
    """The app's modes win over the code's: they are for the moment in which nothing may refuse."""
    if not config.enable_circuit_breaker or config.mode == "off":
        breaker.set_mode("off")
    elif config.mode == "observe" and breaker.mode == "enforce":
        breaker.set_mode("observe")
    return breaker


def _undeclared(name: str, part: Declared) -> Part:
    """What stands for a part while no app is bound."""
    if isinstance(part, Part):
        return part
    if part is CircuitBreaker:
        return CircuitBreaker(name)
    if part is RetryStrategy:
        return RetryStrategy()
    raise ValueError(f"policy {name!r}: {part!r} is no part; give one that is made.")


def _copy(part: Part) -> Part:
    budget = part.options.get("budget")
    return part.like() if budget is None else part.like(budget=budget.like())


def _overridden(config: Config, name: str, parts: list[Part]) -> list[Part]:
    """The parts with the arguments that the configuration has for them."""
    for kind, options in config.policies.get(name, {}).items():
        key = f"{PREFIX}POLICIES[{name!r}][{kind!r}]"
        kinds = [part.kind for part in parts]
        if kinds.count(Timeout.kind) == 2:
            kinds[0] = f"total_{Timeout.kind}"
        position = kinds.index(kind) if kind in kinds else None
        if position is None:
            raise ValueError(f"{key}: the policy has no such part; it has {kinds}.")
        part = parts[position]
        for option in options:
            if option not in part.options:
                raise ValueError(f"{key}: {option!r} is no argument; use {list(part.options)}.")
        try:
            changed = part.like(**options)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{key}: {error}") from None
        if isinstance(changed, CircuitBreaker):
            _in_mode(config, changed)
        parts[position] = changed
    return parts


# --- Requests -------------------------------------------------------------------------------------


def _guard_requests(
    app: Flask, config: Config, key_of: RateLimitKey | None, redis: "GuardedRedis | None"
) -> None:
    gate: Gate | None = None
    if config.max_concurrent_requests_mode != "off":
        gate = app.extensions[GATE] = Gate(
            config.max_concurrent_requests,
            config.exempt_paths,
            refuses=config.max_concurrent_requests_mode == "enforce",
        )
    timed = config.request_timeout_mode != "off"
    if gate is not None or timed:
        context.install(app).add(
            context.Rank.LIMITS,
            lambda wsgi_app: (
                RequestLimits(
                    wsgi_app,
                    gate=gate,
                    gate_mode=config.max_concurrent_requests_mode,
                    timeout_s=config.request_timeout_s if timed else 0.0,
                    timeout_mode=config.request_timeout_mode,
                    exempt=config.exempt_paths,
                    begin=partial(_say_what_cannot_be_cut, app),
                    refuse=partial(_answer, app),
                    tell=partial(_tell, app),
                ).__call__
            ),
        )
    if config.rate_limit_mode != "off":
        limiter = RateLimit(config.rate_limit, _PERIOD_S)
        if redis is not None:
            limiter.share(redis, "requests")
        app.before_request(_rate_limiter(app, config, limiter, key_of))
        context.install(app).describe(partial(_describe_limit, _policy_field(limiter)))


def _say_what_cannot_be_cut(app: Flask) -> None:
    if not deadline.can_cut():
        app.logger.info(
            "no request can be cut off in this worker, because gevent does not run it: one that "
            "takes longer than its deadline is answered late and counted as an overrun"
        )


def _tell(app: Flask, part: str, decision: Decision) -> None:
    if policy_decided.receivers:
        context.tell(policy_decided, app, PolicyEvent("request", part, decision))


def _rate_limiter(
    app: Flask, config: Config, limiter: RateLimit, key_of: RateLimitKey | None
) -> Callable[[], None]:
    """What counts a request against its caller's limit."""
    exempt, hit_by = config.exempt_paths, limiter.hit

    def limit() -> None:
        incoming: Request = request._get_current_object()  # type: ignore[attr-defined]
        if incoming.path in exempt:
            return
        key = None if key_of is None else key_of(incoming)
        if key is UNLIMITED:
            return
        hit = hit_by(f"address {network_of(incoming.remote_addr)}" if key is None else f"key {key}")
        # Not in `g`, which may outlive the request where an app context is open already.
        incoming.environ[_HIT] = hit
        if not hit.allowed:
            _over_limit(app, config, limiter, hit)

    return limit


def _over_limit(app: Flask, config: Config, limiter: RateLimit, hit: Hit) -> None:
    if config.rate_limit_mode == "observe":
        _tell(app, "rate_limit", Decision.WOULD_REJECT)
        return
    _tell(app, "rate_limit", Decision.REJECTED)
    error = refused(f"more than {limiter.limit} requests in {limiter.period:g} s", hit)
    if _has_error_handler(app):
        raise error
    raise _plain(error) from error


def network_of(address: str | None) -> str:
    """Whom a client's address stands for: of IPv6 the /64, which one subscriber has all of."""
    if address is None or ":" not in address:
        return str(address)
    try:
        return str(ip_network((address.partition("%")[0], 64), strict=False))
    except ValueError:
        return address


def _policy_field(limiter: RateLimit) -> tuple[str, str]:
    return "RateLimit-Policy", f'"default";q={limiter.limit};w={limiter.period:.0f}'


def _describe_limit(
    policy: tuple[str, str], environ: "WSGIEnvironment", fields: list[tuple[str, str]]
) -> None:
    """Add the fields of draft-ietf-httpapi-ratelimit-headers."""
    hit: Hit | None = environ.get(_HIT)
    if hit is not None:
        wait = hit.retry_after or hit.reset_after
        fields += policy, ("RateLimit", f'"default";r={hit.remaining};t={math.ceil(wait)}')


def _has_error_handler(app: Flask) -> bool:
    return app.config.get("ERROR_HANDLER_ENABLED", False) and "error_handler" in app.extensions


def _plain(error: MusetError) -> HTTPException:
    """What this extension refuses, for an app without ErrorHandler.

    They are Werkzeug's, so that the app's own handlers know them.
    """
    wait = error.retry_after
    if error.status == 429:
        return TooManyRequests(retry_after=wait)
    if error.status == 503:
        return ServiceUnavailable(retry_after=wait)
    return GatewayTimeout() if error.status == 504 else BadRequest(error.errors[0]["message"])


def _answer(
    app: Flask, error: MusetError, environ: "WSGIEnvironment", start_response: "StartResponse"
) -> Iterable[bytes]:
    """Answer outside of Flask; ErrorHandler's layer is around this one and takes what is raised."""
    if _has_error_handler(app):
        raise error
    return _plain(error)(environ, start_response)
