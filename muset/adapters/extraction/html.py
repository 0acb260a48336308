"""The visible text of an HTML page."""

import codecs
import re

from selectolax.lexbor import LexborHTMLParser, LexborNode

__all__ = ["html_text"]

_MAX_TITLE = 200
_BOMS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
_META = re.compile(rb"<meta[^>]{0,200}?charset\s*=\s*[\"']?\s*([\w.:-]{1,40})", re.IGNORECASE)
#: What browsers know; Python has codecs beside these that are no charsets of pages.
_CHARSETS = re.compile(
    r"utf-?8|utf-?16(le|be)?|(us-)?ascii|latin-?1|iso-?8859-?\d{1,2}|windows-?12?5\d|cp125\d|"
    r"koi8-[ru]|gbk|gb2312|gb18030|big5(-hkscs)?|euc-(jp|kr)|shift[_-]jis|iso-2022-jp|"
    r"windows-(874|31j)|macintosh",
    re.IGNORECASE,
)
#: What browsers take these for.
_MEANT = {"ascii": "cp1252", "iso8859-1": "cp1252", "utf-16": "utf-16-le"}

#: Elements without text for readers.
_DROPPED = frozenset(
    """script style noscript template svg math iframe object embed canvas audio video map select
    datalist button textarea input dialog nav head title menu""".split()  # noqa: SIM905
)
#: The page's, not the text's, unless they stand inside of the text.
_FRAME = frozenset({"aside", "footer"})
_CONTENT = frozenset({"article", "main"})
#: An empty line stands around these, a break around the others.
_PARAGRAPHS = frozenset(
    """p h1 h2 h3 h4 h5 h6 ul ol dl table pre blockquote figure hr section article main header
    footer aside address fieldset details""".split()  # noqa: SIM905
)
_LINES = frozenset(
    "div li dt dd tr caption figcaption summary legend form body center".split()  # noqa: SIM905
)
_INVISIBLE = re.compile(r"display:none|visibility:hidden")
_SPACE = re.compile(r"[ \t\n\r\f\xa0]+")
#: Soft hyphens and marks of no width: they would part words that are one for readers.
_MARKS = re.compile("[\xad\u200b\u2060\ufeff]")


def html_text(data: bytes, charset: str | None) -> tuple[str, str]:
    """Text and title.

    Headings, paragraphs, list items and rows stand on lines of their own, the cells of a row are
    parted by tabs. Scripts, styles, forms' fields, navigation, the page's footer and what is hidden
    are left out.

    Args:
        data: The page.
        charset: What its sender says; a byte order mark wins, then this, then the page's own word,
            then UTF-8 where it fits, else Windows-1252.
    """
    tree = LexborHTMLParser(_decoded(data, charset))
    title = tree.css_first("head > title")
    heading = "" if title is None else _SPACE.sub(" ", _MARKS.sub("", title.text())).strip()
    return _visible(tree.root), heading[:_MAX_TITLE]


def _codec(label: str) -> str | None:
    """Python's name of a charset, None for what is none of a page."""
    if not _CHARSETS.fullmatch(label):
        return None
    try:
        name = codecs.lookup(label).name
    except LookupError:
        return None
    return _MEANT.get(name, name)


def _decoded(data: bytes, charset: str | None) -> str:
    for mark, name in _BOMS.items():
        if data.startswith(mark):
            return data[len(mark) :].decode(name, "replace")
    named = _META.search(data[:1024])
    # A page that could be read so far is not in UTF-16, whatever it says.
    own = _codec(named[1].decode("ascii", "replace")) if named else None
    own = "utf-8" if own and own.startswith("utf-16") else own
    codec = _codec(charset or "") or own
    if codec is not None:
        return data.decode(codec, "replace")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("cp1252", "replace")


#: What may stand between two words, by how much it parts them.
_NOTHING, _BLANK, _CELL, _LINE, _PARAGRAPH = range(5)
_BETWEEN = ("", " ", "\t", "\n", "\n\n")


class _Lines:
    """Text that grows by words and breaks."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._between = _NOTHING

    def part(self, between: int) -> None:
        """Part what comes from what was there; of several, what parts most counts."""
        if between > self._between and self._parts:
            self._between = between

    def br(self) -> None:
        """Break the line; the second one in a row leaves a line empty."""
        self.part(_LINE if self._between < _LINE else _PARAGRAPH)

    def add(self, text: str) -> None:
        """Add text whose runs of white space are a space each."""
        text = _SPACE.sub(" ", text)
        words = text.strip(" ")
        if text[:1] == " ":
            self.part(_BLANK)
        if words:
            self.add_literally(words)
            if text[-1] == " ":
                self._between = _BLANK

    def add_literally(self, text: str) -> None:
        """Add text as it is."""
        if self._between:
            if self._between >= _LINE:
                self._parts[-1] = self._parts[-1].rstrip()
            self._parts.append(_BETWEEN[self._between])
            self._between = _NOTHING
        self._parts.append(text)

    def text(self) -> str:
        """All of it."""
        return "".join(self._parts).strip()


def _visible(root: LexborNode | None) -> str:
    """Walk the tree without recursion: pages may be nested as deep as they like."""
    lines = _Lines()
    content = literal = 0
    stack: list[tuple[LexborNode, bool]] = [] if root is None else [(root, False)]
    while stack:
        node, is_end = stack.pop()
        tag = node.tag or ""
        if tag == "-text":
            text = _MARKS.sub("", node.text_content or "")
            lines.add_literally(text) if literal else lines.add(text)
            continue
        if not is_end and _is_dropped(node, tag, is_content=content > 0):
            continue
        step = -1 if is_end else 1
        content += step * (tag in _CONTENT)
        literal += step * (tag == "pre")
        _break(lines, tag, is_end=is_end)
        if not is_end:
            stack.append((node, True))
            _push_children(stack, node)
    return lines.text()


def _is_dropped(node: LexborNode, tag: str, *, is_content: bool) -> bool:
    if tag in _DROPPED or (tag in _FRAME and not is_content):
        return True
    if tag.startswith("-"):
        return tag != "-document"
    attributes = node.attributes
    if not attributes:
        return False
    style = "".join((attributes.get("style") or "").lower().split())
    is_hidden = "hidden" in attributes or attributes.get("aria-hidden") == "true"
    return is_hidden or _INVISIBLE.search(style) is not None


def _break(lines: _Lines, tag: str, *, is_end: bool) -> None:
    if tag in _PARAGRAPHS:
        lines.part(_PARAGRAPH)
    elif tag in _LINES:
        lines.part(_LINE)
    elif tag in ("td", "th") and is_end:
        lines.part(_CELL)
    elif tag == "br" and not is_end:
        lines.br()


def _push_children(stack: list[tuple[LexborNode, bool]], node: LexborNode) -> None:
    child = node.last_child
    while child is not None:
        stack.append((child, False))
        child = child.prev
