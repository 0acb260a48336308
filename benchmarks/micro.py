"""What a wrapper costs on the success path, and a rejection by an open breaker.

ns per call, the median of 7 interleaved repeats (CPU time of this process), and the ratio to a bare
call; with --valgrind also exact instructions per call, the figure to compare between days (60 s).
Another wrapper beside them: --extra name=package.module:wrap, where wrap(func) returns the wrapped.
"""

import argparse
import functools
import json
import statistics as st
import time

import common as c


def work(x):
    return x


def passthrough(f):
    @functools.wraps(f)
    def w(*a, **k):
        return f(*a, **k)

    return w


def try_loop(f):
    """Floor of any retry decorator."""

    @functools.wraps(f)
    def w(*a, **k):
        for attempt in range(3):
            try:
                return f(*a, **k)
            except ValueError:
                if attempt == 2:
                    raise

    return w


def breaker_floor(f):
    """Floor of any closed breaker: look at the state, count nothing on success."""
    state = {"open_until": 0.0, "fails": 0}

    @functools.wraps(f)
    def w(*a, **k):
        if state["open_until"]:
            raise RuntimeError
        try:
            r = f(*a, **k)
        except ValueError:
            state["fails"] += 1
            raise
        if state["fails"]:
            state["fails"] = 0
        return r

    return w


def bucket_floor(f):
    """Floor of any in-process rate limit: one clock read, one multiply-add, one compare."""
    b = [1e9, time.monotonic()]
    clock = time.monotonic

    @functools.wraps(f)
    def w(*a, **k):
        now = clock()
        tokens = min(1e9, b[0] + (now - b[1]) * 1e6)
        if tokens < 1:
            raise RuntimeError
        b[0], b[1] = tokens - 1, now
        return f(*a, **k)

    return w


def _backoff(f):
    import backoff

    return backoff.on_exception(backoff.expo, ValueError, max_tries=3)(f)


def _tenacity(f):
    import tenacity as t

    return t.retry(
        stop=t.stop_after_attempt(3),
        wait=t.wait_exponential(),
        retry=t.retry_if_exception_type(ValueError),
    )(f)


def _stamina(f):
    import stamina

    return stamina.retry(on=ValueError, attempts=3)(f)


def _pybreaker(f):
    import pybreaker

    return pybreaker.CircuitBreaker(fail_max=5, reset_timeout=30)(f)


def _circuit(f):
    from circuitbreaker import CircuitBreaker

    return CircuitBreaker(failure_threshold=5, recovery_timeout=30, name=f"c{id(f)}")(f)


def _purgatory(f):
    from purgatory import SyncCircuitBreakerFactory

    return SyncCircuitBreakerFactory(default_threshold=5, default_ttl=30)("x")(f)


def _interlock(f):
    from interlock import CircuitBreaker, Config

    return CircuitBreaker(name="x", config=Config(minimum_number_of_calls=5))(f)


def _interlock_three(f):
    import interlock as i

    breaker = i.CircuitBreaker(name="x", config=i.Config(minimum_number_of_calls=5))
    return i.Pipeline(
        i.FallbackStrategy(lambda _: None),
        i.CircuitBreakerStrategy(breaker),
        i.BulkheadStrategy(100),
    )(f)


def _limits(kind):
    def wrap(f):
        from limits import parse, storage, strategies

        limiter = getattr(strategies, kind)(storage.MemoryStorage())
        item = parse("1000000000/hour" if kind != "MovingWindowRateLimiter" else "1000000/second")

        def w(*a, **k):
            if not limiter.hit(item, "key"):
                raise RuntimeError
            return f(*a, **k)

        return w

    return wrap


def _stack(f):
    """Retry around breaker around limit, the leanest of each measured here."""
    return _backoff(_circuit(_limits("FixedWindowRateLimiter")(f)))


def _ours(*parts):
    from flask_muset.resilience import Policy

    return Policy("x", parts)


def _our_retry(f):
    from flask_muset.resilience import RetryStrategy

    return RetryStrategy(max_retries=2)(f)


def _our_breaker(f):
    from flask_muset.resilience import CircuitBreaker

    return CircuitBreaker("x", failure_rate=0.5, recovery_timeout=30)(f)


def _our_breaker_in_a_row(f):
    from flask_muset.resilience import CircuitBreaker

    return CircuitBreaker("x", failure_threshold=5, recovery_timeout=30)(f)


def _our_shared_breaker(f):
    """With one state for all processes, in a Redis that `main` has started."""
    from flask_muset.redis import GuardedRedis
    from flask_muset.resilience import CircuitBreaker
    from flask_muset.resilience.sharing import SharedBreakers

    redis = GuardedRedis(f"redis://127.0.0.1:{REDIS_PORT[0]}/0", budget_s=10)
    shared = SharedBreakers(redis, tell=print, tell_state=lambda _: None)
    breaker = CircuitBreaker("x", failure_rate=0.5, recovery_timeout=30)
    shared.add("x", breaker)
    return breaker(f)


def _our_limit(f):
    from flask_muset.resilience import RateLimit

    return RateLimit(10**9, 3600)(f)


def _our_three(f):
    from flask_muset.resilience import CircuitBreaker, RateLimit, RetryStrategy

    breaker = CircuitBreaker("x", failure_rate=0.5)
    return _ours(RetryStrategy(max_retries=2), breaker, RateLimit(10**9, 3600))(f)


def _our_five(f):
    """Under gevent, where the time-out has a timer."""
    import gevent

    from flask_muset.resilience import (
        Bulkhead,
        CircuitBreaker,
        Fallback,
        RetryStrategy,
        Timeout,
    )

    gevent.get_hub()
    breaker = CircuitBreaker("x", failure_rate=0.5)
    retry = RetryStrategy(max_retries=2)
    return _ours(Fallback(None), retry, breaker, Bulkhead(100), Timeout(30))(f)


#: Where a shared breaker's Redis listens.
REDIS_PORT = []
LOOP = "floor: try/except loop"
CASES = {
    "bare call": lambda f: f,
    "floor: pass-through wrapper": passthrough,
    "floor: try/except loop": try_loop,
    "floor: closed breaker": breaker_floor,
    "floor: token bucket": bucket_floor,
    "floor: all three": lambda f: try_loop(breaker_floor(bucket_floor(f))),
    "backoff.on_exception": _backoff,
    "tenacity.retry": _tenacity,
    "stamina.retry": _stamina,
    "pybreaker": _pybreaker,
    "circuitbreaker": _circuit,
    "purgatory (sync)": _purgatory,
    "interlock": _interlock,
    "interlock fallback+breaker+bulkhead": _interlock_three,
    "limits fixed window hit": _limits("FixedWindowRateLimiter"),
    "limits moving window hit": _limits("MovingWindowRateLimiter"),
    "limits sliding counter hit": _limits("SlidingWindowCounterRateLimiter"),
    "backoff+circuitbreaker+limits": _stack,
    "flask-muset retry": _our_retry,
    "flask-muset breaker": _our_breaker,
    "flask-muset breaker, shared": _our_shared_breaker,
    "flask-muset limit": _our_limit,
    "flask-muset retry+breaker+limit": _our_three,
    "flask-muset fallback+retry+breaker+bulkhead+timeout": _our_five,
}


def _fail(x):
    raise ValueError


def _opened(wrap):
    """An open breaker: cost of one rejected call, exception included."""
    w = wrap(_fail)
    for _ in range(10):
        try:
            w(1)
        except Exception:
            pass

    def call(x):
        try:
            w(x)
        except Exception:
            return

    return call


def _raise_catch(f):
    def call(x):
        try:
            _fail(x)
        except Exception:
            return

    return call


CASES |= {
    "floor: raise and catch": _raise_catch,
    "pybreaker, open, rejected": lambda f: _opened(_pybreaker),
    "circuitbreaker, open, rejected": lambda f: _opened(_circuit),
    "purgatory, open, rejected": lambda f: _opened(_purgatory),
    "interlock, open, rejected": lambda f: _opened(_interlock),
    "flask-muset breaker, open, rejected": lambda f: _opened(_our_breaker_in_a_row),
}


def time_batch(fn, n):
    r = range(n)
    t = time.process_time_ns()
    for _ in r:
        fn(7)
    return (time.process_time_ns() - t) / n


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--valgrind", action="store_true")
    ap.add_argument("--instructions", action="store_true", help="print them alone, as JSON")
    ap.add_argument("--child", action="store_true")
    ap.add_argument("--extra", action="append", default=[])
    a = ap.parse_args()
    cases = CASES | dict(c.extras(a.extra))
    if not a.instructions:
        REDIS_PORT.append(c.start_redis()[0])
    if a.child:
        cs = {n: (lambda w=w: functools.partial(w(work), 7)) for n, w in cases.items()}
        print(json.dumps(c.instructions(cs, 500, 2500)))
        return
    if a.instructions:
        print(c.under_valgrind([__file__, "--child"]), end="")
        return
    fns, n = {}, {}
    for name, wrap in cases.items():
        fns[name] = wrap(work)
        per = time_batch(fns[name], 2000)
        n[name] = max(1000, min(500_000, int(25e6 / per)))
    res = {k: [] for k in fns}
    for _ in range(7):
        c.quiet()
        for k, f in fns.items():
            res[k].append(time_batch(f, n[k]))
    ins = {}
    if a.valgrind:
        args = [__file__, "--child"] + [x for e in a.extra for x in ("--extra", e)]
        ins = json.loads(c.under_valgrind(args))
    rows = []
    for k, v in res.items():
        row = {
            "wrapped by": k,
            "ns/call": st.median(v),
            "x bare": st.median([x / b for x, b in zip(v, res["bare call"], strict=True)]),
            "x try loop": st.median([x / b for x, b in zip(v, res[LOOP], strict=True)]),
            "spread %": c.spread(v),
        }
        if ins:
            row["instr/call"] = ins[k]
            row["instr x try loop"] = ins[k] and ins[k] / ins["floor: try/except loop"]
        rows.append(row)
    env = c.environment(
        "backoff",
        "tenacity",
        "stamina",
        "pybreaker",
        "circuitbreaker",
        "purgatory",
        "interlock-cb",
        "limits",
    )
    print("## Wrappers, success path (and rejection by an open breaker)\n")
    c.table(rows)
    c.finish("micro", rows, env)


if __name__ == "__main__":
    main()
