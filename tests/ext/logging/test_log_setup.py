"""Setting logging up and undoing it; who else's lines it takes; what happens when it fails."""

import io
import json
import logging
import os
import subprocess
import sys
import warnings

import pytest
from flask import Flask
from flask.logging import default_handler
from loguru import logger as loguru
from patched import run_patched

from flask_muset.logging import LogContext, configure, configured, get_logger, lost_lines, reset

logger = get_logger("shop")


def handlers():
    """All handlers of the standard library and of loguru."""
    root = logging.getLogger()
    named = [
        (name, tuple(found.handlers), found.propagate)
        for name, found in logging.Logger.manager.loggerDict.items()
        if isinstance(found, logging.Logger)
    ]
    return root.level, tuple(root.handlers), named, len(loguru._core.handlers)


def test_reset_leaves_no_trace(tmp_path):
    """Handlers, levels and warnings are as they were."""
    Flask("before").logger.addHandler(default_handler)
    reset()
    before, shown = handlers(), warnings.showwarning
    for _ in range(3):
        configure("WARNING", "text", tmp_path / "x.log")
    reset()
    reset()
    assert handlers() == before
    assert warnings.showwarning is shown


def test_called_again(log):
    """Each line is there once, however often and in whatever order all was set up."""
    app = Flask("again")
    app.logger.info("before")
    configure("DEBUG", file=log.path)
    configure("DEBUG", file=log.path)
    app.logger.info("after")
    logger.info("ours")
    assert [line["message"] for line in log.lines] == ["before", "after", "ours"]


def test_the_standard_library(log):
    """Records of all loggers, with their fields, and warnings."""
    logging.getLogger("a.b").info("%s item", "one", extra={"order": 7, "user": "u1"})
    with LogContext(None, job="j"):
        logging.getLogger().error("root")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old", DeprecationWarning, stacklevel=1)
    first, second, third = log.lines
    assert (
        first.items() >= {"logger": "a.b", "message": "one item", "order": 7, "user": "u1"}.items()
    )
    assert second.items() >= {"logger": "root", "level": "ERROR", "job": "j"}.items()
    assert (third["logger"], third["level"]) == ("py.warnings", "WARNING")
    assert "DeprecationWarning: old" in third["message"]


def test_a_flask_app_made_before_or_after(tmp_path, capfd):
    """Flask's own handler is taken away, so that each of its lines is there once."""
    early = Flask("early")
    early.logger.addHandler(default_handler)  # as Flask does where the root has none
    with configured(file=tmp_path / "x.log"):
        late = Flask("late")
        early.logger.error("one")
        late.logger.error("two")
    written = [json.loads(line) for line in (tmp_path / "x.log").read_text().splitlines()]
    assert [(line["logger"], line["message"]) for line in written] == [
        ("early", "one"), ("late", "two")
    ]  # fmt: skip
    shown = capfd.readouterr().err
    assert shown.count("one") == shown.count("two") == 1


def test_what_was_logged_with_loguru_itself(log):
    """It has its own fields, and ours of the block."""
    with LogContext(None, job="j"), loguru.contextualize(step=2):
        loguru.bind(order=7).info("hello {}", "you")
    try:
        raise ValueError("broken")
    except ValueError:
        loguru.exception("failed")
    first, second = log.lines
    assert first.items() >= {"message": "hello you", "order": 7, "job": "j", "step": 2}.items()
    assert first["logger"].endswith("test_log_setup")
    assert "ValueError: broken" in second["exception"]


def test_other_sinks_of_loguru_know_the_caller(log):
    """A sink that somebody else has added gets the record of the line that logged."""
    records = []
    number = loguru.add(lambda message: records.append(message.record))
    logger.info("ours")
    logging.getLogger("std").info("theirs")
    loguru.remove(number)
    assert [record["function"] for record in records] == [
        "test_other_sinks_of_loguru_know_the_caller"
    ] * 2
    assert [record["message"] for record in records] == ["ours", "theirs"]


def test_before_it_is_set_up(caplog):
    """Our loggers are the standard library's then; fields arrive as attributes."""
    with caplog.at_level("INFO"), LogContext(logger, job="j"):
        logger.info("%s", "text", extra={"order": 7, "name": "taken"})  # noqa: G101
    (record,) = caplog.records
    assert (record.name, record.getMessage(), record.order) == ("shop", "text", 7)
    assert record.job == "j"
    assert record.funcName == "test_before_it_is_set_up"


def test_caplog_still_works(log, caplog):
    """Handlers that collect records elsewhere stay."""
    logging.getLogger("std").warning("text")
    assert caplog.messages == ["text"]
    assert log.last["message"] == "text"


def test_always_on_standard_error(tmp_path, capfd):
    """Beside the file, line for line."""
    with configured(file=tmp_path / "x.log"):
        logger.info("text")
    assert capfd.readouterr().err == (tmp_path / "x.log").read_text()


def test_standard_error_replaced(monkeypatch):
    """It is looked up at each line; one without a descriptor will do, and none at all too."""
    with configured():
        replaced = io.StringIO()
        monkeypatch.setattr(sys, "stderr", replaced)
        logger.info("text")
        monkeypatch.setattr(sys, "stderr", None)
        logger.info("nowhere")
    assert json.loads(replaced.getvalue())["message"] == "text"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"level": "LOUD"}, "level must be one of DEBUG, .*'LOUD'"),
        ({"format": "xml"}, "format must be one of json, text, got 'xml'"),
        ({"file": "/nowhere/app.log"}, "file '/nowhere/app.log' cannot be written .*folder"),
        ({"slow_request_s": 0}, "slow_request_s must be above 0.*got 0"),
    ],
)
def test_arguments_that_are_refused(log, arguments, text):
    """With the value and the cure; what was set up stays."""
    with pytest.raises(ValueError, match=text):
        configure(**arguments)
    logger.info("still here")
    assert log.last["message"] == "still here"


def test_a_file_that_fails(capfd):
    """The line is on standard error all the same, the loss is counted and said once."""
    before = lost_lines()
    with configured(file="/dev/full"):
        for number in range(3):
            logger.info("line %d", number)
    said = capfd.readouterr().err.splitlines()
    assert lost_lines() - before == 3
    assert sum(line.startswith("{") for line in said) == 3
    (complaint,) = [line for line in said if not line.startswith("{")]
    assert complaint == (
        "flask_muset.logging: /dev/full cannot be written: OSError No space left on device"
    )


def test_standard_error_that_fails(tmp_path):
    """A closed or full standard error breaks nothing; the file has the lines."""
    code = (
        "import os, sys; from flask_muset.logging import configure, get_logger, lost_lines;"
        "configure(file=sys.argv[1]); os.close(2); get_logger('x').info('text');"
        "os.open('/dev/full', os.O_WRONLY); get_logger('x').info('text');"
        # Some Pythons end with 120 where they cannot flush standard error at their end.
        "os._exit(lost_lines() != 2)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "x.log")], check=True, timeout=60)
    assert len((tmp_path / "x.log").read_text().splitlines()) == 2


def test_after_a_fork(log):
    """A child goes on, with descriptors of its own."""
    children = []
    for number in range(4):
        child = os.fork()
        if not child:
            for _ in range(100):
                logger.info("child %d", number)
            os._exit(0)
        children.append(child)
    for _ in range(100):
        logger.info("parent")
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert len(log.lines) == 500


UNDER_GEVENT = """
import sys, logging
from flask_muset.logging import configure, get_logger
configure(file=sys.argv[1])
logger = get_logger("x")
def work(number):
    for _ in range(20):
        logger.info("line %d", number)
        logging.getLogger("y").info("line %d", number)
        gevent.sleep(0)
jobs = [gevent.spawn(work, n) for n in range(20)]
pool = gevent.get_hub().threadpool
jobs += [pool.spawn(lambda: [logger.info("thread") for _ in range(50)]) for _ in range(4)]
gevent.joinall(jobs, timeout=30, raise_error=True)
result = [json.loads(line)["message"] for line in open(sys.argv[1])]
"""


def test_under_gevent(tmp_path):
    """Greenlets and gevent's real threads log at once: nothing hangs, nothing is lost."""
    assert len(run_patched(UNDER_GEVENT, tmp_path / "x.log")) == 1_000


def test_patched_late(tmp_path):
    """So it is where gevent patches when logging is set up already."""
    source = (
        "from flask_muset.logging import configure; configure()\n"
        "from gevent import monkey; monkey.patch_all()\nimport gevent, json\n"
        f"{UNDER_GEVENT}assert len(result) == 1000, len(result)\n"
    )
    command = [sys.executable, "-c", source, str(tmp_path / "x.log")]
    subprocess.run(command, check=True, timeout=60)
