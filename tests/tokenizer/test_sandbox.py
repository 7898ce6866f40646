"""Templates that run away or reach for Python's objects are refused at once, in every thread; honest ones are not."""

from __future__ import annotations

import resource
import threading
import time

import pytest

from arriero.errors import CheckpointError, DataError, UserError
from arriero.tokenizer.template import ChatTemplate

TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
LOOP = "{% for i in range(99999) %}"

RUNAWAYS = {
    "nested loops": LOOP + "{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loops that filter": LOOP + "{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
    "a long range": "{% for i in range(10**9) %}{% endfor %}",
    "a wide text": "{{ 'x' * 10**9 }}",
    "a wide list": "{{ [1] * 10**9 }}",
    "doubling by ~": "{% set n = namespace(x='xy') %}" + LOOP + "{% set n.x = n.x ~ n.x %}{% endfor %}",
    "doubling by +": "{% set n = namespace(x='xy') %}" + LOOP + "{% set n.x = n.x + n.x %}{% endfor %}",
    "doubling lists": "{% set n = namespace(x=[1]) %}" + LOOP + "{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "doubling tuples": "{% set n = namespace(x=1) %}" + LOOP + "{% set n.x = (n.x, n.x) %}{% endfor %}{{ n.x == 1 }}",
    "doubling dicts": "{% set n = namespace(x=1) %}" + LOOP + "{% set n.x = {1: n.x, 2: n.x} %}{% endfor %}",
    "doubling dict()": "{% set n = namespace(x=1) %}" + LOOP + "{% set n.x = dict(a=n.x, b=n.x) %}{% endfor %}",
    "doubling arguments": "{% set n = namespace(x=1) %}{% macro f() %}{% set n.x = varargs %}{% endmacro %}"
    + LOOP
    + "{{ f(n.x, n.x) }}{% endfor %}{{ n.x }}",
    "filling rows": "{% set n = namespace(x=1) %}{% for i in range(9) %}{% for b in [1] | batch(999, n.x) %}"
    "{% set n.x = b %}{% endfor %}{% endfor %}{{ n.x }}",
    "grouping": "{% set n = namespace(x=[[1]]) %}" + LOOP + "{% set n.x = [n.x | groupby(0)] %}{% endfor %}{{ n.x }}",
    "output": LOOP + "{{ 'x' * 999 }}" + LOOP + "{{ messages }}{% endfor %}{% endfor %}",
    "output in a macro": "{% macro f() %}" + LOOP + "{{ messages }}" * 99 + "{% endfor %}{% endmacro %}{{ f() }}",
    "a block": "{% set x %}" + LOOP + "{{ 'x' * 999 }}{% endfor %}{% endset %}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "squaring": "{% set n = namespace(x=3) %}" + LOOP + "{% set n.x = n.x * n.x %}{% endfor %}",
    "rounding": "{{ 5 | round(-10 ** 9) }}",
    "rounding up": "{{ 5 | round(10 ** 9, 'ceil') }}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "percent by an argument": "{{ '%*d' % (10 ** 9, 1) }}",
    "the format filter": "{{ '%1000000000d' | format(1) }}",
    "str.format": "{{ '{:1000000000}'.format(1) }}",
    "str.format by an argument": "{{ '{:{}}'.format(1, 10 ** 9) }}",
    "center": "{{ 'x'.center(10 ** 9) }}",
    "the center filter": "{{ 'x' | center(10 ** 9) }}",
    "zfill": "{{ 'x'.zfill(10 ** 9) }}",
    "tabs": "{{ '\t'.expandtabs(10 ** 9) }}",
    "replacing": "{{ ('x' * 9999).replace('x', 'y' * 9999) }}",
    "replacing nothing": "{{ ('x' * 9999) | replace('', 'y' * 9999) }}",
    "joining": "{{ ('x' * 9999).join('y' * 9999) }}",
    "the join filter": "{{ range(99999) | map(attribute='no', default='x' * 9999) | join }}",
    "mapping": "{{ range(99999) | map('center', 999) | list | length }}" * 9,
    "indenting": "{{ ('\n' * 99999) | indent(999, true, true) }}",
    "JSON": "{{ [[[[1]]]] | tojson(indent=10 ** 9) }}",
    "JSON's separators": "{{ range(9999) | list | tojson(separators=['x' * 99999, 'y']) }}",
    "batches": "{{ [1] | batch(10 ** 9, 0) | list }}",
    "slices": "{{ [1] | slice(10 ** 9) | list | length }}",
    "sums of lists": "{{ range(99999) | map('string') | map('list') | sum(start=[]) | length }}" * 3,
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "branching recursion": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}",
    "recursive loops": "{% for x in [messages] recursive %}{{ loop([x, x]) }}{% endfor %}",
    "searching": LOOP + "{% if 'z' in 'x' * 3999999 %}{% endif %}{% endfor %}",
    "tests": "{% set x = range(99999) | list %}{{ range(99999) | select('in', x | map('string') | list) | list }}",
    "dates": "{{ strftime_now('%Y' * 9999) }}",
    "splitting": "{{ ('x ' * 4999999).split() | length }}",
    "nesting": "{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}",
    "nesting lists": "{{ " + "[" * 999 + "]" * 999 + " }}",
    "nesting loops": "{% for x in x %}" * 99 + "{% endfor %}" * 99,
    "length": "{{ 1 }}" * 99999,
    "a long number": "{{ " + "1" * 9999 + " }}",
    "no such filter": "{{ 'x' | wordwrap(1) }}",
    "no such helper": "{{ lipsum() }}",
}


@pytest.mark.parametrize("name", RUNAWAYS)
def test_a_template_without_bounds_is_refused_within_a_second_or_so(name):
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.thread_time()
    with pytest.raises(UserError):
        ChatTemplate(RUNAWAYS[name]).render(TALK)
    assert time.thread_time() - began < 2.5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 * 1024  # KiB


def test_the_refusal_says_what_and_gives_the_remedy():
    with pytest.raises(
        CheckpointError, match=r"not used: it makes more than 4,194,304 characters; give another: --chat-"
    ):
        ChatTemplate("{{ 'x' * 10 ** 9 }}").render(TALK)
    with pytest.raises(
        CheckpointError, match="not used: it runs for more than 1 s; give another: --chat-template with one"
    ):
        ChatTemplate(RUNAWAYS["nested loops"]).render(TALK)
    with pytest.raises(CheckpointError, match="not used: it has 699,993 characters; more than 100,000 are not read"):
        ChatTemplate("{{ 1 }}" * 99999)


ESCAPES = [
    "cycler.__init__.__globals__",
    "cycler.mro()",
    "joiner.__class__",
    "namespace.__init__",
    "range.__self__",
    "dict.mro()",
    "dict.fromkeys([1])",
    "raise_exception.__globals__",
    "strftime_now['__globals__']",
    "''.__class__.__mro__",
    "''['__class__']",
    "'' | attr('__class__') | string",
    "['a'] | map(attribute='__class__') | list",
    "[''] | map('attr', '__class__') | join",
    "'{0.__class__}'.format('')",
    "'{0.__class__.__mro__}'.format('')",
    "'{a[__class__]}'.format(a='')",
    "'{m.__self__}'.format(m=''.join)",
    "('{0.__class__}' | safe).format('')",
    "'{0.__class__}'.format_map({'0': ''})",
    "''.join.__self__.__class__",
    "''.format.__globals__",
    "''.maketrans('a', 'b')",
    "''.encode().decode()",
    "(1).to_bytes(10 ** 9, 'big')",
    "(1.5).fromhex('1')",
    "self.__init__",
    "self._TemplateReference__context",
    "loop_.__class__",
    "messages.append(1)",
    "messages.clear()",
    "messages[0].update({})",
    "messages[0].pop('role')",
    "namespace(__class__=1)",
    "namespace(_x=1)",
    "raise_exception.__code__",
    "(messages | map('upper')).gi_frame",
    "m.__call__",
    "m._environment",
    "caller",
    "get_flashed_messages()",
]


@pytest.mark.parametrize("expression", ESCAPES)
def test_pythons_objects_are_out_of_reach(expression):
    text = None
    try:
        text = ChatTemplate("{% macro m() %}{% endmacro %}{{ " + expression + " }}").render(TALK)
    except DataError:
        return
    assert "class" not in text and "object" not in text and "function" not in text, text
    assert text in ("", "None", "[Undefined]")  # an undefined name writes nothing


@pytest.mark.parametrize("include", ["{% include '/etc/passwd' %}", "{% import 'os' as os %}", "{% extends 'x' %}"])
def test_no_other_file_is_read(include):
    with pytest.raises(DataError, match="refuses this conversation: no loader"):
        ChatTemplate(include).render(TALK)


def test_each_thread_has_its_own_budget():
    honest, runaway = (
        ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}"),
        ChatTemplate(RUNAWAYS["output"]),
    )
    found: list[str] = []

    def work(template):
        try:
            found.extend(template.render(TALK) for _ in range(97))
        except CheckpointError:
            found.append("refused")

    threads = [threading.Thread(target=work, args=[template]) for template in (honest, runaway, honest, runaway)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == ["HiYo"] * 2 * 97 + ["refused"] * 2


def test_a_long_conversation_has_a_long_allowance():
    source = "{% set n = namespace(x='') %}{% for m in messages %}{% set n.x = n.x ~ m.content %}{% endfor %}{{ n.x }}"
    talk = [{"role": "user", "content": "x" * 997}] * 499
    assert ChatTemplate(source).render(talk) == "x" * 997 * 499
    assert (
        len(ChatTemplate("{{ messages[0].content }}").render([{"role": "user", "content": "x" * 20_000_003}]))
        == 20_000_003
    )


def test_what_honest_templates_do_is_as_in_jinja():
    import jinja2

    source = """{%- set n = namespace(x=1, y=[]) %}{% for m in messages if m.role %}{% set n.y = n.y + [m.content] %}
    {%- set n.x = n.x + loop.index * 2 ** 3 % 5 %}{{ loop.last }}{{ loop.nextitem is defined }}{% endfor %}
    {{- n.y | join(', ') ~ n.x ~ [1, 'a', {'b': (1, 2)}] }}{{ 'a%sb' % 1 }}{{ '{:>5}|{b}'.format('x', b=2) }}
    {{- ['b', 'a'] | sort | join }}{{ [1, 2] | sum }}{{ [{'a': 1}] | sum(attribute='a') }}
    {{- 'ab'.replace('a', 'cc') }}
    {{- 'a b'.split() }}{{ '-'.join(['x', 'y']) }}{{ ('<' | safe) + '>' }}{{ '<' | e }}{{ messages | length }}
    {{- messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list }}{{ 3.14 | round(1) }}
    {{- 'a\nb' | indent(2, true) }}{{ [1, 2, 3] | batch(2, 0) | list }}{{ 'x' | center(5) }}{{ dict(a=1) }}
    {{- {'b': 1, 'a': 2} | dictsort }}{{ messages | groupby('role') | length }}{{ cycler('a', 'b').next() }}
    {{- 'x' * 3 ~ [0] * 2 }}{{ messages[0].items() | list }}{% macro f(a, b=2) %}{{ a ~ b }}{{ caller() }}
    {%- endmacro %}{% call f(1) %}in{% endcall %}{{ none }}{{ missing is defined }}{{ '7' | int + 1 }}{{ (1, ) }}"""
    reference = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(source)
    assert ChatTemplate(source).render(TALK) == reference.render(messages=TALK)
