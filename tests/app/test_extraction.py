"""The text of HTML and PDF files, also of those that are made to do harm."""

import io
import subprocess
import zlib

import pytest
from made_files import page, pdf
from patched import run_patched
from pypdf import PdfWriter

from flask_muset.deadline import deadline
from flask_muset.errors import InternalError, OperationTimeoutError, ValidationError
from muset.adapters.extraction import process
from muset.adapters.extraction.html import html_text
from muset.adapters.extraction.process import ProcessExtractor
from muset.app import create_app
from muset.services.documents import too_large
from muset.settings import load_settings

MIB = 1024 * 1024
BEES = page("A colony has one queen.", "She lays 2,000 eggs a day.")


@pytest.fixture
def extractor():
    return ProcessExtractor(10 * MIB)


def text_of(html, charset=None):
    return html_text(html if isinstance(html, bytes) else html.encode(), charset)[0]


def reason(extractor, data, kind):
    """Why a file is refused."""
    with pytest.raises(ValidationError) as caught:
        extractor.extract(data, kind)
    assert caught.value.errors[0]["field"] == "file"
    return caught.value.code


# --- HTML -----------------------------------------------------------------------------------------

WHOLE = """<!DOCTYPE html><html><head><title> Of &amp; about
 bees </title><style>p { color: red }</style><script>if (1 < 2) alert("<p>no</p>")</script></head>
<body><nav><a href=/>Home</a></nav><header><h1>The <em>bee</em></h1></header>
<main><p>One <b>queen</b>,
many workers.<br>Another line<br><br>and one more</p>
<ul><li>honey<li>wax &mdash; <i>soft</i></ul>
<div>outer<div>inner</div></div><h2>Numbers</h2>
<table><tr><th>Kind</th><th>Eggs</th></tr><tr><td>queen</td><td>2,000&nbsp;a day</td></tr></table>
<pre>def buzz():
    return  "z"
</pre><aside>A note.</aside><footer>Its source.</footer></main>
<noscript>Switch it on</noscript><template><p>T</p></template><svg><text>S</text></svg>
<button>Buy</button><textarea>type</textarea><select><option>O</select><!-- comment -->
<aside>Related</aside><footer>Imprint</footer></body></html>"""


def test_the_visible_text():
    """Each heading, item, row and paragraph on its own lines; nothing that readers do not see."""
    text, title = html_text(WHOLE.encode(), None)
    assert title == "Of & about bees"
    assert text == (
        "The bee\n\nOne queen, many workers.\nAnother line\n\nand one more\n\n"
        "honey\nwax \u2014 soft\n\nouter\ninner\n\nNumbers\n\nKind\tEggs\nqueen\t2,000 a day\n\n"
        'def buzz():\n    return  "z"\n\nA note.\n\nIts source.'
    )


@pytest.mark.parametrize(
    "hidden",
    [
        "<p hidden>x</p>",
        "<div style='color: red; DISPLAY : none'>x</div>",
        "<div style='visibility:hidden'><p>x</p></div>",
        "<span aria-hidden=true>x</span>",
    ],
)
def test_hidden_text_is_left_out(hidden):
    """What a page hides from its readers does not get to a model either."""
    assert text_of(f"<p>a</p>{hidden}<p>b</p>") == "a\n\nb"


@pytest.mark.parametrize(
    ("data", "charset", "text"),
    [
        ("<p>Größe".encode(), None, "Größe"),
        ("<p>Größe".encode("cp1252"), None, "Größe"),
        ("<p>Größe €".encode("cp1252"), "ISO-8859-1", "Größe €"),
        ("<meta charset=koi8-r><p>пчела".encode("koi8-r"), None, "пчела"),
        (
            '<meta http-equiv=content-type content="text/html; charset=shift_jis">蜂'.encode(
                "shift_jis"
            ),
            None,
            "蜂",
        ),
        ("<meta charset=koi8-r><p>пчела".encode(), "utf-8", "пчела"),
        ("\ufeff<meta charset=koi8-r><p>пчела".encode(), "koi8-r", "пчела"),
        ("\ufeff<p>пчела".encode("utf-16-le"), None, "пчела"),
        ("\ufeff<p>пчела".encode("utf-16-be"), "utf-8", "пчела"),
        ("<meta charset=utf-16><p>Größe".encode(), None, "Größe"),
        ("<meta charset=unicode_escape><p>\\x41 ö".encode(), "zlib", "\\x41 ö"),
        (b"<p>a&#0;b&shy;c&#x110000;", None, "a\ufffdbc\ufffd"),
        ("<p>a\u200bb".encode(), None, "ab"),
        (b"<p>\xff\xfe", "utf-8", "\ufffd\ufffd"),
    ],
)
def test_charsets(data, charset, text):
    """A mark wins, then the sender, then the page, then what fits; odd names count for nothing."""
    assert text_of(data, charset) == text


def test_broken_html_is_read_as_browsers_read_it():
    """Ends that are missing or too many lose no text."""
    assert text_of("<b>a<p>b</b>c</p></div><li>d<table>e<td>f") == "a\n\nbc\n\nde\n\nf"
    assert text_of("a < b & c &nosuch; <") == "a < b & c &nosuch; <"
    assert text_of("") == ""


def test_depth_is_no_harm(extractor):
    """Ten thousand elements in each other: the text is found, and nothing recurses."""
    deep = b"<div>" * 10_000 + b"found" + b"</div>" * 10_000
    assert extractor.extract(deep, "html").text == "found"
    assert extractor.extract(b"<b><i>" * 2_000 + b"found", "html").text == "found"


@pytest.mark.parametrize(
    "data", [b"<div>" * 400_000, b"<i></i>" * 1_400_000, b"<a b c=d>x" * 1_000_000]
)
def test_ten_megabytes_of_tags_end_in_time(data):
    """What takes longer than it may is a refusal, and costs no more than that."""
    assert reason(ProcessExtractor(10 * MIB, cpu_s=1), data, "html") in (
        "too_much",
        "no_text",
        "broken",
    )


def test_a_page_without_text(extractor):
    """Said as such."""
    assert reason(extractor, b"<title>Empty</title><img src=x>", "html") == "no_text"


# --- PDF ------------------------------------------------------------------------------------------


def test_the_text_of_a_pdf(extractor):
    """Lines and pages in order."""
    found = extractor.extract(pdf([BEES, page(), page("Second page.")]), "pdf")
    assert found.text == ("A colony has one queen.\nShe lays 2,000 eggs a day.\n\nSecond page.")
    assert found.title == ""


def written(password, owner):
    writer = PdfWriter(clone_from=io.BytesIO(pdf([BEES])))
    writer.encrypt(password, owner, algorithm="RC4-128")
    out = io.BytesIO()
    writer.write(out)
    return out.getvalue()


def test_passwords(extractor):
    """A file that only forbids printing is read, one that needs a password is not."""
    assert extractor.extract(written("", "owner"), "pdf").text.startswith("A colony")
    assert reason(extractor, written("secret", "owner"), "pdf") == "encrypted"
    aes = (
        b"<< /Filter /Standard /V 5 /R 6 /Length 256 /P -4 /StmF /S /StrF /S "
        b"/CF << /S << /CFM /AESV3 /Length 32 >> >> "
        b"/O <%s> /U <%s> /OE <%s> /UE <%s> /Perms <%s> >>"
        % tuple(b"00" * length for length in (48, 48, 32, 32, 16))
    )
    assert reason(extractor, pdf([BEES], encrypt=aes), "pdf") == "encrypted"


def test_files_that_cannot_be_read(extractor):
    """Each has its reason."""
    good = pdf([BEES])
    assert reason(extractor, pdf([page()]), "pdf") == "no_text"
    assert reason(extractor, b"no pdf at all", "pdf") == "broken"
    assert reason(extractor, b"", "pdf") == "broken"
    assert reason(extractor, good[: len(good) // 3], "pdf") == "broken"
    many = pdf([], data=[b""] * 5_001)
    assert reason(extractor, many, "pdf") == "too_many_pages"


def test_bombs(extractor):
    """Streams that grow beyond measure: by one filter, by two, by their operators."""
    zeros = zlib.compress(bytes(200 * MIB), 9)
    assert len(zeros) < MIB / 4
    assert reason(extractor, pdf([], data=[zeros]), "pdf") == "too_much"
    twice = pdf([], filters=2, data=[zlib.compress(zeros, 9)])
    assert len(twice) < 20_000
    assert reason(extractor, twice, "pdf") == "too_much"
    endless = pdf([b"BT /F1 12 Tf " + b"(x) Tj " * 1_500_000 + b"ET"])
    assert len(endless) < MIB
    assert reason(ProcessExtractor(10 * MIB, cpu_s=1), endless, "pdf") == "too_much"


def test_text_that_is_too_long_is_not_read_to_its_end():
    """A little more than the limit comes back, so that the service answers 413."""
    text = ProcessExtractor(50).extract(pdf([BEES] * 100), "pdf").text
    assert 50 < len(text) < 60
    text = ProcessExtractor(50).extract("<p>ö".encode() * 100, "html").text
    assert 50 < len(text.encode()) < 60


# --- the process ----------------------------------------------------------------------------------


def test_memory_is_bounded():
    """A page whose tree needs more than it may is a refusal."""
    small = ProcessExtractor(10 * MIB, memory_bytes=64 * MIB)
    assert reason(small, b"<i></i>" * 1_000_000, "html") in ("too_much", "broken")


def test_the_wait_is_bounded(extractor):
    """By the wall time, which is a refusal, and by the deadline, which is a time-out."""
    slow = b"<div>" * 400_000
    assert reason(ProcessExtractor(MIB, wall_s=0.2), slow, "html") == "too_much"
    with pytest.raises(OperationTimeoutError), deadline(0.2):
        extractor.extract(slow, "html")


def test_a_fault_of_our_own_is_no_fault_of_the_file():
    """A process that cannot work is an internal error, with what it said for the log."""
    with pytest.raises(InternalError, match=r"(?s)has ended with 1: .*invalid literal"):
        ProcessExtractor("many").extract(b"", "html")


def test_the_process_knows_no_secrets(extractor, monkeypatch):
    """Nothing of the environment but the path of the modules goes along."""
    given = []

    class Spy(subprocess.Popen):
        def __init__(self, *args, env, **kwargs):
            given.append(env)
            super().__init__(*args, env=env, **kwargs)

    monkeypatch.setattr(process.subprocess, "Popen", Spy)
    monkeypatch.setenv("AI_API_KEY", "secret")
    assert extractor.extract(b"x", "html").text == "x"
    assert [env.keys() for env in given] == [{"PYTHONPATH"}]


@pytest.mark.parametrize("charset", ["\0", "x" * 100_000, "-c", "\udc80", "utf-8\n"])
def test_a_charset_may_be_anything(extractor, charset):
    """What is no name of one counts for nothing."""
    assert extractor.extract("<p>ö".encode(), "html", charset).text == "ö"


def test_other_greenlets_run_on(extractor):
    """While a file is read others run; one that is killed leaves no process behind."""
    result = run_patched(
        """
        import os
        from muset.adapters.extraction.process import ProcessExtractor
        from flask_muset.deadline import deadline
        from flask_muset.errors import OperationTimeoutError, ValidationError
        extractor = ProcessExtractor(1 << 20, cpu_s=1)
        ticks = 0
        def tick():
            global ticks
            while True:
                gevent.sleep(0.01)
                ticks += 1
        gevent.spawn(tick)
        slow = b"<div>" * 400_000
        try:
            extractor.extract(slow, "html")
        except ValidationError as error:
            first = error.code
        during = ticks
        text = extractor.extract(b"<p>fine", "html").text
        try:
            with deadline(0.3):
                extractor.extract(slow, "html")
        except OperationTimeoutError:
            second = "timeout"
        reader = gevent.spawn(extractor.extract, slow, "html")
        gevent.sleep(0.3)
        reader.kill()
        try:
            left = monkey.get_original("os", "waitpid")(-1, os.WNOHANG)
        except ChildProcessError:
            left = None
        result = [first, during > 20, text, second, left]
        """
    )
    assert result == ["too_much", True, "fine", "timeout", None]


# --- through the API ------------------------------------------------------------------------------


def upload(client, who, name, data, media_type=None, **form):
    form["file"] = (io.BytesIO(data), name, *([media_type] if media_type else []))
    return client.post("/api/v1/documents", data=form, headers=who)


def test_a_pdf_and_a_page_are_cited(client, member):
    """Both are asked about; each quote stands at its offsets in the text that is stored."""
    made = upload(client, member, "bees.pdf", pdf([BEES]))
    assert (made.status_code, made.json["title"]) == (201, "bees")
    assert upload(client, member, "bees.htm", WHOLE.encode()).json["title"] == "Of & about bees"
    question = {"question": "How many eggs does she lay a day?"}
    answer = client.post("/api/v1/ask", json=question, headers=member).json
    assert answer["status"] == "answered"
    assert made.json["id"] in {citation["document_id"] for citation in answer["citations"]}
    for citation in answer["citations"]:
        where = f"/api/v1/documents/{citation['document_id']}"
        text = client.get(where, headers=member).json["text"]
        assert text[citation["start"] : citation["end"]] == citation["quote"]


def test_what_a_file_is(client, member):
    """Its suffix says it, else its media type; what neither knows is 415."""
    page = b"<p>One"
    for name, media_type, title in (
        ("a.HTML", "application/octet-stream", "a"),
        ("b", "text/html", "b"),
        (r"C:\\docs\\c.htm", "text/html; charset=utf-8", "c"),
    ):
        made = upload(client, member, name, page, media_type)
        assert (made.json["title"], made.json["characters"]) == (
            title,
            3,
        ) or made.status_code == 200
    for name, media_type in (("a.html", "image/png"), ("a.png", "text/html"), ("a", "image/png")):
        assert upload(client, member, name, page, media_type).status_code == 415
    latin = upload(
        client, member, "d.html", "<p>Größe".encode("cp1252"), "text/html; charset=latin1"
    )
    where = latin.headers["Location"]
    assert client.get(where, headers=member).json["text"] == "Größe"


def test_refusals_are_422_that_say_why(client, member):
    """Never a 500: the entry names the file, the reason for machines and for people."""
    for data, code, text in (
        (b"%PDF-1.4 broken", "broken", "damaged"),
        (pdf([page()]), "no_text", "OCR"),
        (written("secret", "owner"), "encrypted", "password"),
    ):
        answer = upload(client, member, "a.pdf", data)
        assert answer.status_code == 422
        entry = answer.json["errors"][0]
        assert (entry["field"], entry["code"]) == ("file", code)
        assert text in entry["message"]


def test_sizes_are_413(environ, services, member):
    """A file that is too large, and a small one whose text is."""
    app = create_app(load_settings(environ | {"MUSET_MAX_DOCUMENT_BYTES": "4096"}))
    client = app.test_client()
    expected = too_large(4096).user_message
    for data in (pdf([BEES]) + bytes(4096), pdf([page("x" * 3000) * 3])):
        answer = upload(client, member, "a.pdf", data)
        assert (answer.status_code, answer.json["message"]) == (413, expected)
    app.extensions["muset"].database.close()
