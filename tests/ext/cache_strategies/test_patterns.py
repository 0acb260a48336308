r"""Patterns of keys: what they match, here and in a real Redis."""

import time
from fnmatch import fnmatchcase
from itertools import product

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from flask_muset.cache_strategies.patterns import (
    compile_pattern,
    covers,
    escape_glob,
    literal,
    overlap,
    redis_glob,
)
from flask_muset.redis import GuardedRedis

# What globs, regular expressions and byte-wise matching are likely to get wrong.
NASTY = st.text(
    st.sampled_from("ab*?[]\\^-!{}.$|()+ \n\r\t\0\x7f\x85\u2028é\u0301İß日😀"), max_size=8
)
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | NASTY
# Few letters, so that pieces overlap and repeat.
FEW = st.text(st.sampled_from("ab*"), max_size=9)


def plain(pattern, key):
    """The meaning of a pattern, written the slow way: try every length for each asterisk."""
    if not pattern:
        return not key
    if pattern[0] == "*":
        return any(plain(pattern[1:], key[at:]) for at in range(len(key) + 1))
    here, rest = pattern[0], pattern[1:]
    if pattern[:2] in ("\\*", "\\\\"):
        here, rest = pattern[1], pattern[2:]
    return key[:1] == here and plain(rest, key[1:])


@pytest.mark.parametrize(
    ("pattern", "matching", "other"),
    [
        ("user:*", ["user:", "user:42", "user:a\nb", "user:*"], ["user", "xuser:1", "USER:1"]),
        ("*:done", [":done", "a:done", "a\n:done"], ["a:done ", "done"]),
        ("*", ["", "a", "\n", "a*b"], []),
        ("a*b*c", ["abc", "a-b-c", "abbcc", "abcbc"], ["ab", "acb", "abcd"]),
        ("aa*aa", ["aaaa", "aabaa"], ["aa", "aaa"]),
        ("a**b", ["ab", "axb"], ["a", "b"]),
        ("plain", ["plain"], ["plain ", "Plain", ""]),
        ("", [""], ["a"]),
        (r"a\*b", ["a*b"], ["axb", r"a\*b"]),
        (r"a\\*", ["a\\", "a\\b"], ["a", "a*"]),
        (r"a\n", [r"a\n"], ["a\n", "an"]),
        ("end\\", ["end\\"], ["end"]),
        ("[ab]?", ["[ab]?"], ["a1", "b1"]),
    ],
)
def test_what_a_pattern_matches(pattern, matching, other):
    """An asterisk is any text, the two escapes are what they say, all else is itself."""
    matches = compile_pattern(pattern)
    assert [key for key in matching if not matches(key)] == []
    assert [key for key in other if matches(key)] == []


@settings(deadline=None)
@given(FEW | NASTY, FEW | NASTY)
def test_the_quick_way_agrees_with_the_plain_one(pattern, key):
    """Looking for each piece once, from the left, finds every match and no other."""
    assert compile_pattern(pattern)(key) is plain(pattern, key)


@settings(deadline=None)
@given(st.text(st.sampled_from("ab*\n"), max_size=9), st.text("ab\n", max_size=9))
def test_agrees_with_the_globs_of_python(pattern, key):
    """An independent matcher agrees on what both languages have."""
    assert compile_pattern(pattern)(key) is fnmatchcase(key, pattern)


@settings(deadline=None)
@given(ANY_TEXT, ANY_TEXT)
def test_a_literal_matches_its_text_alone(text, other):
    """Whatever is in a text, its literal pattern matches it and nothing else."""
    matches = compile_pattern(literal(text))
    assert matches(text)
    assert matches(other) is (other == text)


@settings(deadline=None)
@given(ANY_TEXT, ANY_TEXT)
def test_a_literal_may_stand_before_an_asterisk(text, rest):
    """A text that ends in a backslash does not turn the asterisk behind it into a literal one."""
    assert compile_pattern(literal(text) + "*")(text + rest)


def test_no_pattern_takes_long():
    """Forty asterisks against a long key that nearly matches take a moment, not years."""
    matches = compile_pattern("*a" * 40 + "*b")
    began = time.perf_counter()
    assert not matches("a" * 100_000)
    assert not matches("a" * 39 + "b" * 100_000)
    assert time.perf_counter() - began < 30


@pytest.mark.parametrize(
    ("pattern", "error", "said"),
    [(b"user:*", TypeError, "bytes"), (None, TypeError, "NoneType"), ("a\ud800", ValueError, "1")],
)
def test_what_is_no_pattern_is_refused(pattern, error, said):
    """Bytes, None and halves of surrogate pairs are errors that say so, for both forms."""
    for make in (compile_pattern, redis_glob):
        with pytest.raises(error, match=said):
            make(pattern)


class Keyspace:
    """Keys of a real Redis, and what MATCH finds among them."""

    def __init__(self, client):
        self.client = client

    def found(self, glob, keys):
        """Those of the keys that SCAN gives."""
        for key in keys:
            self.client.execute("SET", key.encode(), "")
        cursor, seen = b"0", set()
        while True:
            cursor, some = self.client.execute("SCAN", cursor, "MATCH", glob, "COUNT", 1000)
            seen.update(key.decode() for key in some)
            if cursor == b"0":
                break
        for key in keys:
            self.client.execute("DEL", key.encode())
        return seen


@pytest.fixture
def keyspace(redis_server):
    """An empty Redis."""
    client = GuardedRedis(redis_server.url, budget_s=5.0)
    yield Keyspace(client)
    client.close()


WITH_A_SERVER = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@WITH_A_SERVER
@given(pattern=FEW | NASTY, keys=st.sets(FEW | NASTY, max_size=5))
@example(pattern="[a-b]*", keys={"[a-b]", "a", "-"})
@example(pattern="[^a]", keys={"[^a]", "b"})
@example(pattern="?\\", keys={"?\\", "a\\", "?"})
def test_redis_agrees(keyspace, pattern, keys):
    """SCAN ... MATCH of a real Redis finds exactly the keys that match in this process."""
    # The pattern itself and a near miss, so that something is there to be found.
    keys |= {pattern, pattern.replace("*", "a\n"), pattern + "b"}
    matches = compile_pattern(pattern)
    assert keyspace.found(redis_glob(pattern), keys) == {key for key in keys if matches(key)}


@WITH_A_SERVER
@given(namespace=NASTY, pattern=NASTY, key=NASTY)
def test_redis_agrees_behind_a_namespace(keyspace, namespace, pattern, key):
    """An escaped namespace stands for itself, and the pattern behind it keeps its meaning."""
    keys = {namespace + key, namespace + pattern, "x" + namespace + key, key}
    matches = compile_pattern(literal(namespace) + pattern)
    glob = escape_glob(namespace) + redis_glob(pattern)
    assert keyspace.found(glob, keys) == {key for key in keys if matches(key)}


# --- Two patterns

KEYS = ["".join(letters) for size in range(7) for letters in product("ab", repeat=size)]


@settings(deadline=None)
@given(st.text(st.sampled_from("ab*"), max_size=4), st.text(st.sampled_from("ab*"), max_size=4))
@example("a*b", "*")
@example("ab*", "a*b")
def test_two_patterns_against_all_short_keys(one, other):
    """Whether a key matches both is known exactly; that all of the one match is never wrong."""
    ours, theirs = filter(compile_pattern(one), KEYS), set(filter(compile_pattern(other), KEYS))
    matching = set(ours)
    assert overlap(one, other) is overlap(other, one) is bool(matching & theirs)
    if covers(one, other):
        assert matching >= theirs


@pytest.mark.parametrize(
    ("one", "other", "is_covered"),
    [
        ("user:*", "user:1", True),
        ("user:*", "user:*", True),
        ("user:*", "user:1*:x", True),
        ("*", "", True),
        ("a*b*c", "a*c", False),
        ("user:*", "user*", False),
        (r"a\**", r"a\*b", True),
        (r"a\*", "a*", False),
    ],
)
def test_what_a_pattern_covers(one, other, is_covered):
    """A narrower pattern, or the same one, and each key that matches."""
    assert covers(one, other) is is_covered
