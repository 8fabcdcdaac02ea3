"""The Chat Completions wire: what each parameter may cost."""

from typing import Any

import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsBase

from starlette_aigateway.types import (
    CompletionRequest,
    ImageTokens,
)
from starlette_aigateway.wires import openai_chat


def request(*messages: Any, **fields: Any) -> CompletionRequest:
    return CompletionRequest(model="gpt-4o-mini", messages=list(messages) or [{"role": "user", "content": "hi"}], **fields)


def test_every_parameter_that_the_official_client_knows_has_a_cost() -> None:
    known = set(CompletionCreateParamsBase.__annotations__) | {"stream"}
    assert known - set(openai_chat.PARAMETERS) == set()


def part(**fields: Any) -> CompletionRequest:
    return request({"role": "user", "content": [{"type": "text", "text": "a"}, fields]})


PICTURE = "data:image/png;base64,AA=="
FIRST_PART = "messages[0].content[1]"


@pytest.mark.parametrize(
    ("sent", "found"),
    [
        (request(params={"web_search_options": {}}), "web_search_options"),
        (request(params={"service_tier": "priority"}), "service_tier"),
        (request(params={"service_tier": ["default"]}), "service_tier"),
        (request(params={"brand_new": 1}), "brand_new"),
        (request(params={"cache_control": {"type": "ephemeral"}}), "cache_control"),
        (request(params={"modalities": ["text", "audio"]}), "modalities"),
        (request(params={"modalities": "audio"}), "modalities"),
        (request(params={"modalities": {"text": True}}), "modalities"),
        (request(params={"prediction": {"type": "content", "content": "x"}}), "prediction"),
        (request(params={"tools": [{"type": "function"}, {"type": "web_search"}]}), "tools[1]"),
        (request(params={"tools": ["web_search"]}), "tools[0]"),
        (request(params={"tools": {"type": "web_search"}}), "tools"),
        (request(params={"tools": "web_search"}), "tools"),
        (request(params={"tools": [{"type": ["function"]}]}), "tools[0]"),
        (
            request(params={"tools": [{"type": "function", "function": {}, "allowed_callers": ["code_execution"]}]}),
            "tools[0].allowed_callers",
        ),
        (request(params={"tools": [{"type": "function", "cache_control": {"type": "ephemeral"}}]}), "tools[0].cache_control"),
        (request(params={"functions": {"name": "f"}}), "functions"),
        (request(params={"functions": ["f"]}), "functions[0]"),
        (request(params={"thinking": True}), "thinking"),
        (request(params={"thinking": {"type": ["enabled"]}}), "thinking"),
        (request(params={"thinking": {"type": "enabled", "budget_tokens": 2000}}), "thinking.budget_tokens"),
        (request(max_tokens=2000, params={"thinking": {"type": "enabled", "budget_tokens": 2000}}), "thinking.budget_tokens"),
        (request(max_tokens=2000, params={"thinking": {"type": "enabled", "budget_tokens": "9"}}), "thinking.budget_tokens"),
        (part(type="image_url", image_url={"url": "https://x/y.png"}), f"{FIRST_PART}.image_url"),
        (part(type="image_url", image_url="HTTP://x/y.png"), f"{FIRST_PART}.image_url"),
        (part(type="image_url", image_url={"file_id": "f"}), f"{FIRST_PART}.image_url"),
        (part(type="image_url", image_url={"url": PICTURE, "file_id": "f"}), f"{FIRST_PART}.image_url"),
        (part(type="image_url", image_url={"url": PICTURE, "detail": ["low"]}), f"{FIRST_PART}.image_url"),
        (part(type="image_url", image_url={"url": "data:application/pdf;base64,AA=="}), f"{FIRST_PART}.image_url"),
        (part(type="image_url", image_url={"url": [PICTURE]}), f"{FIRST_PART}.image_url"),
        (part(type="image_url", image_url="data:image/png,text"), f"{FIRST_PART}.image_url"),
        (part(type="image_url", image_url="data:image/svg+xml;base64,AA=="), f"{FIRST_PART}.image_url"),
        (part(type="image_url", image_url=PICTURE, file={"file_id": "f"}), f"{FIRST_PART}.file"),
        (part(type="input_audio", input_audio={}), f"{FIRST_PART}.input_audio"),
        (part(type="file", file={"file_data": "x"}), f"{FIRST_PART}.file"),
        (part(type="video_url"), FIRST_PART),
        (part(type="tool_result", content=[{"type": "image_url", "image_url": PICTURE}]), FIRST_PART),
        (part(type="text", text=[{"type": "image_url", "image_url": PICTURE}]), f"{FIRST_PART}.text"),
        (part(type="text", text="a", image_url={"url": "https://x/y.png"}), f"{FIRST_PART}.image_url"),
        (part(type="text", text="a", prompt_cache_breakpoint={"mode": "explicit"}), f"{FIRST_PART}.prompt_cache_breakpoint"),
        (request({"role": "assistant", "content": None, "audio": {"id": "a"}}), "messages[0].audio"),
        (request({"role": "user", "content": "a", "images": ["AA=="]}), "messages[0].images"),
        (request({"role": "user", "content": {"type": "file"}}), "messages[0].content"),
        (request({"role": "user", "content": [["a"]]}), "messages[0].content[0]"),
        (request({"role": "user", "content": "a", "x" * 1000: 1}), "messages[0].…"),
    ],
)
def test_what_has_no_bound_is_found_and_named(sent: CompletionRequest, found: str) -> None:
    assert list(openai_chat.unbounded_parameters(sent)) == [found]


@pytest.mark.parametrize(
    "alias",
    [
        "best_of", "max_output_tokens", "max_tokens_to_sample", "max_new_tokens", "num_predict", "n_predict", "max_length",
        "max_gen_len", "min_tokens", "options", "num_completions", "num_generations", "candidate_count", "generation_config",
        "extra_body", "max_tool_calls", "use_beam_search", "thinking_budget", "thinking_token_budget", "plugins", "models", "N",
        "MAX_TOKENS", "max_tokens ",
    ],
)  # fmt: skip
@pytest.mark.parametrize("value", [1, {"num_predict": 10**6}])
def test_every_other_name_of_a_bound_is_without_bound(alias: str, value: Any) -> None:
    assert list(openai_chat.unbounded_parameters(request(max_tokens=5, params={alias: value}))) == [alias]


def test_all_that_has_no_bound_is_found_so_that_one_that_is_allowed_hides_no_other() -> None:
    parts = [{"type": "image_url", "image_url": "https://x/y.png"}, {"type": "file", "file": {"file_id": "f"}}]
    sent = request({"role": "user", "content": parts}, params={"web_search_options": {}, "tools": ["a", "b"]})
    found = list(openai_chat.unbounded_parameters(sent))
    assert found == ["web_search_options", "tools[0]", "tools[1]", "messages[0].content[0].image_url", "messages[0].content[1].file"]
    assert [openai_chat.kind_of(path) for path in found] == [
        "web_search_options", "tools", "tools", "messages.content.image_url", "messages.content.file",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "sent",
    [
        request(),
        request(params={"web_search_options": None, "service_tier": "default", "modalities": ["text"], "top_p": 0.1, "store": True}),
        request(params={"tools": [{"type": "function", "function": {}}, {"type": "custom"}], "response_format": {"type": "json_object"}}),
        request(params={"functions": [{"name": "f"}], "top_k": 5, "thinking": {"type": "adaptive"}}),
        request(max_tokens=2001, params={"thinking": {"type": "enabled", "budget_tokens": 2000}}),
        part(type="image_url", image_url={"url": PICTURE}),
        part(type="image_url", image_url={"url": "DATA:image/JPEG;charset=x;BASE64,AA==", "detail": "low"}),
        request(
            {"role": "tool", "tool_call_id": "t", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": PICTURE}]}
        ),
        request({"role": "assistant", "content": "a", "refusal": None, "annotations": [], "audio": None, "tool_calls": [{"id": "t"}]}),
    ],
)
def test_what_is_bounded_passes(sent: CompletionRequest) -> None:
    assert list(openai_chat.unbounded_parameters(sent)) == []


BOUNDS = ImageTokens(low=10, high=300, auto=2000)


@pytest.mark.parametrize(
    ("detail", "tokens"), [("low", 10), ("high", 300), ("auto", 2000), ("original", 2000), (None, 2000), (["low"], 2000)]
)
def test_an_image_costs_what_its_detail_can_cost_at_the_most(detail: Any, tokens: int) -> None:
    assert openai_chat.images(part(type="image_url", image_url={"url": PICTURE, "detail": detail}), BOUNDS).tokens == tokens
    assert openai_chat.images(part(type="input_image", detail=detail), BOUNDS).tokens == tokens
    assert openai_chat.images(request(), BOUNDS) == (0, 0, 0)


def test_an_image_without_a_detail_may_be_the_dearest() -> None:
    picture = {"type": "image_url", "image_url": PICTURE}
    assert openai_chat.images(part(**picture), BOUNDS).tokens == 2000
    assert openai_chat.images(part(**picture), ImageTokens(low=500, high=300)).tokens == 500
    assert openai_chat.images(part(**picture), ImageTokens()).tokens >= 2833 + 8 * 5667


def test_images_in_messages_of_tools_and_inside_of_other_parts_count() -> None:
    picture = {"type": "image_url", "image_url": {"url": PICTURE, "detail": "low"}}
    nested = {"type": "tool_result", "content": [picture, {"deeper": [picture]}]}
    sent = request({"role": "tool", "tool_call_id": "t", "content": [picture]}, {"role": "user", "content": [nested, picture]})
    assert openai_chat.images(sent, BOUNDS) == (4, 40, 4 * len(PICTURE))


def test_the_bytes_of_an_inlined_image_are_its_own_and_those_of_an_address_are_text() -> None:
    assert openai_chat.images(part(type="image_url", image_url={"url": PICTURE}), BOUNDS).bytes == len(PICTURE)
    assert openai_chat.images(part(type="image_url", image_url=PICTURE), BOUNDS).bytes == len(PICTURE)
    for url in ("https://x/y.png", "data:text/plain,a long text", PICTURE + "ü"):
        assert openai_chat.images(part(type="image_url", image_url={"url": url}), BOUNDS).bytes == 0


@pytest.mark.parametrize(
    "params",
    [
        {"reasoning_effort": "low"},
        {"thinking": {"type": "adaptive"}},
        {"thinking": {"type": "enabled", "budget_tokens": 5}},
        {"reasoning": {"max_tokens": 5}},
        {"enable_thinking": True},
    ],
)
def test_a_call_that_asks_for_reasoning_is_told(params: dict[str, Any]) -> None:
    assert openai_chat.asks_for_reasoning(request(params=params))


@pytest.mark.parametrize("params", [{}, {"reasoning_effort": None}, {"reasoning_effort": "none"}, {"thinking": {"type": "disabled"}}])
def test_a_call_that_asks_for_none_is_told(params: dict[str, Any]) -> None:
    assert not openai_chat.asks_for_reasoning(request(params=params))
