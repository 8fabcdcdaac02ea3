"""Which answers may be kept, for whom, and when one is still good enough."""

from __future__ import annotations

import re
from contextlib import suppress
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from starlette_aigateway.errors import InvalidArgument, InvalidRequest
from starlette_aigateway.policy import caching
from starlette_aigateway.policy.caching import CachedAnswer, CachedCompletion, CachedEvents, CachePolicy
from starlette_aigateway.policy.estimate import encoded
from starlette_aigateway.types import CacheControl, Completion, CompletionRequest, Message, Native, Principal, PromptRef, Tenant, Usage

HELLO: list[Message] = [{"role": "user", "content": "hello"}]
BASE = CompletionRequest(model="gpt-4o", messages=HELLO, temperature=0.5, max_tokens=100, params={"top_p": 0.9, "user": "u"})


def key(request: CompletionRequest = BASE, *, stream: bool = False, plan: str = "plan", scope: str = "tenant:acme") -> str:
    made = caching.cache_key(request, stream=stream, plan=plan, scope=scope)
    assert made is not None
    return made


def but(**changes: Any) -> CompletionRequest:
    fields = {name: getattr(BASE, name) for name in BASE.__struct_fields__}
    return CompletionRequest(**{**fields, **changes})


def test_a_key_is_a_sha_256_in_hexadecimal() -> None:
    assert re.fullmatch("[0-9a-f]{64}", key())
    assert key() == key(but())


@pytest.mark.parametrize(
    "changed",
    [
        but(model="gpt-4o-mini"),
        but(messages=[{"role": "user", "content": "hello!"}]),
        but(messages=[{"role": "system", "content": "hello"}]),
        but(messages=[*HELLO, *HELLO]),
        but(messages=[{"role": "user", "content": "hello", "name": "x"}]),
        but(temperature=0.6),
        but(temperature=None),
        but(max_tokens=101),
        but(max_tokens=None),
        but(n=2),
        but(params={"top_p": 0.9}),
        but(params={"top_p": 0.9, "user": "v"}),
        but(params={"top_p": 0.9, "user": "u", "seed": 0}),
        but(params={"top_p": True, "user": "u"}),
        but(params={"top_p": 1, "user": "u"}),
        but(prompt=PromptRef(name="p")),
        but(prompt=PromptRef(name="p", variables={"a": 1})),
    ],
)
def test_everything_that_shapes_the_answer_is_in_the_key(changed: CompletionRequest) -> None:
    assert key(changed) != key()


def test_true_is_not_one_in_a_key() -> None:
    assert key(but(params={"x": True})) != key(but(params={"x": 1}))
    assert key(but(params={"x": False})) != key(but(params={"x": 0}))


def test_fields_cannot_slip_into_each_other() -> None:
    assert key(but(model="a", params={"b": "c"})) != key(but(model="b", params={"a": "c"}))
    assert key(plan="ab", scope="c") != key(plan="a", scope="bc")


def test_the_plan_and_who_shares_it_are_in_the_key() -> None:
    assert len({key(), key(plan="other"), key(scope="tenant:other"), key(scope="gateway")}) == 4


def test_the_order_of_names_and_the_type_of_containers_are_not() -> None:
    assert key(but(params={"user": "u", "top_p": 0.9})) == key()
    assert key(but(params=MappingProxyType({"user": "u", "top_p": 0.9}), messages=tuple(HELLO))) == key()
    assert key(but(messages=[{"content": "hello", "role": "user"}])) == key()


def test_a_key_stays_what_it_was_so_that_what_is_kept_is_found() -> None:
    said: list[Message] = [{"role": "user", "content": "Grüß dich"}, {"content": "hello", "role": "assistant"}]
    asked = CompletionRequest(model="gpt-4o", messages=said, temperature=0.5, max_tokens=100, n=2, params={"user": "u", "top_p": 0.9})
    kept = "5776d78ab78190e45926cd561cdeefeb906a4e461c3fa298befdf6e97d5b54db"
    assert key(asked, stream=True, plan="openai:gpt-4o", scope="tenant:acme") == kept
    assert caching.cache_key(asked, stream=True, plan="openai:gpt-4o", scope="tenant:acme", sent=encoded(asked)) == kept


def test_a_stream_shares_the_key_unless_its_choices_interleave() -> None:
    assert key(stream=True) == key()
    assert key(but(n=1), stream=True) == key(but(n=1))
    assert key(but(n=2), stream=True) != key(but(n=2))


@pytest.mark.parametrize("value", [object(), {"a": [object()]}, "\ud800", {(1, 2): 3}])
def test_a_call_without_an_identity_goes_past_the_cache(value: object) -> None:
    assert caching.cache_key(but(params={"x": value}), stream=False, plan="p", scope="s") is None


def test_endless_nesting_goes_past_the_cache() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    assert caching.cache_key(but(params={"x": deep}), stream=False, plan="p", scope="s") is None


ALICE = Principal("alice", tenant="acme")
BOB = Principal("bob", tenant=Tenant("acme"))
LONER = Principal("acme")


def test_a_tenant_shares_and_a_principal_without_one_does_not() -> None:
    assert caching.shared_by("tenant", ALICE) == caching.shared_by("tenant", BOB)
    assert caching.shared_by("tenant", ALICE) != caching.shared_by("tenant", LONER)
    assert caching.shared_by("tenant", LONER) == caching.shared_by("principal", LONER)


def test_principals_and_the_gateway_share_as_they_say() -> None:
    assert len({caching.shared_by("principal", who) for who in (ALICE, BOB, LONER)}) == 3
    assert len({caching.shared_by("gateway", who) for who in (ALICE, BOB, LONER)}) == 1


@pytest.mark.parametrize(
    ("header", "wanted"),
    [
        (None, CacheControl()),
        ("", CacheControl()),
        (" , ,", CacheControl()),
        ("no-cache", CacheControl(read=False)),
        ("No-Cache", CacheControl(read=False)),
        ("no-store", CacheControl(read=False, store=False)),
        ("no-store, no-cache", CacheControl(read=False, store=False)),
        ("max-age=60", CacheControl(max_age=60)),
        (" max-age = 60 ", CacheControl(max_age=60)),
        ('max-age="60"', CacheControl(max_age=60)),
        ("max-age=0", CacheControl(max_age=0)),
        ("max-age=60, max-age=10, max-age=20", CacheControl(max_age=10)),
        ("max-age=99999999999999999999", CacheControl(max_age=2**31)),
        ("no-transform, only-if-cached, max-stale=5, foo", CacheControl()),
        ('foo="no-store, no-cache"', CacheControl()),
        ('foo="a \\" , no-store", max-age=5', CacheControl(max_age=5)),
        ('no-cache="set-cookie"', CacheControl(read=False)),
        ("max-age-of=3", CacheControl()),
    ],
)
def test_cache_control_is_read_as_the_rfc_says(header: str | None, wanted: CacheControl) -> None:
    assert caching.parse_cache_control(header) == wanted


@pytest.mark.parametrize(
    "header", ["max-age", "max-age=", "max-age=-1", "max-age=1.5", "max-age=abc", "no-cache, max-age=x", "max-age=٣", 'max-age="']
)
def test_a_malformed_max_age_is_refused_by_name(header: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        caching.parse_cache_control(header)
    assert caught.value.param == "cache-control"


@given(st.text(max_size=200))
def test_any_header_is_read_or_refused(header: str) -> None:
    with suppress(InvalidRequest):
        caching.parse_cache_control(header)


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"ttl": 0}, "ttl"),
        ({"ttl": -1}, "ttl"),
        ({"ttl": True}, "ttl"),
        ({"ttl": "60"}, "ttl"),
        ({"ttl": float("nan")}, "ttl"),
        ({"ttl": float("inf")}, "ttl"),
        ({"scope": "world"}, "scope"),
        ({"scope": None}, "scope"),
        ({"enabled": 1}, "enabled"),
        ({"max_entry_bytes": 0}, "max_entry_bytes"),
        ({"max_entry_bytes": 1.5}, "max_entry_bytes"),
        ({"max_entry_bytes": 2**21, "size_limit_bytes": 2**20}, "max_entry_bytes"),
        ({"size_limit_bytes": True}, "size_limit_bytes"),
    ],
)
def test_a_wrong_policy_is_refused_by_name(wrong: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        CachePolicy(**wrong)
    assert caught.value.param == param


USAGE = Usage(input_tokens=10, output_tokens=5, cache_read_input_tokens=3)
WHOLE = CachedAnswer(
    stored_at=1000.0,
    provider="openai",
    model="gpt-4o",
    content=caching.kept(Completion(message={"role": "assistant", "content": "hi"}, usage=USAGE, model="gpt-4o-2024", id="x")),
)


def test_a_whole_answer_comes_back_as_it_was() -> None:
    value = caching.encode(WHOLE)
    assert value is not None
    assert caching.decode(value) == WHOLE
    assert (WHOLE.usage, WHOLE.finish_reason) == (USAGE, "stop")


def test_unknown_fields_of_a_message_come_back() -> None:
    message: Any = {"role": "assistant", "content": None, "reasoning": [1, 2.5, True, None, {"a": "日本"}]}
    value = caching.encode(CachedAnswer(stored_at=1, provider="p", model="m", content=caching.kept(Completion(message=message))))
    assert value is not None
    back = caching.decode(value)
    assert back is not None
    assert isinstance(back.content, CachedCompletion)
    assert back.content.message == message


def test_a_native_body_is_kept_byte_for_byte_and_its_message_not_twice() -> None:
    native = Native("openai_chat", b'{"choices": [{"message": {"content": "hi"}}]}')
    content = caching.kept(Completion(message={"role": "assistant", "content": "hi"}, native=native))
    assert content.message is None
    value = caching.encode(CachedAnswer(stored_at=1, provider="p", model="m", content=content))
    assert value is not None
    assert value.count(b'"hi"') == 1
    back = caching.decode(value)
    assert back is not None
    assert back.content == content


def test_a_stream_comes_back_byte_for_byte() -> None:
    events = CachedEvents(wire="openai_chat", data=b"data: {}\n\ndata: [DONE]\n\n", finish_reason="stop", usage=USAGE, model="m", id="i")
    answer = CachedAnswer(stored_at=1, provider="p", model="m", content=events)
    value = caching.encode(answer)
    assert value is not None
    assert caching.decode(value) == answer


def test_an_answer_that_is_not_data_is_not_kept() -> None:
    strange: Any = {"role": "assistant", "content": object()}
    assert caching.encode(CachedAnswer(stored_at=1, provider="p", model="m", content=caching.kept(Completion(message=strange)))) is None


@given(st.binary(max_size=200))
def test_any_bytes_decode_to_an_answer_or_a_miss(value: bytes) -> None:
    assert caching.decode(value) is None
    assert caching.decode(caching.ENTRY_VERSION + value) is None


@given(position=st.integers(min_value=0, max_value=10**6), bit=st.integers(min_value=0, max_value=7))
def test_a_damaged_entry_never_raises(position: int, bit: int) -> None:
    value = bytearray(caching.encode(WHOLE) or b"")
    value[position % len(value)] ^= 1 << bit
    caching.decode(bytes(value))


def test_entries_of_another_version_cut_or_with_a_tail_are_misses() -> None:
    value = caching.encode(WHOLE) or b""
    assert caching.decode(b"\x00" + value[1:]) is None
    assert caching.decode(value + b"\x00") is None
    assert all(caching.decode(value[:end]) is None for end in range(len(value)))


@pytest.mark.parametrize("stored_at", [float("nan"), float("inf"), float("-inf")])
def test_an_entry_without_a_time_or_an_answer_is_a_miss(stored_at: float) -> None:
    empty = CachedAnswer(stored_at=1, provider="p", model="m", content=CachedCompletion())
    timeless = CachedAnswer(stored_at=stored_at, provider="p", model="m", content=WHOLE.content)
    for answer in (empty, timeless):
        assert caching.decode(caching.encode(answer) or b"") is None


@pytest.mark.parametrize(
    ("control", "now", "fresh"),
    [
        (CacheControl(), 1000, True),
        (CacheControl(), 1059.9, True),
        (CacheControl(), 1060, False),
        (CacheControl(read=False), 1000, False),
        (CacheControl(store=False), 1000, True),
        (CacheControl(max_age=10), 1010, True),
        (CacheControl(max_age=10), 1010.5, False),
        (CacheControl(max_age=0), 1000, True),
        (CacheControl(max_age=0), 1001, False),
        (CacheControl(max_age=100), 1060, False),
        (CacheControl(), 900, True),
    ],
)
def test_an_answer_is_fresh_within_the_ttl_and_the_callers_max_age(control: CacheControl, now: float, fresh: bool) -> None:
    assert caching.fresh(WHOLE, control, now, ttl=60) is fresh


def test_the_age_is_in_seconds_and_never_negative() -> None:
    assert caching.age(WHOLE, 1012.5) == 12.5
    assert caching.age(WHOLE, 900) == 0


def storable(
    finish_reason: str | None = "stop", *, complete: bool = True, bound_lowered: bool = False, size: int = 10, **policy: Any
) -> bool:
    return caching.storable(finish_reason, complete=complete, bound_lowered=bound_lowered, size=size, policy=CachePolicy(**policy))


def test_only_complete_successful_answers_within_the_size_are_kept() -> None:
    assert storable()
    assert storable("tool_calls")
    assert storable("length")
    assert not storable(complete=False)
    assert not storable("error")
    assert not storable(enabled=False)
    assert storable(size=100, max_entry_bytes=100)
    assert not storable(size=101, max_entry_bytes=100)


def test_an_answer_that_our_own_bound_cut_short_is_neither_kept_nor_shared() -> None:
    assert not storable("length", bound_lowered=True)
    assert caching.cut_short("length", bound_lowered=True)
    assert storable("stop", bound_lowered=True)
    assert not caching.cut_short("stop", bound_lowered=True)
    assert not caching.cut_short("length", bound_lowered=False)
