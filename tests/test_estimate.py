"""What a call may cost at the most, and what it probably used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal
from unicodedata import normalize

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from starlette_aigateway.errors import InvalidRequest
from starlette_aigateway.policy import estimate
from starlette_aigateway.policy.pricing import cost
from starlette_aigateway.types import CompletionRequest, Message, Price, PriceTier

from .money_strategies import choices, counts, prices, usages

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=80)
messages = st.lists(st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": texts}), max_size=6)


def request(*contents: str, **fields: Any) -> CompletionRequest:
    said: list[Message] = [{"role": "user", "content": content} for content in contents]
    return CompletionRequest(model="m", messages=said, **fields)


def sent_bytes(value: object) -> int:
    """UTF-8 bytes of every text that is sent, keys too."""
    if isinstance(value, str):
        return len(value.encode())
    if isinstance(value, Mapping):
        return sum(sent_bytes(key) + sent_bytes(item) for key, item in value.items())
    return sum(map(sent_bytes, value)) if isinstance(value, Sequence) else len(str(value))


@given(said=messages, tools=st.lists(st.fixed_dictionaries({"type": st.just("function"), "name": texts}), max_size=3))
def test_no_tokenisation_of_at_most_a_token_per_byte_makes_more_than_the_bound(said: list[Message], tools: list[dict[str, str]]) -> None:
    asked = CompletionRequest(model="m", messages=said, params={"tools": tools} if tools else {})
    framing = 7 * len(said) + 3 + (530 + 20 * len(tools) if tools else 0)
    assert estimate.input_bound(asked) >= sent_bytes([said, tools]) + framing


def test_escapes_and_characters_beyond_ascii_count_by_their_bytes() -> None:
    assert estimate.size(request('\n"\\\x00')) >= estimate.size(request("abcd"))
    assert estimate.size(request("日本語")) == estimate.size(request("x" * 9))


def test_tools_functions_and_what_the_wire_adds_count() -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    plain = estimate.input_bound(request("hi"))
    for name in ("tools", "functions"):
        one = estimate.input_bound(request("hi", params={name: [tool]}))
        two = estimate.input_bound(request("hi", params={name: [tool, tool]}))
        assert one > plain + estimate.TOKENS_FOR_TOOLS
        assert two > one + estimate.TOKENS_PER_TOOL
    assert estimate.input_bound(request("hi"), extra=1000) == plain + 1000
    assert estimate.input_bound(request("hi", params={"response_format": {"type": "json_object"}})) > plain + estimate.TOKENS_FOR_FORMAT


@pytest.mark.parametrize("form", ["NFC", "NFD", "NFKC"])
@pytest.mark.parametrize("character", ["\ufdfa", "\U0001d160", "\u0958", "\u3300", "é", "한", "ﬁ"])
def test_text_that_grows_in_a_normal_form_counts_by_the_longest(form: Literal["NFC", "NFD", "NFKC"], character: str) -> None:
    said = normalize(form, character * 1000)
    for tokenized in (said, normalize("NFC", said), normalize("NFKC", said)):
        assert estimate.input_bound(request(said)) >= len(tokenized.encode())


@given(said=st.text(st.characters(exclude_categories=["Cs"])))
def test_no_tokenizer_that_normalizes_first_makes_more_tokens_than_the_bound(said: str) -> None:
    for form in estimate.NORMAL_FORMS:
        assert estimate.input_bound(request(said)) >= len(normalize(form, said).encode())


def test_mappings_and_sequences_of_other_types_are_measured() -> None:
    asked = CompletionRequest(model="m", messages=({"role": "user", "content": "x" * 100},), params=MappingProxyType({"stop": range(3)}))
    assert estimate.size(asked) > 100


@given(said=messages)
def test_what_is_encoded_once_measures_the_same_as_what_is_encoded_for_the_purpose(said: list[Message]) -> None:
    asked = CompletionRequest(model="m", messages=said, params={"stop": "x", "user": "ü"})
    sent = estimate.encoded(asked)
    assert sent.size == estimate.size(asked) == len(msgspec.json.encode((asked.messages, asked.params)))
    assert estimate.input_bound(asked, sent=sent) == estimate.input_bound(asked)
    assert estimate.tokens_for_window(asked, 5, sent=sent) == estimate.tokens_for_window(asked, 5)


@pytest.mark.parametrize("value", [object(), {"a": object()}, "\ud800", {(1, 2): 3}])
def test_what_json_cannot_carry_is_refused_without_quoting_it(value: object) -> None:
    with pytest.raises(InvalidRequest) as caught:
        estimate.size(request("a secret prompt", params={"x": value}))
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_endless_nesting_is_refused() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(InvalidRequest):
        estimate.size(request("hi", params={"x": deep}))


@given(data=st.data(), price=prices, input_bound=counts, output_bound=counts, n=choices)
def test_the_worst_case_is_never_below_the_cost_of_any_split(
    data: st.DataObject, price: Price, input_bound: int, output_bound: int, n: int | None
) -> None:
    used = data.draw(usages(input_tokens=input_bound, output_tokens=output_bound * (n or 1)))
    assert estimate.amount(input_bound, output_bound, n, price) >= cost(used, price)


@given(data=st.data(), said=messages, price=prices, granted=st.integers(0, 10**15), n=choices)
def test_whatever_a_request_turns_out_to_be_it_costs_no_more_than_was_granted(
    data: st.DataObject, said: list[Message], price: Price, granted: int, n: int | None
) -> None:
    """From the request to the bill: the bound of the input, the output that the grant affords, any usage within the two."""
    asked = estimate.ask(CompletionRequest(model="m", messages=said, n=n), 0, price=price)
    input_bound = estimate.input_bound(CompletionRequest(model="m", messages=said))
    bound = estimate.affordable(granted, input_bound, n, price, asked.output_wanted)
    if bound:
        used = data.draw(usages(input_tokens=input_bound, output_tokens=bound * (n or 1)))
        assert cost(used, price) <= granted


def test_without_a_price_every_amount_is_nothing() -> None:
    asked = estimate.ask(request("hi"), 1000, price=None)
    assert (asked.minimum, asked.wanted) == (0, 0)
    assert estimate.amount(10**6, 10**6, 4, None) == 0
    assert estimate.affordable(0, 1000, 1, None, 500) == 500


PRICE = Price(1, 2)


@pytest.mark.parametrize(
    ("default", "maximum", "output", "least"),
    [
        (None, None, estimate.DEFAULT_MAX_TOKENS, 256),
        (1000, None, 1000, 256),
        (None, 8192, 8192, 256),
        (1000, 8192, 1000, 256),
        (9000, 8192, 8192, 256),
        (100, None, 100, 100),
    ],
)
def test_without_a_bound_of_the_caller_the_budget_may_lower_ours(default: int | None, maximum: int | None, output: int, least: int) -> None:
    asked = estimate.ask(request("hi", n=2), 50, price=PRICE, default_max_tokens=default, model_maximum=maximum)
    assert asked == estimate.Ask(
        minimum=estimate.amount(50, least, 2, PRICE), wanted=estimate.amount(50, output, 2, PRICE), output_wanted=output, given=False
    )


def test_a_bound_of_the_caller_holds_as_it_is() -> None:
    asked = estimate.ask(request("hi", max_tokens=700), 50, price=PRICE, default_max_tokens=10, model_maximum=100)
    assert asked.given
    assert asked.output_wanted == 700
    assert asked.minimum == asked.wanted == estimate.amount(50, 700, None, PRICE)


def test_the_least_output_can_be_set() -> None:
    asked = estimate.ask(request("hi"), 0, price=PRICE, min_output_tokens=10)
    assert asked.minimum == 10 * 2000


@given(price=prices, tokens=counts, paid=counts, short=st.integers(min_value=-1000, max_value=1000), n=choices, wanted=counts)
def test_a_grant_pays_for_what_it_affords_and_for_no_token_more(
    price: Price, tokens: int, paid: int, short: int, n: int | None, wanted: int
) -> None:
    granted = max(0, estimate.amount(tokens, paid, n, price) - short)
    output = estimate.affordable(granted, tokens, n, price, wanted)
    assert 0 <= output <= wanted
    if output:
        assert estimate.amount(tokens, output, n, price) <= granted
    if output < wanted:
        assert estimate.amount(tokens, output + 1, n, price) > granted


def test_a_grant_pays_for_input_at_the_dearest_of_its_rates() -> None:
    price = Price(1, 2, cache_write=5)
    granted = estimate.amount(1000, 300, 2, price)
    assert estimate.affordable(granted, 1000, 2, price, 4096) == 300
    assert estimate.affordable(granted - 1, 1000, 2, price, 4096) == 299
    assert estimate.affordable(1000, 1000, 2, price, 4096) == 0


def test_a_grant_pays_for_output_in_every_tier_that_the_input_may_be_in() -> None:
    price = Price(1, 4, tiers=[PriceTier(500, 2, 1, reasoning=3)])
    granted = estimate.amount(1000, 2000, None, price)
    assert granted == 500 * 1000 + 2000 * 4000
    assert estimate.affordable(granted, 1000, None, price, 4096) == 2000
    assert estimate.affordable(1_999_999, 1000, None, price, 4096) == 0


@given(price=prices, tokens=counts, n=choices, wanted=counts)
def test_what_was_asked_for_in_full_affords_all_of_it(price: Price, tokens: int, n: int | None, wanted: int) -> None:
    assert estimate.affordable(estimate.amount(tokens, wanted, n, price), tokens, n, price, wanted) == wanted


@given(pieces=st.lists(st.binary(min_size=1, max_size=12), max_size=50), bound=st.none() | counts, n=choices)
def test_the_estimate_of_what_was_received_is_never_too_low(pieces: list[bytes], bound: int | None, n: int | None) -> None:
    """Each piece is a token of at least one byte; the provider kept the bound."""
    actual = len(pieces) if bound is None else min(len(pieces), bound * (n or 1))
    used = estimate.received(sum(map(len, pieces)), input_tokens=77, bound=bound, n=n)
    assert used.output_tokens >= actual
    assert used.input_tokens == 77
    if bound is not None:
        assert used.output_tokens <= bound * (n or 1)


def test_tokens_that_are_not_shown_are_limited_by_the_bound_alone() -> None:
    assert estimate.received(10, input_tokens=1, bound=5000, n=2, unseen=5000).output_tokens == 10_000
    assert estimate.received(10, input_tokens=1, n=2, unseen=4096).output_tokens == 8192
    assert estimate.received(50_000, input_tokens=1, unseen=4096).output_tokens > 50_000
    assert estimate.received(10, input_tokens=1, bound=5000, n=2).output_tokens == 10 + 2 * estimate.TOKENS_PER_CHOICE


def test_a_token_window_is_charged_a_usual_text_and_the_callers_own_bound() -> None:
    asked = request("x" * 4000)
    assert 1000 <= estimate.tokens_for_window(asked, None) <= 1020
    assert estimate.tokens_for_window(asked, 500) == estimate.tokens_for_window(asked, None) + 500
    twice = request("x" * 4000, n=2)
    assert estimate.tokens_for_window(twice, 500) == estimate.tokens_for_window(asked, None) + 1000
    assert estimate.tokens_for_window(CompletionRequest(), None) >= 1
    assert estimate.tokens_for_window(asked, None, images=2, image_bytes=4000) <= 2 * estimate.USUAL_IMAGE + 20
