"""Pages that nest deeply are read in the time that flat ones take, with their text; the C++ finds what Python does."""

from __future__ import annotations

import time
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arriero.curate import depth
from arriero.curate.depth import flattened
from arriero.curate.web import main_text
from arriero.errors import DataError

SENTENCE = "The llama is a domesticated South American camelid, widely used as a meat and pack animal."
NESTS = {
    "divs": ("<div>", "</div>"),
    "articles": ("<article>", "</article>"),
    "divs that nothing ends": ("<div>", ""),
    "divs in upper case": ("<DIV ID=x>", "</DIV>"),
    "divs with stray ends": ("</b></p></i><div>", "</div>"),
    "divs in tables": ("<table><tr><td><div>", "</div></td></tr></table>"),
    "divs behind walls": ("<object><div></object>", ""),
    "letters": ("<b><i>", "</i></b>"),
    "fonts that nothing ends": ("<p><font>", ""),
    "lists": ("<ul><li>", "</li></ul>"),
}


@pytest.mark.parametrize("html", ["resiliparse", "trafilatura"])
@pytest.mark.parametrize("nest", NESTS)
def test_a_page_that_nests_deeply_is_read_in_bounded_time(nest, html):
    if html == "trafilatura" and nest not in ("divs", "articles", "letters", "lists"):
        pytest.skip("its own time grows with the square of other things too")
    begin, end = NESTS[nest]
    n = 16_000
    page = f"<html><body>{begin * n}<p>{SENTENCE}</p>{end * n}<p>{SENTENCE}</p></body></html>".encode()
    start = time.process_time()
    text = main_text(page, html, "a page")
    assert time.process_time() - start < 4  # half a second; without the limit 8, and four times that for twice as many
    if html == "resiliparse" or nest in ("divs", "articles"):
        assert SENTENCE in text


def test_letters_that_are_opened_again_in_each_paragraph_do_not_multiply():
    page = "".join(f"<b class=c{i}>" for i in range(16_000)) + f"<p>{SENTENCE}" * 997
    start = time.process_time()
    assert main_text(page.encode(), "resiliparse", "a page").count(SENTENCE) == 997
    assert time.process_time() - start < 4


@pytest.mark.parametrize(
    ("page", "flat"),
    [
        ("<a><b>x</b></a>", "<a><b>x</b></a>"),
        ("<a><b><i>x</i>y</b>z</a>", "<a><b><br>x<br>y</b>z</a>"),
        ("<a><b><p>x</p></b></a>", "<a><b><p>x</p></b></a>"),
        ("<a><b><i><p>x</p></i></b></a>", "<a><b><br>x<br></b></a>"),
        ("<a><b><i><u>x</u><u></i></b>z", "<a><b><br>x<br></b>z"),
        ("<a><b></b><i>x", "<a><b></b><i>x"),
        ("<div><p><p><li><td><br><img src=x>x", "<div><p><p><li><td><br><img src=x>x"),
        ("<A><B></b></A><a><b>", "<A><B></b></A><a><b>"),
        (
            "<!-- <a><b><i> --><a><script>'<b><i><u>'</script><b>",
            "<!-- <a><b><i> --><a><script>'<b><i><u>'</script><b>",
        ),
        ("<a><table></a><i>", "<a><table></a><br>"),  # the end of <a> does not reach out of the table
        ("<a title='<b>'>", "<a title='<b>'>"),
        ("a < b <c", "a < b <c"),
        ("<!-- <a><b><i>", "<!-- <a><b><i>"),
    ],
)
@pytest.mark.parametrize("twin", ["C++", "Python"])
def test_tags_that_are_deeper_become_line_breaks(page, flat, twin, monkeypatch):
    if twin == "Python":
        monkeypatch.setattr(depth, "load_library", lambda: None)
    assert flattened(page, 2) == flat


def test_a_tag_with_very_many_attributes_is_refused():
    tag = "<div " + " ".join(f"a{i}=1" for i in range(50_000)) + ">"
    with pytest.raises(DataError, match=r"^page 5: a tag has 50,000 attributes; 2,000 are too many; remove the page$"):
        main_text(tag.encode(), "resiliparse", "page 5")


def test_a_page_with_very_many_tags_is_refused():
    with pytest.raises(DataError, match=r"^page 5: it has 500,001 tags; 500,000 are too many; remove the page$"):
        main_text(b"<i>" * 500_001, "resiliparse", "page 5")


SOUP = """<a> <b> </b> </a> <i><u> </u> </div> </DIV> <p> <td> </td> <table> </table> <br/> <!-- --> <!---> <script>
<scripty> <title> </title <x/y> < <1> </ <é> <aé> <style <xmp_> > text"""
PIECES = [*SOUP.split(), "<div id=x>", "</script >", "\0", "<a\x0bb>"]


@settings(max_examples=500)
@given(st.lists(st.sampled_from([*PIECES, " ", "\n"])), st.integers(1, 5))
def test_the_compiled_look_finds_what_python_does(pieces, deepest):
    page = "".join(pieces)
    with patch.object(depth, "MOST_ATTRIBUTES", 2):
        found = outcome(page, deepest)
        with patch.object(depth, "load_library", lambda: None):
            assert outcome(page, deepest) == found


def outcome(page, deepest):
    try:
        return flattened(page, deepest)
    except DataError as error:
        return str(error)
