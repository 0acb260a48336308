"""Real documents, real questions."""

import json
from pathlib import Path

import pytest

from muset.ports import AnswerStatus, Principal, Role
from muset.services.ask import Question

DATA = Path(__file__).parent.parent / "data"


def questions(name):
    return json.loads((DATA / name).read_text(encoding="utf-8"))


@pytest.fixture
def texts(services):
    """The three documents, stored; by id."""
    who = Principal(services.keys.user_id("a@example.org"), 0, Role.MEMBER)
    stored = {}
    for name in ("constitution.md", "arbor_day_leaves.txt", "infantry_marches.txt"):
        text = (DATA / name).read_bytes().decode("utf-8")
        document, _ = services.documents.add(who, name, text)
        stored[document.id] = (name, text)
    return stored


def is_cited(answer, texts, document, passage):
    """A citation stands in the passage around the expected words."""
    for citation in answer.citations:
        name, text = texts[citation.document_id]
        around = text[max(0, citation.start - 300) : citation.end + 300]
        if name == document and passage in around:
            return True
    return False


@pytest.mark.claim(
    "20 questions over three real documents: the expected passage is cited for at least 17, "
    "5 questions without an answer are unsure, every quote is verbatim"
)
def test_twenty_questions(services, texts, prove):
    """Asks all, checks each quote against the text, and counts."""
    asked = questions("questions.json")
    missed, wrong = [], []
    for entry in asked["answerable"]:
        document = next(text for name, text in texts.values() if name == entry["document"])
        assert entry["passage"] in document
        answer = services.ask.ask(Question(entry["question"]))
        for citation in answer.citations:
            text = texts[citation.document_id][1]
            assert text[citation.start : citation.end] == citation.quote
        assert len(answer.citations) <= 4
        if not is_cited(answer, texts, entry["document"], entry["passage"]):
            missed.append(entry["question"])
    for question in asked["unanswerable"]:
        answer = services.ask.ask(Question(question))
        if answer.status is not AnswerStatus.UNSURE or answer.citations:
            wrong.append(question)
    prove.figure(f"{20 - len(missed)} of 20 cited, {5 - len(wrong)} of 5 unsure")
    assert len(missed) <= 3, missed
    assert not wrong
