"""What may be saved as a prompt, and how a prompt becomes messages."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from starlette_aigateway.accounts import StoredPrompt
from starlette_aigateway.errors import InvalidArgument, InvalidRequest, UnprocessableRequest
from starlette_aigateway.policy import prompts, templates


def prompt(*contents: Any) -> StoredPrompt:
    messages = [{"role": "user", "content": content} for content in contents]
    return StoredPrompt(name="greeting", version=1, messages=messages, created_at=datetime(2026, 1, 31, tzinfo=UTC))


def rendered(*contents: Any, **variables: Any) -> Sequence[Any]:
    return [message["content"] for message in prompts.render(prompt(*contents), variables)]


def refused(content: str, **variables: Any) -> UnprocessableRequest:
    with pytest.raises(UnprocessableRequest) as caught:
        rendered(content, **variables)
    return caught.value


# Rendering


def test_texts_and_text_parts_are_rendered_and_all_else_stays() -> None:
    stored = StoredPrompt(
        name="faq",
        version=3,
        messages=[
            {"role": "system", "content": "You help {{ company }}."},
            {
                "role": "user",
                "name": "{{ company }}",
                "content": [{"type": "text", "text": "{{ q }}", "cache_control": {"type": "ephemeral"}}],
            },
            {"role": "assistant", "content": "No tags here."},
        ],
        created_at=datetime(2026, 1, 31, tzinfo=UTC),
    )
    assert prompts.Renderer().render(stored, {"company": "ACME", "q": "Why?"}) == (
        {"role": "system", "content": "You help ACME."},
        {"role": "user", "name": "{{ company }}", "content": [{"type": "text", "text": "Why?", "cache_control": {"type": "ephemeral"}}]},
        {"role": "assistant", "content": "No tags here."},
    )
    assert stored.messages[0]["content"] == "You help {{ company }}."


def test_text_is_not_html_and_keeps_its_newlines() -> None:
    assert rendered("<{{ a }}>\n{{ b|tojson }}\n", a="<&'\">", b={"x": "<ü>"}) == ['<<&\'">>\n{"x":"<ü>"}\n']


@given(st.text(alphabet=st.sampled_from("{}%#x \n'\"|")))
def test_a_value_is_never_rendered_itself(value: str) -> None:
    assert rendered("[{{ x }}]", x=value) == [f"[{value}]"]
    assert rendered("{% for x in items %}{{ x }}{% endfor %}", items=[value, "{{ x }}", "{% raw %}"]) == [value + "{{ x }}{% raw %}"]


def test_loops_conditions_and_defaults_work() -> None:
    template = "{% for item in items %}{{ loop.index }}. {{ item.name|upper }}\n{% endfor %}{{ tone|default('kind') }}"
    assert rendered(template, items=[{"name": "a"}, {"name": "b"}]) == ["1. A\n2. B\nkind"]
    assert rendered("{% if name is defined %}{{ name }}{% endif %}!") == ["!"]
    assert rendered("{{ items|default([])|join(',') }}") == [""]


def test_variables_that_no_template_reads_are_ignored() -> None:
    assert rendered("plain", other=1) == ["plain"]
    assert rendered("{{ name }}{{ source }}", name="x", source="y", other=1) == ["xy"]


def test_a_variable_that_templates_cannot_have_is_refused() -> None:
    with pytest.raises(InvalidArgument) as caught:
        rendered("{{ x }}", x=1, self=2)
    assert caught.value.param == "prompt.variables.self"


@pytest.mark.parametrize(
    "template",
    [
        "Hi {{ who }}",
        "{{ who.name }}",
        "{% if who %}x{% endif %}",
        "{% for x in who %}{{ x }}{% endfor %}",
        "{{ who|length }}",
        "{{ who + 1 }}",
        "{{ who ~ 'x' }}",
        *(f"{{{{ who|{name} }}}}" for name in templates.FILTERS),
        "{{ who|join(', ') }}",
        "{% for x in who|sort %}{{ x }}{% endfor %}",
    ],
)
def test_a_missing_variable_is_named_with_its_prompt(template: str) -> None:
    error = refused(template, other=1)
    assert error.code == "missing_variable"
    assert error.param in ("prompt.variables.who", "prompt.variables.who.name")
    assert "'greeting'" in error.message
    assert "who" in error.message


def test_a_missing_field_of_a_variable_is_named() -> None:
    error = refused("{{ user.name }}", user={})
    assert (error.code, error.param) == ("missing_variable", "prompt.variables.user.name")
    error = refused("{% for x in items %}{{ x.name }}{% endfor %}", items=[{}])
    assert (error.code, error.param) == ("missing_variable", "prompt.variables")


@pytest.mark.parametrize(
    "template",
    [
        "{% for x in range(10000) %}{% for y in range(10000) %}a{% endfor %}{% endfor %}",
        "{% for x in range(100000000) %}a{% endfor %}",
        "{% macro m(n) %}{{ m(n) }}{% endmacro %}{{ m(1) }}",
        "{{ 1 / 0 }}",
        "{{ 'a'|nosuch }}",
        "{{ nosuch() }}",
        "{% include 'x' %}",
        "{% extends 'x' %}",
        "{% import 'x' as y %}",
        "{{ debug() }}",
        "{{ 'a\nb'|indent(1000000000) }}",
        "{{ 'a'|tojson(indent=1000000000) }}",
        "{{ '%1000000000d'|format(1) }}",
        "{{ [1]|batch(1000000000, 'x')|list }}",
        "{{ 'abc' * 2000000 }}",
    ],
)
def test_a_template_that_fails_or_runs_away_is_stopped(template: str) -> None:
    error = refused(template)
    assert error.code == "prompt_render_failed"
    assert error.param == "prompt"


SCRIPT = """
import json, resource, sys
from datetime import UTC, datetime
from starlette_aigateway.accounts import StoredPrompt
from starlette_aigateway.errors import InvalidRequest
from starlette_aigateway.policy import prompts
resource.setrlimit(resource.RLIMIT_AS, (640 * 2**20, 640 * 2**20))
values = {
    "text": "a" * 2_000_000, "old": "a", "new": "b" * 1_000_000, "word": "x" * 500, "n": 2**40, "wide": "\\u00df\\x01" * 500_000,
    "items": [{"name": "y" * 300, "tags": ["z" * 100] * 5} for _ in range(1500)], "numbers": list(range(5000)),
}
for line in sys.stdin:
    content = json.loads(line)
    stored = StoredPrompt(name="p", version=1, messages=[{"role": "user", "content": content}], created_at=datetime.now(UTC))
    try:
        result = "rendered" if len(prompts.render(stored, values)[0]["content"]) <= prompts.MAX_RENDERED else "too long"
    except InvalidRequest as error:
        result = error.code
    print(result, flush=True)
"""
"""Renders templates with large variables in a process that has 640 MB to live in: where minijinja runs out of memory, it aborts."""


def rendered_in_a_small_process(contents: Sequence[str]) -> list[str]:
    lines = "".join(json.dumps(content) + "\n" for content in contents)
    done = subprocess.run(  # our own interpreter and script
        [sys.executable, "-W", "error", "-c", SCRIPT], input=lines, capture_output=True, text=True, timeout=60, check=False
    )
    rendered = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (0, ""), f"it ended at {contents[len(rendered) :][:1]}"
    return rendered


BOMBS = [
    "{{ text|replace(old, new) }}",
    "{{ ('a'*1000000)|replace('a', 'b'*100000) }}",
    "{{ 'a' * 100000000 }}",
    "{{ word * n }}",
    "{{ [1] * 100000000 }}",
    "{{ 10 ** 30 ** 30 }}",
    "{{ text.replace(old, new) }}",
    "{{ text | map('replace', old, new) | join }}",
    "{% for i in range(100000) %}{{ text }}{% endfor %}",
    "{% for i in range(100000) %}{% if text == text ~ word %}{% endif %}{% endfor %}",
    "{% for i in range(100000) %}" + "r" * 200_000 + "{% endfor %}",
    "{% set a = text %}" + "{% set a = a ~ a %}" * 30 + "{{ a }}",
    "{% with a = text ~ text %}{{ a ~ a }}{% endwith %}",
    "{% filter replace(old, new) %}" + "a" * 1000 + "{% endfilter %}",
    "{% macro m(a) %}{{ m(a ~ a) }}{% endmacro %}{{ m(text) }}",
    "".join(f"{{% for a{i + 1} in [a{i} ~ a{i}] %}}" for i in range(30)).replace("a0", "text") + "{{ a30 }}" + "{% endfor %}" * 30,
    "{{ text" + " ~ text" * 40 + " }}",
    "{{ text }}" * 900,
    "{% for i in range(1000) %}{% for x in items %}{{ items|tojson(64) }}{% endfor %}{% endfor %}",
    "{{ text|split('')|join(new) }}",
    "{{ numbers|join(new) }}",
    "{{ wide|tojson|tojson|tojson|tojson|tojson|tojson|tojson }}",
    "{{ text|indent(64)|list|join(new) }}",
]


def test_templates_that_would_eat_the_memory_are_refused_and_the_process_lives() -> None:
    assert dict(zip(BOMBS, rendered_in_a_small_process(BOMBS), strict=True)) == dict.fromkeys(BOMBS, "prompt_render_failed")


NAMES = st.sampled_from(
    ["text", "old", "new", "word", "n", "wide", "items", "numbers", "items[0].name", "items[3].tags", "'q'", "7", "range(99999)"]
)
FILTERED = st.sampled_from(
    [
        *(f"|{name}" for name in sorted(templates.FILTERS.keys() | templates.NATIVE_FILTERS)),
        "|replace(old, new)",
        "|join(new)",
        "|tojson(64)",
        "|indent(64)",
        "|split(old)",
        "|default(text)",
        "|sort(attribute='name')",
        "|truncate(n)",
    ]
)
PIPED = st.builds(lambda name, filters: name + "".join(filters), NAMES, st.lists(FILTERED, max_size=3))
EXPRESSIONS = st.recursive(
    PIPED,
    lambda inner: st.builds(lambda a, sign, b: f"({a} {sign} {b})", inner, st.sampled_from(["~", "+", "==", "<", "in", "-", "%"]), inner),
    max_leaves=6,
)
TEMPLATES = st.recursive(
    st.builds(lambda value: f"{{{{ {value} }}}}", EXPRESSIONS),
    lambda inner: st.one_of(
        st.builds(lambda head, body: f"{{% for x in {head} %}}{body}{{{{ x }}}}{{% endfor %}}", PIPED, inner),
        st.builds(lambda test, body: f"{{% if {test} %}}{body}{{% else %}}-{{% endif %}}", EXPRESSIONS, inner),
        st.builds(lambda a, b: a + b, inner, inner),
    ),
    max_leaves=5,
)


@settings(max_examples=3, deadline=None)
@given(st.lists(TEMPLATES, min_size=20, max_size=40))
def test_no_accepted_template_kills_the_process(contents: list[str]) -> None:
    results = rendered_in_a_small_process(contents)
    assert len(results) == len(contents)
    assert set(results) <= {"rendered", "prompt_render_failed", "missing_variable"}


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("a\n{% set x = 1 %}", "line 2: a prompt cannot use {% set %}"),
        ("{{ a|nosuch }}", "no filter 'nosuch'"),
        ("{{ a is nosuch }}", "no test 'nosuch'"),
        ("{{ a is not nosuch(1) }}", "no test 'nosuch'"),
        ("{{ a.b() }}", "call nothing but range"),
        ("{{ a['b']() }}", "call nothing but range"),
        ("{{ a.range(1) }}", "call nothing but range"),
        ("{{ range }}", "range is only there to be called"),
        ("{{ a * 2 }}", "'*'"),
        ("{{ {'a': 1} }}", "'{'"),
        ("{% for x in [a] %}{% endfor %}", "head of a loop"),
        ("{% for x in y if x ~ x %}{% endfor %}", "head of a loop"),
        ("{% raw %}endraw {% set x = 1 %}{% endraw %}", "raw block"),
        ("{{ '" + "a" * 600 + "' }}", "quoted text"),
        ("{{ [" + "1," * 60 + "] }}", "words and signs"),
        ("{{ a }}" * 5001, "words and signs"),
        ("{{ a", "no end"),
    ],
)
def test_what_templates_cannot_use_is_refused_when_saved_and_its_place_told(template: str, why: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        prompts.check_prompt("greeting", [{"role": "user", "content": template}])
    assert caught.value.param == "messages[0].content"
    assert why in caught.value.message
    assert "line " in caught.value.message


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ long }}|{{ long|length }}|{{ 'x' ~ long }}", "L" * 600 + "|600|x" + "L" * 600),
        ("{% if long and long == same and long != 'x' %}y{% endif %}", "y"),
        ("{% if long is containing('LL') %}y{% endif %}{{ long is containing 'q' }}", "yFalse"),
        ("{{ long is string }}{{ long is mapping }}{{ map is mapping }}{{ map is string }}", "TrueFalseTrueFalse"),
        ("{{ long|lower|replace('l', '')|length }}{{ long is startingwith 'L' }}", "0True"),
        ("{% for k in map %}{{ k }}={{ map[k] }};{% endfor %}{{ 'a' in map }}{{ 'z' in map }}", "a=1;b=x;TrueFalse"),
        ("{% for k, v in map|items %}{{ k }}{{ v }}{% endfor %}", "a1bx"),
        ("{{ list }} {{ map }} {{ list[0] }}{{ list[-1] }} {{ list[:2] }}", "[3, 1, 2] {'a': 1, 'b': 'x'} 32 [3, 1]"),
        ("{% for x in list|sort|reverse %}{{ x }}{{ '' if loop.last else ',' }}{% endfor %}", "3,2,1"),
        ("{{ 3 in list }}{{ list == [3, 1, 2]|list }}{{ none|tojson }}{{ list|first }}", "TrueTruenull3"),
        ("{% raw %}{{ long|nosuch }}{% endraw %}{# {% set %} #}{{- ' x' -}} y", "{{ long|nosuch }} xy"),
        ("{% for x in missing|default([]) %}{% endfor %}{% if nothing is defined %}{{ nothing|upper }}{% endif %}.", "."),
        ("{% for x in range(2, 8, 3) if x > 1 %}{{ (x + 1) % 2 }}{% endfor %}", "10"),
    ],
)
def test_long_texts_lists_and_objects_behave_as_short_ones(template: str, text: str) -> None:
    prompts.check_prompt("greeting", [{"role": "user", "content": template}])
    values = {"long": "L" * 600, "same": "L" * 600, "list": [3, 1, 2], "map": {"a": 1, "b": "x"}}
    assert rendered(template, **values) == [text]


@pytest.mark.parametrize("value", ["x" * (prompts.MAX_VARIABLES + 1), list(range(prompts.MAX_VALUES)), [[["x" * 2**20] * 5] * 2]])
def test_variables_that_are_too_large_are_refused(value: Any) -> None:
    with pytest.raises(InvalidArgument, match="at most") as caught:
        rendered("{{ x }}", x=value)
    assert caught.value.param == "prompt.variables"


def test_what_a_long_text_cannot_do_fails_loudly() -> None:
    assert "is containing" in refused("{% if 'a' in x %}{% endif %}", x="a" * 600).message


def test_a_document_as_long_as_an_answer_may_be_is_rendered() -> None:
    document = "é" * (prompts.MAX_RENDERED - 10)
    assert rendered("<{{ document }}>", document=document) == [f"<{document}>"]


def test_a_long_conversation_is_rendered() -> None:
    turns = [{"role": "user", "content": "c" * 2000}] * 1000
    template = "{% for turn in turns %}{% if turn.role == 'user' %}{{ loop.index ~ '. ' ~ turn.content|trim }}\n{% endif %}{% endfor %}"
    assert len(rendered(template, turns=turns)[0]) > 2_000_000


def test_fuel_is_given_to_each_render_anew() -> None:
    renderer = prompts.Renderer()
    busy = prompt("{% for x in range(5000) %}{{ x }}{% endfor %}")
    results = {renderer.render(busy, {})[0]["content"] for _ in range(5)}
    assert len(results) == 1


def test_no_error_repeats_a_value() -> None:
    for template in (
        "{{ x / 0 }}",
        "{{ x|items }}",
        "{{ x.nothing }}",
        "{{ x.run() }}",
        "{{ a[x] }}",
        "{{ x|nosuch }}",
        "{{ x / 0 }}{{ missing }}",
    ):
        for secret in ("s3cret", 424242):
            error = refused(template, x=secret, a={})
            assert str(secret) not in error.message
            assert error.__cause__ is None
            assert error.__context__ is None


def test_indent_and_tojson_work_within_bounds() -> None:
    assert rendered("{{ x|indent(2) }}", x="a\n\nb") == ["a\n\n  b"]
    assert rendered("{{ x|indent(2, true) }}", x="a\nb") == ["  a\n  b"]
    assert rendered("{{ x|tojson(indent=2) }}", x={"a": 1}) == ['{\n  "a": 1\n}']


@pytest.mark.parametrize(
    ("value", "param"),
    [
        (Decimal(1), "prompt.variables.x"),
        (datetime(2026, 1, 1, tzinfo=UTC), "prompt.variables.x"),
        (b"bytes", "prompt.variables.x"),
        ([1, {"a": len}], "prompt.variables.x[1].a"),
        (float("inf"), "prompt.variables.x"),
        ("\ud800", "prompt.variables.x"),
    ],
)
def test_variables_are_plain_json(value: Any, param: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        rendered("{{ x }}", x=value)
    assert caught.value.param == param


def test_the_variables_of_a_prompt_can_be_told() -> None:
    stored = prompt("{{ a }} {% for x in items %}{{ x.b }}{% endfor %}{{ range(2)|list }}", [{"type": "text", "text": "{{ d }}"}])
    assert prompts.variables(stored) == {"a", "items", "d"}


# Saving


def test_one_text_becomes_one_system_message() -> None:
    draft = prompts.check_prompt("greeting", "Hello {{ name }}")
    assert draft == ("greeting", ({"role": "system", "content": "Hello {{ name }}"},), {}, True)


def test_messages_and_settings_are_kept() -> None:
    messages = [
        {"role": "system", "content": "a"},
        {"role": "developer", "content": "b"},
        {"role": "user", "name": "ana", "content": [{"type": "text", "text": "{{ c }}", "cache_control": {"type": "ephemeral"}}]},
        {"role": "assistant", "content": "d"},
    ]
    settings = {
        "model": "gpt-4o-mini",
        "temperature": 0,
        "max_tokens": 100,
        "stop": ["x"],
        "response_format": {"type": "json_object"},
        "seed": 1,
    }
    assert prompts.check_prompt("faq", messages, settings) == ("faq", tuple(messages), settings, False)


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        (None, "messages"),
        ([], "messages"),
        ({"role": "user", "content": "x"}, "messages"),
        (["x"], "messages[0]"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": []}], "messages[0].content"),
        ([{"role": "user", "content": None}], "messages[0].content"),
        ([{"role": "tool", "content": "x"}], "messages[0].role"),
        ([{"role": ["user"], "content": "x"}], "messages[0].role"),
        ([{"role": "user", "content": "x"}, {"role": "user", "content": "{{ a"}], "messages[1].content"),
        ([{"role": "user", "content": "x", "tool_calls": []}], "messages[0].tool_calls"),
        ([{"role": "user", "content": "x", "name": 5}], "messages[0].name"),
        ([{"role": "user", "content": ["x"]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "text", "text": "{% if %}"}]}], "messages[0].content[0].text"),
        ([{"role": "user", "content": "\ud800"}], "messages[0].content"),
        ([{"role": "user", "content": "x" * 262_144}], "messages"),
        ("x" * 262_144, "messages"),
        ("{{", "messages[0].content"),
    ],
)
def test_a_wrong_message_names_its_place(messages: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        prompts.check_prompt("greeting", messages)
    assert caught.value.param == param


def test_a_syntax_error_tells_the_line() -> None:
    with pytest.raises(InvalidRequest, match=r"messages\[0\].content.*line 3"):
        prompts.check_prompt("greeting", "one\ntwo\n{% for x in %}")


@pytest.mark.parametrize(
    ("settings", "param"),
    [
        ([], "settings"),
        ({"stream": True}, "settings.stream"),
        ({"tools": []}, "settings.tools"),
        ({"temperature": "hot"}, "settings.temperature"),
        ({"temperature": True}, "settings.temperature"),
        ({"temperature": float("nan")}, "settings.temperature"),
        ({"max_tokens": 0}, "settings.max_tokens"),
        ({"n": 1.0}, "settings.n"),
        ({"model": ""}, "settings.model"),
        ({"stop": [1]}, "settings.stop"),
        ({"response_format": "json"}, "settings.response_format"),
        ({"logprobs": 1}, "settings.logprobs"),
    ],
)
def test_a_wrong_setting_is_named(settings: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        prompts.check_prompt("greeting", "x", settings)
    assert caught.value.param == param


@pytest.mark.parametrize("name", [None, "", " a", "a/b", "a\nb", "x" * 201])
def test_a_name_is_a_part_of_a_path(name: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        prompts.check_prompt(name, "x")
    assert caught.value.param == "name"


@given(st.text(alphabet="{}%#- \nabefilnorst.|()'", max_size=60))
def test_any_text_is_either_saved_or_refused_as_a_bad_template(source: str) -> None:
    try:
        draft = prompts.check_prompt("greeting", source)
    except InvalidRequest as error:
        assert error.param == "messages[0].content"  # noqa: PT017  # both ways are right
        return
    try:
        prompts.render(prompt(draft.messages[0]["content"]), {})
    except UnprocessableRequest as error:
        assert error.code in ("missing_variable", "prompt_render_failed")  # noqa: PT017  # as above


# Labels


@pytest.mark.parametrize("label", ["production", "a", "0", "v1.2_beta-3", "a" * 64])
def test_a_label_is_a_short_lower_case_word(label: str) -> None:
    assert prompts.check_label(label) == label


@pytest.mark.parametrize("label", ["latest", "", "A", "-a", ".a", "a b", "a/b", "ä", "a" * 65, "a\n", None, 5])
def test_latest_and_malformed_labels_are_refused(label: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        prompts.check_label(label)
    assert caught.value.param == "label"


def test_the_first_version_gets_production_and_later_ones_only_what_is_asked() -> None:
    assert prompts.labels_of_new_version([], 1) == ("production",)
    assert prompts.labels_of_new_version(["beta", "production"], 1) == ("beta", "production")
    assert prompts.labels_of_new_version(["beta", "beta"], 2) == ("beta",)
    assert prompts.labels_of_new_version([], 2) == ()
