"""Chat templates that run on, or grow: one sentence, soon."""

from __future__ import annotations

import time

import pytest

from ivc_export.errors import UserError
from ivc_export.text import bounded_template
from ivc_export.text.template import ChatTemplate

NESTED = "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}"
FIBONACCI = "{% macro f(n) %}{% if n > 1 %}{{ f(n - 1) }}{{ f(n - 2) }}{% endif %}{% endmacro %}{{ f(60) }}"
DOUBLED = "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = DOUBLE %}{% endfor %}"


@pytest.mark.parametrize(
    ("source", "told"),
    [
        (NESTED, "takes longer than"),
        (FIBONACCI, "takes longer than"),
        ("{% for a in range(100000) %}{{ 'a' * 1000 }}{% endfor %}", "characters"),
        ("{{ 'a' * 10000000000 }}", "characters"),
        ("{{ [1] * 10000000000 }}", "characters"),
        ("{{ 10 ** 10000000000 }}", "uses the exponent 10000000000"),
        ("{{ '%999999999999d' % 1 }}", "and the limit is 100,000"),
        ("{{ '%*d' % (999999999999, 1) }}", "and the limit is 100,000"),
        ("{{ 'a' | center(99999999999) }}", "and the limit is 100,000"),
        ("{{ 'a'.ljust(99999999999) }}", "and the limit is 100,000"),
        ("{{ [1] | tojson(indent=99999999999) }}", "and the limit is 100,000"),
        (DOUBLED.replace("DOUBLE", "[n.x, n.x]") + "{{ n.x }}", "characters"),
        (DOUBLED.replace("DOUBLE", "(n.x, n.x)") + "{{ n.x | tojson }}", "characters"),
        (DOUBLED.replace("DOUBLE", "{1: n.x, 2: n.x}") + "{{ n.x | tojson }}", "characters"),
        (DOUBLED.replace("DOUBLE", "dict(a=n.x, b=n.x)") + "{{ n.x | tojson }}", "characters"),
        (DOUBLED.replace("{% set n.x = DOUBLE %}", "{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}"), "characters"),
        ("{{ range(1000000000) | list }}", "Range too big"),
        ("{{ lipsum(n=1000000) }}", "lipsum"),
        (DOUBLED.replace("DOUBLE", "n.x ~ n.x"), "characters"),
        (DOUBLED.replace("DOUBLE", "n.x + n.x"), "characters"),
        (DOUBLED.replace("DOUBLE", "n.x | replace('a', n.x)"), "characters"),
        (DOUBLED.replace("DOUBLE", "n.x.replace('a', n.x)"), "characters"),
        (DOUBLED.replace("DOUBLE", "[n.x, n.x] | join"), "characters"),
        ("{% set x = messages.append(1) %}", "is unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{% include 'other' %}", "no loader"),
    ],
)
def test_a_template_that_runs_on_is_stopped(source: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_template, "MOST_SECONDS", 0.2)
    start = time.monotonic()
    with pytest.raises(UserError, match=f"cannot render.*{told}"):
        ChatTemplate(source, {}, "the template", "mend it").render([])
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("source", ["x" * ((1 << 20) + 1), "{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}", "{% for %}"])
def test_a_template_that_cannot_be_parsed_is_told(source: str) -> None:
    with pytest.raises(UserError, match=r"the template is damaged .*: mend it"):
        ChatTemplate(source, {}, "the template", "mend it")


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ 'a' ~ 1 ~ none ~ 'b' }}", "a1Noneb"),
        ("{{ ('a' ~ 'b') | upper ~ 'c' }}", "ABc"),
        ("{{ 2 ** 10 }} {{ 7 % 4 }} {{ 2 * 3 }} {{ 'a' * 3 }} {{ [1] + [2] }}", "1024 3 6 aaa [1, 2]"),
        ("{% set a, b = (1, 2) %}{{ '%s:%d' % (a, b) }}{% set x | upper %}{{ b }}c{% endset %}{{ x }}", "1:22C"),
        ("{% for a, b in {1: 2}.items() %}{{ a in [1, 2] }}{{ [b][0] }}{% endfor %}", "True2"),
        ("{% for a in range(3) if a != 1 %}{{ loop.index }}{{ a }}{% else %}none{% endfor %}", "1022"),
        ("{% macro f(a, b='x') %}{{ a }}{{ b }}{{ caller is defined }}{% endmacro %}{{ f(1) }}", "1xFalse"),
        ("{% for a in [1, [2]] recursive %}{{ loop(a) if a is iterable else a }}{% endfor %}", "12"),
        ("{{ messages | map(attribute='role') | join(',') }} {{ messages[0] | tojson }}", 'user {"role": "user"}'),
        ("{% for i in range(5) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}", "012"),
    ],
)  # fmt: skip
def test_what_templates_do_stays_as_it_was(source: str, text: str) -> None:
    assert ChatTemplate(source, {}, "", "").render([{"role": "user"}]) == text
