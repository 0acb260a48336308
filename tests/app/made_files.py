"""PDF files by hand: small, and broken in the ways that a test needs."""

import zlib


def pdf(contents, *, filters=1, data=None, encrypt=None):
    """A PDF with one page for each content stream.

    Args:
        contents: The streams, before they are compressed.
        filters: How often each is compressed.
        data: Streams that are compressed already, instead.
        encrypt: The dictionary that says how it is encrypted.
    """
    streams = list(data or [])
    for content in contents:
        for _ in range(filters):
            content = zlib.compress(content, 9)
        streams.append(content)
    objects = [b"<< /Type /Catalog /Pages 2 0 R >>"]
    kids = b" ".join(b"%d 0 R" % (4 + 2 * n) for n in range(len(streams)))
    objects.append(b"<< /Type /Pages /Kids [%s] /Count %d >>" % (kids, len(streams)))
    objects.append(b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>")
    names = b" ".join([b"/FlateDecode"] * filters)
    for n, stream in enumerate(streams):
        objects.append(
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents %d 0 R "
            b"/Resources << /Font << /F1 3 0 R >> >> >>" % (5 + 2 * n)
        )
        head = b"<< /Length %d /Filter [%s] >>" % (len(stream), names)
        objects.append(head + b"\nstream\n" + stream + b"\nendstream")
    if encrypt is None:
        return _file(objects)
    return _file([*objects, encrypt], b"/Encrypt %d 0 R" % (len(objects) + 1))


def _file(objects, trailer=b""):
    out, offsets = bytearray(b"%PDF-1.4\n"), []
    for number, body in enumerate(objects, 1):
        offsets.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    start = len(out)
    out += b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    out += b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    out += b"trailer << /Size %d /Root 1 0 R %s >>\n" % (len(objects) + 1, trailer)
    return bytes(out + b"startxref\n%d\n%%%%EOF\n" % start)


def page(*lines):
    """A content stream that shows lines of text."""
    shown = b"".join(b"(%s) Tj 0 -14 Td " % line.encode("latin-1") for line in lines)
    return b"BT /F1 12 Tf 72 720 Td " + shown + b"ET"
