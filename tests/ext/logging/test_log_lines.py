"""Lines: their keys and order, fields of blocks, odd values, both forms."""

import asyncio
import copy
import json
import logging
import math
import os
import pty
import threading

import pytest
from flask import Flask
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from patched import run_patched

from flask_muset.logging import LogContext, configure, configured, get_logger, lost_lines

logger = get_logger("shop")


def test_the_guides_example(log):
    """Fields of the block are on each of its lines, those of `extra` on one."""
    with LogContext(logger, user_id="123", request_id="abc"):
        logger.info("Processing request")
        logger.error("Error occurred", extra={"error_code": "E001"})
    logger.info("After")
    first, second, third = log.lines
    assert list(first) == ["timestamp", "level", "logger", "message", "request_id", "user_id"]
    assert (first["request_id"], first["user_id"]) == ("abc", "123")
    assert (second["level"], second["error_code"]) == ("ERROR", "E001")
    assert "user_id" not in third
    assert third["timestamp"].endswith("Z")
    assert len(third["timestamp"]) == len("2025-01-01T00:00:00.000Z")


def test_names_that_are_taken(log):
    """request_id, trace_id and user replace the line's; other keys of its own get a mark."""
    taken = ("timestamp", "level", "logger", "message", "span_id", "method", "route", "status",
             "duration_ms", "fingerprint", "exception")  # fmt: skip
    extra = dict.fromkeys((*taken, "request_id", "trace_id", "user"), "mine")
    logger.info("text", extra=extra)
    found = log.last
    assert (found["level"], found["logger"], found["message"]) == ("INFO", "shop", "text")
    assert [found[f"{name}_"] for name in taken] == ["mine"] * len(taken)
    assert list(found)[4:7] == ["request_id", "trace_id", "user"]
    assert {found["request_id"], found["trace_id"], found["user"]} == {"mine"}


def test_no_key_twice(log):
    """Fields whose names become equal stay apart."""
    logger.info("text", extra={"status": 1, "status_": 2, 3: "three", "3": "text"})
    assert sorted(json.dumps(value) for value in log.last.values() if value in (1, 2)) == ["1", "2"]
    raw = log.text
    keys = [key for key, _ in json.loads(raw, object_pairs_hook=list)]
    assert len(keys) == len(set(keys))


def test_blocks_nest_and_are_left(log):
    """The inner field wins inside, the outer one is back after, also after an exception."""
    with LogContext(logger, a=1, b=1):
        with pytest.raises(ZeroDivisionError), LogContext(logger, b=2):  # noqa: PT012
            logger.info("inner")
            1 / 0  # noqa: B018
        logger.info("outer")
    logger.info("none")
    fields = [(line.get("a"), line.get("b")) for line in log.lines]
    assert fields == [(1, 2), (1, 1), (None, None)]


def test_one_block_entered_twice(log):
    """Also within itself."""
    block = LogContext(logger, a=1)
    with block, block:
        logger.info("in")
    logger.info("out")
    assert [line.get("a") for line in log.lines] == [1, None]


def test_tasks_and_threads_keep_apart(log):
    """Each task and each thread has its own blocks."""

    async def task(number):
        with LogContext(logger, number=number):
            await asyncio.sleep(0.001)
            logger.info("task %d", number)

    async def all_tasks():
        await asyncio.gather(*map(task, range(20)))

    asyncio.run(all_tasks())
    with LogContext(logger, number=-1):
        thread = threading.Thread(target=logger.info, args=("task 99",))
        thread.start()
        thread.join()
    found = {line["message"]: line.get("number") for line in log.of("shop")}
    assert found == {**{f"task {number}": number for number in range(20)}, "task 99": None}


def test_one_block_of_many_tasks(log):
    """A block may be shared: each task gets back the fields that it had."""
    block = LogContext(logger, shared=1)

    async def task(number):
        with LogContext(logger, number=number):
            with block:
                await asyncio.sleep(0.001 * (number % 3))
                logger.info("in")
            logger.info("out", extra={"expected": number})

    async def all_tasks():
        await asyncio.gather(*map(task, range(10)))

    asyncio.run(all_tasks())
    out = [line for line in log.of("shop") if line["message"] == "out"]
    assert [line["number"] for line in out] == [line["expected"] for line in out]
    assert not any("shared" in line for line in out)


def test_greenlets_keep_apart(tmp_path):
    """So do greenlets; what `spawn` runs has the fields of who spawned it."""
    code = """
        import sys
        from flask_muset.context import spawn
        from flask_muset.logging import LogContext, configure, get_logger
        configure(file=sys.argv[1])
        logger = get_logger("x")
        def work(number):
            with LogContext(logger, number=number):
                gevent.sleep(0.001)
                logger.info("greenlet %d", number)
                spawn(lambda: logger.info("spawned %d", number)).join()
        gevent.joinall([gevent.spawn(work, n) for n in range(20)], raise_error=True)
        result = [json.loads(line) for line in open(sys.argv[1])]
    """
    found = {line["message"]: line["number"] for line in run_patched(code, tmp_path / "x.log")}
    expected = {f"greenlet {n}": n for n in range(20)} | {f"spawned {n}": n for n in range(20)}
    assert found == expected


HOSTILE = st.text() | st.sampled_from(
    ["{}", "{0}", "{name!r:>{width}}", "%s %d", "%(x)s", "100%",
     "\n{'a': 1}", "<red>x</red>", "\\x",
     "\ud800", "\u2028\u2029\x85\x1b[31m", "\x00\r\n", '"}\n{"level":"ERROR"}']
)  # fmt: skip


@settings(
    max_examples=150, derandomize=True, deadline=None, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(HOSTILE, st.lists(HOSTILE, max_size=2), HOSTILE)
def test_any_text(log, message, args, key):
    """Users' text is never a format of ours, never ends a line, and never raises."""
    before, lost = len(log.lines), lost_lines()
    logger.info(message, *args, extra={key: message})
    logging.getLogger("std").warning(message, extra={f"x{key}": message})
    assert len(log.lines) == before + 2
    assert lost_lines() == lost


def test_arguments(log):
    """They are put in as in the standard library; where they do not fit, all is shown."""
    logger.info("%s is %d", "a", 1)
    logger.info("%(name)s", {"name": "b"})
    logger.info("{} %d", "no number")
    assert [line["message"] for line in log.lines] == ["a is 1", "b", "{} %d no number"]


class Broken:
    def __str__(self):
        raise RuntimeError

    __repr__ = __str__


class Chatty:
    def __str__(self):
        logger.info("within")
        return "chatty"


def endless():
    found = []
    found.append(found)
    return found


ODD = {
    "nan": (math.nan, "nan"),
    "infinite": (-math.inf, "-inf"),
    "bytes": (b"\x00secret", "<7 bytes>"),
    "set": ({1}, [1]),
    "broken": (Broken(), "<Broken>"),
    "huge": (10**5000, "<16610 bits>"),
    "none": (None, None),
    "true": (True, True),
    "float": (0.1, 0.1),
    "nested": ({"a": [1, {"b": (2.5, None)}]}, {"a": [1, {"b": [2.5, None]}]}),
    "surrogate": ("\ud800", "?"),
    "type": (int, "<class 'int'>"),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_values(log, name):
    """What JSON does not know becomes text."""
    value, shown = ODD[name]
    logger.info("odd", extra={"value": value})
    assert log.last["value"] == shown


def test_nothing_is_endless(log):
    """A line is bounded, whatever is logged, and making it is quick."""
    deep = []
    for _ in range(100_000):
        deep = [deep]
    wide = {f"key {number}": "x" * 10_000 for number in range(10_000)}
    for value in (deep, wide, endless(), "x" * 50_000_000, [["y" * 9_000] * 300] * 300):
        logger.info("large", extra={"value": value})
    logger.info("z" * 50_000_000)
    logger.info("many", extra={f"field{number}": "x" * 100_000 for number in range(5_000)})
    sizes = [len(line) for line in log.text.splitlines()]
    assert len(sizes) == 7
    assert max(sizes[:-1]) < 20_000
    assert sizes[-1] < 700_000


def test_a_value_that_logs(log):
    """A value whose text is made by code that logs is logged like any other."""
    logger.info("%s", Chatty())
    logger.info("field", extra={"value": Chatty()})
    logging.getLogger("std").info("%s", Chatty())
    # More often than three times: pytest makes its texts as well.
    messages = [line["message"] for line in log.lines]
    assert messages.count("within") >= 3
    assert [text for text in messages if text != "within"] == ["chatty", "field", "chatty"]


def test_callers_objects_stay(log):
    """Redaction works on copies."""
    extra = {"password": "hunter2", "deep": [{"token": "x"}, {"a": b"1"}]}
    before = copy.deepcopy(extra)
    with LogContext(logger, **extra):
        logger.info("x", extra=extra)
        logging.getLogger("std").info("x", extra=extra)
    assert extra == before


def test_exceptions(log):
    """The whole chain is one text under one key; locals are not in it."""
    try:
        try:
            local = "a local value"
            assert local
            raise KeyError("inner")
        except KeyError as failure:
            raise RuntimeError("outer\nsecond line") from failure
    except RuntimeError as failure:
        logger.exception("failed")
        logger.error("again", exc_info=failure)
        logging.getLogger("std").exception("third")
    logger.exception("nothing is being handled")  # noqa: LOG004
    assert "exception" not in log.last
    for line in log.lines[:3]:
        assert list(line)[-1] == "exception"
        assert "KeyError: 'inner'" in line["exception"]
        assert "direct cause" in line["exception"]
        assert line["exception"].endswith("RuntimeError: outer\nsecond line")
        assert "a local value" not in line["exception"].replace('local = "a local value"', "")


def test_the_standard_methods(log):
    """All methods, levels and options that callers know."""
    for name in ("debug", "info", "warning", "error", "critical"):
        getattr(logger, name)("text")
    logger.log(logging.WARNING, "by number")
    logger.log(35, "between")
    logger.info("stack", stack_info=True)
    levels = [line["level"] for line in log.lines]
    assert levels == [
        "DEBUG",
        "INFO",
        "WARNING",
        "ERROR",
        "CRITICAL",
        "WARNING",
        "Level 35",
        "INFO",
    ]
    assert "test_the_standard_methods" in log.last["stack"]
    assert logger.isEnabledFor(logging.DEBUG)
    assert get_logger("shop") is logger


def test_levels(tmp_path):
    """What is below the level is not written, whoever logs it; it may be changed."""
    path = tmp_path / "x.log"
    for level in ("ERROR", "INFO"):
        configure(level, file=path)
        logger.info("ours %s", level)
        logging.getLogger("std").info("std %s", level)
        assert logger.isEnabledFor(logging.INFO) is (level == "INFO")
    messages = [json.loads(line)["message"] for line in path.read_text().splitlines()]
    assert messages == ["ours INFO", "std INFO"]


def test_text_for_people(tmp_path):
    """One line each, exceptions indented below; nothing that a terminal obeys."""
    path = tmp_path / "x.log"
    with configured(format="text", file=path):
        with LogContext(logger, user="u1"):
            logger.warning("hello\n\x1b[31mred", extra={"a b": "c d", "n": 1})
        try:
            raise ValueError("first\nsecond\x1b[0m")
        except ValueError:
            logger.exception("failed")
    text = path.read_text()
    assert "\x1b" not in text
    first, second, *rest = text.splitlines()
    assert first.split(maxsplit=2)[2] == (
        'WARNING  shop: hello\\n\\x1b[31mred user=u1 a b="c d" n=1'
    )
    assert second.endswith("ERROR    shop: failed")
    assert all(line.startswith("    ") for line in rest)


def test_colour_on_a_terminal(monkeypatch):
    """The level is coloured where standard error is a terminal, and only there."""
    main, side = pty.openpty()
    with os.fdopen(side, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr("sys.stderr", terminal)
        with configured(format="text"):
            logger.error("text")
            shown = os.read(main, 1_000).decode()
        with configured(format="json"):
            logger.error("text")
            plain = os.read(main, 1_000).decode()
    os.close(main)
    assert "\x1b[31mERROR" in shown
    assert "\x1b" not in plain


def test_a_request_without_observers_has_its_id(log):
    """With any extension a line of a request bears at least the id that its answer bears."""
    from flask_muset import ErrorHandler

    app = Flask("x")
    ErrorHandler(app)
    app.add_url_rule("/", view_func=lambda: logger.info("in") or "ok")
    answer = app.test_client().get("/")
    assert log.of("shop")[0]["request_id"] == answer.headers["X-Request-ID"]
