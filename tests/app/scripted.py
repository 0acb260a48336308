"""A provider that does what a test tells it."""

import threading
from dataclasses import replace

from flask_muset.clock import SYSTEM
from muset.ports import Delta, Model, Tokens

SMALL = (Model("small"),)


class Scripted:
    """Answers each call by the next script, the last one again and again.

    A script has texts, which are told; numbers, for which it waits; exceptions, which are raised;
    functions, which are called with the question; all else is told as it is. Tokens end it, unless
    the script has some of its own or raises.
    """

    def __init__(self, *scripts, name="first", models=SMALL, has_markers=True):
        self.name, self.models, self.has_markers = name, models, has_markers
        self._scripts = [script if isinstance(script, list) else [script] for script in scripts]
        self.questions = []
        self.closed = 0
        self.all_closed = threading.Event()

    @property
    def calls(self):
        return len(self.questions)

    @property
    def open(self):
        return self.calls - self.closed

    def stream(self, question):
        script = self._scripts[min(self.calls, len(self._scripts) - 1)]
        self.questions.append(question)
        self.all_closed.clear()
        return self._told(script, question)

    def _told(self, script, question):
        try:
            for step in script:
                if isinstance(step, BaseException):
                    raise step
                if isinstance(step, int | float):
                    SYSTEM.sleep(step)
                elif callable(step):
                    step(question)
                else:
                    yield Delta(step) if isinstance(step, str) else step
            if not any(isinstance(step, Tokens) for step in script):
                yield Tokens(100, 10)
        finally:
            self.closed += 1
            if not self.open:
                self.all_closed.set()


def put_in_place(app, provider):
    """Let a provider stand for the app's first one, under the same policy."""
    answering = app.extensions["muset"].ask._answering
    first, *others = answering.sources
    answering.sources = (replace(first, provider=provider), *others)
    return provider
