"""Chat templates: what they render, what they refuse, and that none can hang or leave the sandbox."""

from __future__ import annotations

import time
from typing import Any

import pytest

from tessera.errors import ModelError, RequestError
from tessera.text.chat_template import ChatTemplate
from tessera.text.tokenizer import Tokenizer

MESSAGES: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}]


def render(source: str, messages: list[dict[str, Any]] | None = None, **tokens: str) -> str:
    return ChatTemplate(source).render(MESSAGES if messages is None else messages, tokens)


def test_smollm2_prompt_is_exactly_as_the_model_was_trained(smollm: Tokenizer) -> None:
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    body = (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\na\nb<|im_end|>\n"
    )
    assert smollm.render_chat(messages) == body + "<|im_start|>assistant\n"
    assert smollm.render_chat(messages, add_generation_prompt=False) == body
    assert smollm.encode(smollm.render_chat(messages), add_special_tokens=False)[:3] == [1, 9690, 198]


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("  {% if true %}\nx\n  {% endif %}\ny", "x\ny"),
        ("{{ bos_token }}{{ messages | tojson }}", '<s>[{"role": "user", "content": "Hi"}]'),
        ("{{ {'b': '<ü>'} | tojson(indent=1) }}", '{\n "b": "<ü>"\n}'),
        ("{% for m in messages %}{{ loop.index }}{{ loop.last }}{{ loop.length }}{% break %}{% endfor %}", "1True1"),
        ("{% set ns = namespace(n=1) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}", "2"),
        ("{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f('a' ~ messages[0].role) }}", "<auser>"),
        ("{% generation %}{{ messages[0]['content'] }}{% endgeneration %}", "Hi"),
        ("{{ messages | map(attribute='role') | join(',') }}{{ 'a b'.split(' ')[1] }}", "userb"),
        ("{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}", "role=user;content=Hi;"),
        ("{{ tools is none }}{{ nothing is defined }}{{ nothing }}{{ 7 * 6 }}{{ '%s!' % 'a' }}", "TrueFalse42a!"),
        ("{% for x in nothing %}{% else %}none{% endfor %}", "none"),
    ],
)
def test_templates_render_as_hugging_face_does(source: str, text: str) -> None:
    assert render(source, bos_token="<s>") == text


def test_date_is_todays() -> None:
    assert render("{{ strftime_now('%Y') }}") == time.strftime("%Y")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{{ raise_exception('Roles must alternate') }}", "refuses these messages: Roles must alternate"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ none.x.y }}", "has no attribute"),
    ],
)
def test_a_template_that_refuses_is_a_request_error_with_its_sentence(source: str, says: str) -> None:
    with pytest.raises(RequestError, match=says) as caught:
        render(source)
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='system') }}",
        "{{ raise_exception.__globals__['os'] }}",
        "{{ namespace.__init__.__globals__['os'] }}",
        "{% set ns = namespace(__class__=1) %}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ '{0.__class__.__mro__}'.format(1) }}",
        "{% include 'x' %}",
        "{{ lipsum() }}",
    ],
)
def test_the_sandbox_keeps_templates_away_from_python(source: str) -> None:
    with pytest.raises(RequestError):
        render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{% for x in range(10**9) %}{% endfor %}",
        "{% for x in range(100000) %}{% for y in range(100000) %}{% endfor %}{% endfor %}",
        "{% for x in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
        "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
        "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x=99) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
        "{{ 'a' * 10**9 }}",
        "{{ 10**9 * [1] }}",
        "{{ 99 ** 64 ** 64 }}",
        "{{ 'x'.ljust(10**10) }}",
        "{{ 'x' | center(10**10) }}",
        "{{ '%9999999999d' % 1 }}",
        "{{ '%*d' % (9999999999, 1) }}",
        "{{ '%9999999999d' | format(1) }}",
        "{{ '{:9999999999}'.format(1) }}",
        "{{ '{:{}}'.format(1, 9999999999) }}",
        "{% set x = 'a' * 1000000 %}{{ x.replace('a', x) }}",
        "{% set x = 'a' * 1000000 %}{{ x | replace('a', x) }}",
        "{% set x = ['a' * 1000000] * 1000 %}{{ x | join }}",
        "{% set x = ['a' * 1000000] * 1000 %}{{ ''.join(x) }}",
        "{% set x = 'a' * 1000000 %}{% set y %}{% for i in range(90000) %}{{ x }}{% endfor %}{% endset %}",
        "{% for i in range(190000) %}" + "a" * 100000 + "{% endfor %}",
    ],
)
def test_no_template_can_hang_or_fill_the_memory(source: str) -> None:
    start = time.monotonic()
    with pytest.raises(RequestError):
        render(source)
    assert time.monotonic() - start < 30  # all but the two recursions: milliseconds


def test_turns_of_all_loops_are_counted_together() -> None:
    with pytest.raises(RequestError, match="loop turns"):
        render("{% set r = range(150000) %}{% for x in r %}{% endfor %}{% for x in r %}{% endfor %}")


def test_a_budget_is_for_one_rendering() -> None:
    template = ChatTemplate("{% for i in range(50000) %}{% endfor %}x")
    assert [template.render(MESSAGES, {}) for _ in range(6)] == ["x"] * 6


@pytest.mark.parametrize(
    "source", ["{% if x %", "{{ x | no_such_filter }}", "{% for %}", "{{ " + "(" * 5000, "x" * 2**21]
)
def test_a_template_that_is_no_jinja_is_a_model_error_with_the_flag(source: str) -> None:
    with pytest.raises(ModelError) as caught:
        ChatTemplate(source, "template.jinja")
    assert "template.jinja" in caught.value.message
    assert caught.value.hint is not None and "--chat-template" in caught.value.hint


@pytest.mark.parametrize(
    ("messages", "says", "param"),
    [
        ([], "at least one message", "messages"),
        (["hi"], r"messages\[0\] must be an object with a role", "messages[0]"),
        ([{"content": "x"}], "with a role", "messages[0]"),
        ({"role": "user", "content": "x"}, "must be a list of messages", "messages"),
        (
            [{"role": "user", "content": "x"}, {"role": "wizard", "content": "x"}],
            r"messages\[1\].role must be one of system, developer, user, assistant, got 'wizard'",
            "messages[1].role",
        ),
        ([{"role": "user"}], r"messages\[0\] has no content", "messages[0].content"),
        ([{"role": "user", "content": None}], r"messages\[0\] has no content", "messages[0].content"),
        ([{"role": "user", "content": 3}], "must be a text", "messages[0].content"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            "'image_url'",
            "messages[0].content[0]",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], "must be", "messages[0].content[0]"),
        ([{"role": "user", "content": ["x"]}], "must be", "messages[0].content[0]"),
    ],
)
def test_messages_that_are_no_text_are_refused_by_name(messages: list[Any], says: str, param: str) -> None:
    with pytest.raises(RequestError, match=says) as caught:
        render("x", messages)
    assert caught.value.param == param


def test_a_developer_is_the_system() -> None:
    assert render("{{ messages[0].role }}", [{"role": "developer", "content": "x"}]) == "system"
