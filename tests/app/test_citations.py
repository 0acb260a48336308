"""Markers of a model's text, checked and quoted."""

import hypothesis
import pytest
from hypothesis import strategies as st

from muset.ports import Retrieval, ScoredPassage
from muset.services import citations
from muset.services.citations import Markers
from muset.services.text import split_sentences

BEES = "A bee colony has one queen. The queen lays 2,000 eggs a day. Drones do not sting."
ANTS = "An ant colony may have many queens.\nThe queen of the black garden ant lives 28 years."


def retrieval(*texts):
    """Passages that stand at character 1,000 of documents 7, 8 and so on."""
    passages = tuple(
        ScoredPassage(7 + n, f"title {n}", 1000, 1000 + len(text), text, 1.0)
        for n, text in enumerate(texts)
    )
    return Retrieval(passages, {"queen": 2.0, "egg": 3.0})


def checked(*pieces, of=(BEES, ANTS)):
    """The text that comes out, and the markers."""
    markers = Markers(retrieval(*of))
    text = "".join([*(markers.feed(piece) for piece in pieces), markers.end()])
    return text, markers


def test_each_marker_is_the_number_of_its_quote():
    """Numbers are given in the order of the text; the same source has the same number."""
    text, markers = checked(
        "A garden ant queen lives for 28 years [2]. A bee queen lays 2,000 eggs a day [1]. "
        "An ant colony may have several queens [2]. Ant queens live for 28 years. [2]"
    )
    assert text == (
        "A garden ant queen lives for 28 years [1]. A bee queen lays 2,000 eggs a day [2]. "
        "An ant colony may have several queens [3]. Ant queens live for 28 years. [1]"
    )
    assert [c.quote for c in markers.citations] == [
        "The queen of the black garden ant lives 28 years.",
        "The queen lays 2,000 eggs a day.",
        "An ant colony may have many queens.",
    ]
    assert [c.document_id for c in markers.citations] == [8, 7, 8]
    assert not markers.has_invented


def test_a_quote_stands_at_its_offsets():
    """The offsets are of the document, not of the passage."""
    _, markers = checked("The queen lays 2,000 eggs [1].")
    (citation,) = markers.citations
    document = "x" * 1000 + BEES
    assert document[citation.start : citation.end] == citation.quote


def test_several_sources_in_one_marker():
    """[1, 2] becomes two markers; what is in it and is no passage is left out."""
    text, markers = checked("Queens lay eggs [1, 2].")
    assert text == "Queens lay eggs [1][2]."
    text, markers = checked("Queens lay eggs [1;9].")
    assert (text, markers.has_invented) == ("Queens lay eggs [1].", True)


@pytest.mark.parametrize("marker", ["[99]", "[0]", "[3]", "[ 3 ]", "[7, 8]"])
def test_a_marker_of_no_passage_is_taken_out(marker):
    """The blank before it goes with it."""
    text, markers = checked(f"Queens lay eggs {marker}. They do.")
    assert (text, markers.citations) == ("Queens lay eggs. They do.", [])
    assert markers.has_invented


@pytest.mark.parametrize(
    "text", ["in [2024]", "a[i]", "[a](b)", "[]", "[ ", "end [", "end [1", "[1,]", "[" + " 1" * 90]
)
def test_what_is_no_marker_stays(text):
    """Years, code, links, and brackets that never close."""
    assert checked(text)[0] == text
    assert not checked(text)[1].has_invented


def test_a_marker_without_a_sentence_is_quoted_by_the_question():
    """With nothing before it, the sentence that speaks most about the question."""
    _, markers = checked("[1] says so.")
    assert markers.citations[0].quote == "The queen lays 2,000 eggs a day."


def test_little_is_held_back():
    """Only what may be the beginning of a marker waits for the next piece."""
    markers = Markers(retrieval(BEES))
    assert markers.feed("Queens lay ") == "Queens lay"
    assert markers.feed("eggs") == " eggs"
    assert markers.feed(" [") == ""
    assert markers.feed("1") == ""
    assert markers.feed("]") == " [1]"
    long = "[" + "1" * 200
    assert markers.feed(long) == long


@hypothesis.settings(max_examples=200, derandomize=True, deadline=None, database=None)
@hypothesis.given(
    st.lists(st.sampled_from(["[1]", "[9]", "[1,2]", "[", "]", "1", " ", "eggs", "a. B", ","])),
    st.data(),
)
def test_pieces_make_no_difference(parts, data):
    """However a text is cut into pieces, the same comes out."""
    text = "".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole, cut = checked(text), checked(*pieces)
    assert whole[0] == cut[0]
    assert whole[1].citations == cut[1].citations
    assert whole[1].has_invented == cut[1].has_invented


def test_many_markers_are_looked_at_once(monkeypatch):
    """A model that repeats itself without end holds nobody up: sentences are split once."""
    asked = []

    def split(text):
        asked.append(text)
        return split_sentences(text)

    monkeypatch.setattr(citations, "split_sentences", split)
    for marker in ("[1]", " [1]", "[1, 2]"):
        asked.clear()
        text, markers = checked("The queen lays 2,000 eggs a day." + marker * 2_000)
        assert text.count("[1]") == 2_000
        assert 1 <= len(markers.citations) <= 2
        assert len(asked) <= 6
