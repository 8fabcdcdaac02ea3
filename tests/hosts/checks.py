"""What is promised in every cell of the matrix. Each check takes a running cell; `CHECKS` names them as the table does."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from typing import Any

import httpx

from .cells import Cell, Running
from .common import COST, PREFIX
from .switchboard import PATIENCE, Switchboard

ADA = {"x-user": "ada"}
POOR = {"x-user": "poor"}


class Visitor:
    """A client of one running cell."""

    def __init__(self, cell: Cell, running: Running, board: Switchboard) -> None:
        self.cell = cell
        self.running = running
        self.board = board
        self.client = httpx.Client(base_url=running.url, timeout=PATIENCE, headers={"origin": running.url, "accept-encoding": "gzip"})

    def page(self, path: str, headers: dict[str, str] | None = None) -> httpx.Response:
        """A page of the host's own."""
        return self.client.get(self.running.outside + path, headers=headers)

    def get(self, path: str, headers: dict[str, str]) -> httpx.Response:
        return self.client.get(self.running.outside + PREFIX + path, headers=headers)

    def call(self, path: str, token: str, headers: dict[str, str], **more: Any) -> httpx.Response:
        return self.client.post(self.running.outside + PREFIX + path, json=body(token, **more), headers=headers)

    def stream(self, path: str, token: str) -> Any:
        return self.client.stream("POST", self.running.outside + PREFIX + path, json=body(token, stream=True), headers=ADA)


def body(token: str, **more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": token}], "max_tokens": 5, **more}


def starts_once_also_for_first_calls_at_the_same_time(visitor: Visitor) -> None:
    if visitor.cell.has_lifespan:
        visitor.board.wait("started")
    else:
        assert visitor.board.heard("started") == []
    with ThreadPoolExecutor(4) as together:
        answers = [*together.map(lambda number: visitor.call("/complete", f"call {number}", ADA), range(4))]
    assert [answer.json()["message"]["content"] for answer in answers] == [f"answer to call {number}" for number in range(4)]
    assert len(visitor.board.heard("started")) == 1


def answers_and_bills_a_whole_call(visitor: Visitor) -> None:
    answer = visitor.call("/complete", "whole", ADA)
    assert (answer.status_code, answer.json()["message"]["content"]) == (200, "answer to whole")
    assert Decimal(answer.json()["cost_usd"]) == Decimal(COST)
    totals = visitor.get("/usage", ADA).json()["totals"]
    assert (totals["calls"], Decimal(totals["cost_usd"])) == (5, 5 * Decimal(COST))


def keeps_the_host_s_own_pages_and_knows_where_it_stands(visitor: Visitor) -> None:
    own = visitor.page("/hello")
    assert (own.status_code, own.text) == (200, "hello from the host")
    assert visitor.get("/openapi.json", {}).json()["servers"] == [{"url": visitor.running.stands_at}]
    beside = visitor.page(f"{PREFIX}x/healthz")
    assert "error" not in beside.text
    for answer in (own, visitor.call("/complete", "whole", ADA)):
        if visitor.cell.nested:
            assert (answer.headers["x-passed"], answer.headers["content-encoding"]) == ("yes", "gzip")
            assert answer.headers["access-control-allow-origin"] in ("*", visitor.running.url)
            assert "session=" in answer.headers["set-cookie"]


def streams_piece_by_piece(visitor: Visitor) -> None:
    """The provider has nothing but the first piece before this client has it."""
    for path in ("/complete", "/v1/chat/completions"):
        token = f"streamed by {path}"
        with visitor.stream(path, token) as answer:
            pieces = answer.iter_text()
            assert "first " in next(pieces)
            visitor.board.go(token)
            rest = "".join(pieces)
        assert answer.status_code == 200
        assert "last" in rest
        assert ("event: done" in rest) if path == "/complete" else rest.endswith("data: [DONE]\n\n")


def books_a_stream_that_is_left_by_what_it_cost(visitor: Visitor) -> None:
    left = leave(visitor, "left")
    visitor.board.go("left")
    record = visitor.board.wait("record", request_id=left)
    assert (record["principal"], record["outcome"], Decimal(record["cost"])) == ("ada", "completed", Decimal(COST))


def leave(visitor: Visitor, token: str, method: str = "POST", path: str = f"{PREFIX}/complete") -> str:
    """On a connection of its own, which closes. Gives the id of the request."""
    asked = body(token, stream=True) if method == "POST" else None
    url = visitor.running.url + visitor.running.outside + path
    with httpx.Client(timeout=PATIENCE) as client, client.stream(method, url, headers=ADA, json=asked) as answer:
        assert "first " in next(answer.iter_text())
        return answer.headers["request-id"]


def notices_clients_that_left_and_closes_the_provider(visitor: Visitor) -> None:
    """Of the gateway, and of a route of the host. The provider is silent, so that only the client's leaving can end it: at the end of
    the drain, booked by an estimate."""
    left = {
        "silent": leave(visitor, "silent"),
        "own-silent": leave(visitor, "own-silent", "GET", "/streamed?token=own-silent"),
    }
    for token, request_id in left.items():
        visitor.board.wait("ended", token=token)
        record = visitor.board.wait("record", request_id=request_id)
        assert (record["principal"], record["outcome"]) == ("ada", "estimated")
        assert Decimal(0) < Decimal(record["cost"]) <= 1


def gives_refusals_their_own_status(visitor: Visitor) -> None:
    for stream in (False, True):
        assert code(visitor.call("/complete", "x", POOR, stream=stream)) == (402, "spend_cap_exceeded")
    assert visitor.call("/complete", "x", {}).status_code == 401


def serves_a_route_of_the_host_in_process(visitor: Visitor) -> None:
    answer = visitor.page("/ask", ADA)
    assert (answer.status_code, answer.json()["answer"], Decimal(answer.json()["cost"])) == (200, "answer to hello", Decimal(COST))
    assert code(visitor.page("/ask", POOR)) == (402, "spend_cap_exceeded")
    assert visitor.page("/ask").status_code == 401


def streams_a_route_of_the_host_piece_by_piece(visitor: Visitor) -> None:
    page = f"{visitor.running.outside}/streamed"
    with visitor.client.stream("GET", page, params={"token": "own"}, headers=ADA) as answer:
        pieces = answer.iter_text()
        assert "first " in next(pieces)
        visitor.board.go("own")
        assert "event: done" in "".join(pieces)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    assert code(visitor.page("/streamed?token=poor", POOR)) == (402, "spend_cap_exceeded")


def code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


CHECKS: tuple[Callable[[Visitor], None], ...] = (
    starts_once_also_for_first_calls_at_the_same_time,
    answers_and_bills_a_whole_call,
    keeps_the_host_s_own_pages_and_knows_where_it_stands,
    streams_piece_by_piece,
    books_a_stream_that_is_left_by_what_it_cost,
    gives_refusals_their_own_status,
    serves_a_route_of_the_host_in_process,
    streams_a_route_of_the_host_piece_by_piece,
    notices_clients_that_left_and_closes_the_provider,
)
