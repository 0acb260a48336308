"""Log records per second into a file, one JSON line each, with two fields: request_id and user.

Not named logging.py: that would hide the standard module from every script beside it. "Caller
waits" is the time of the call; for enqueue "cpu" goes on until the queue is drained. With
--valgrind also exact instructions per record, the figure to compare between days (60 s).
Another logger beside them: --extra name=package.module:make, where make(path) gives (log, close).
"""

import argparse
import json
import logging
import os
import shutil
import statistics as st
import tempfile
import time

import common as c
import ours_logging

CTX = {"request_id": "0af7651916cd43dd8448eb211c80319c", "user": "u-12345"}
MSG = "cache refreshed"


def floor_write(path):
    """Floor: one dict, orjson, one buffered write with a flush for each record."""
    import orjson

    f = open(path, "ab")  # noqa: SIM115 - closed by the caller

    def log(m):
        f.write(
            orjson.dumps({"timestamp": time.time(), "level": "info", "message": m, **CTX}) + b"\n"
        )
        f.flush()

    return log, f.close


def _loguru(path, **kw):
    from loguru import logger

    logger.remove()
    logger.add(path, **kw)
    return logger.bind(**CTX).info, logger.remove


def loguru_serialize(path):
    return _loguru(path, serialize=True)


def loguru_enqueue(path):
    return _loguru(path, serialize=True, enqueue=True)


def loguru_patched(path):
    """Loguru with an own orjson sink instead of serialize=True."""
    import orjson
    from loguru import logger

    f = open(path, "ab")  # noqa: SIM115 - closed by the caller

    def sink(m):
        r = m.record
        f.write(
            orjson.dumps(
                {
                    "timestamp": r["time"].timestamp(),
                    "level": r["level"].name,
                    "message": r["message"],
                    **r["extra"],
                }
            )
            + b"\n"
        )
        f.flush()

    logger.remove()
    logger.add(sink, format="{message}")
    return logger.bind(**CTX).info, lambda: (logger.remove(), f.close())


def structlog_orjson(path):
    import orjson
    import structlog as s

    f = open(path, "ab")  # noqa: SIM115 - closed by the caller
    log = s.wrap_logger(
        s.BytesLogger(f),
        wrapper_class=s.make_filtering_bound_logger(20),
        processors=[
            s.contextvars.merge_contextvars,
            s.processors.add_log_level,
            s.processors.TimeStamper(fmt="iso", utc=True),
            s.processors.JSONRenderer(serializer=orjson.dumps),
        ],
    ).bind(**CTX)
    return log.info, f.close


class _Json(logging.Formatter):
    def format(self, r):
        return json.dumps(
            {"timestamp": r.created, "level": r.levelname, "message": r.getMessage(), **CTX}
        )


def _std(path, formatter):
    h = logging.FileHandler(path)
    h.setFormatter(formatter)
    lg = logging.Logger("x", logging.INFO)  # noqa: LOG001 - of no tree
    lg.addHandler(h)
    return lg, h.close


def stdlib_json(path):
    lg, close = _std(path, _Json())
    return lg.info, close


def python_json_logger(path):
    from pythonjsonlogger.json import JsonFormatter

    lg, close = _std(path, JsonFormatter("%(asctime)s %(levelname)s %(message)s"))
    return (lambda m: lg.info(m, extra=CTX)), close


CASES = {
    "floor: orjson + write + flush": floor_write,
    "loguru serialize=True": loguru_serialize,
    "loguru serialize, enqueue": loguru_enqueue,
    "loguru, own orjson sink": loguru_patched,
    "structlog + orjson": structlog_orjson,
    "stdlib, json formatter": stdlib_json,
    "stdlib, python-json-logger": python_json_logger,
}
ACCESS, REQUEST = "ours, access line", "floor: the request of an access line"
OURS = {
    "ours": ours_logging.line,
    "ours, also in LOG_FILE": ours_logging.line_in_file,
    "ours, each text new": ours_logging.new_text,
    ACCESS: ours_logging.access,
}
CASES |= OURS


def one(make, n):
    with tempfile.TemporaryDirectory() as d:
        path = os.path.join(d, "x.log")
        log, close = make(path)
        for _ in range(50):
            log(MSG)
        w, p = time.perf_counter(), time.process_time()
        for _ in range(n):
            log(MSG)
        call = time.perf_counter() - w
        close()
        wall, cpu = time.perf_counter() - w, time.process_time() - p
        with open(path, "rb") as f:
            lines = f.read().splitlines()
        assert len(lines) == n + 50, (len(lines), n)
        rec = json.loads(lines[-1])
        size = len(lines[-1])
        assert CTX["user"] in json.dumps(rec)
    return n / wall, cpu / n * 1e6, call / n * 1e6, size


def child(extra):
    """Instructions per record (not for enqueue: another thread writes)."""
    folder = tempfile.mkdtemp()
    cases = {}
    for name, make in (CASES | {REQUEST: ours_logging.request} | extra).items():
        if "enqueue" not in name:

            def setup(make=make):
                log, _ = make(os.path.join(folder, str(os.getpid())))
                return lambda: log(MSG)

            cases[name] = setup
    found = c.instructions(cases, 100, 400)
    shutil.rmtree(folder)
    found[ACCESS] -= found.pop(REQUEST)
    print(json.dumps(found))


def instructions(extra=()):
    """Instructions per record by name, None without valgrind."""
    if shutil.which("valgrind") is None:
        return None
    args = [__file__, "--child", *(x for e in extra for x in ("--extra", e))]
    return json.loads(c.under_valgrind(args))


def rates(cases, n):
    """Five rounds of each in turns."""
    got = {name: [] for name in cases}
    for _ in range(5):
        c.quiet()
        for name, make in cases.items():
            got[name].append(one(make, n))
    return got


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=5000)
    parser.add_argument("--valgrind", action="store_true")
    parser.add_argument("--instructions", action="store_true", help="only these, as JSON")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--extra", action="append", default=[])
    options = parser.parse_args()
    extra = dict(c.extras(options.extra))
    if options.child:
        return child(extra)
    if options.instructions:
        return print(json.dumps(instructions(options.extra)))
    found = (options.valgrind and instructions(options.extra)) or {}
    got = rates(CASES | extra, options.n)
    rows, base = [], "floor: orjson + write + flush"
    for name, g in got.items():
        rows.append(
            {
                "logger": name,
                "records/s": st.median(x[0] for x in g),
                "cpu us/record": st.median(x[1] for x in g),
                "caller waits us": st.median(x[2] for x in g),
                "x floor (cpu)": st.median(x[1] / b[1] for x, b in zip(g, got[base], strict=True)),
                "instr/record": found.get(name),
                "instr x floor": found[name] / found[base] if found.get(name) else None,
                "bytes/record": g[0][3],
                "spread %": c.spread([x[0] for x in g]),
            }
        )
    print("## Structured logging to a file\n")
    c.table(rows)
    versions = c.environment("loguru", "structlog", "orjson", "python-json-logger")
    return c.finish("logging_rate", rows, versions)


if __name__ == "__main__":
    main()
