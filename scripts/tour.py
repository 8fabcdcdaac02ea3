"""The tour of scripts/demo: every feature over the socket, each answer checked for its values. Ends with 0 only if all came out right."""

from __future__ import annotations

import json
import math
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

HERE = Path(__file__).resolve().parent
WINDOW = 60.0
CLOCKS_DIFFER = 0.05
PADDING = "some text, so that a call costs something. " * 4
console = Console(highlight=False)


class WrongAnswer(Exception):
    """Something did not come out as it should."""


def check(condition: object, what: str) -> None:
    if not condition:
        raise WrongAnswer(what)


class Ledger:
    """What the tour's first key was told it paid; the usage report has to agree to the last digit."""

    def __init__(self) -> None:
        self.calls = 0
        self.cached = 0
        self.cost = Decimal(0)

    def add(self, answer: dict[str, Any]) -> None:
        self.calls += 1
        self.cached += bool(answer["cached"])
        self.cost += Decimal(answer["cost_usd"])


class Guide:
    """A visitor with a key, and the administrator who makes more of them."""

    def __init__(self, client: httpx.Client, raw_key: str, admin_token: str, *, patient: bool) -> None:
        self.client = client
        self.raw_key = raw_key
        self.patient = patient
        self.paid = Ledger()
        self._admin = {"authorization": f"Bearer {admin_token}"}

    def complete(self, text: str, *, key: str | None = None, model: str = "echo", max_tokens: int = 64) -> httpx.Response:
        body = {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": max_tokens}
        return self.client.post("/complete", json=body, headers=bearer(key or self.raw_key))

    def answer(self, text: str, *, model: str = "echo") -> tuple[httpx.Response, dict[str, Any]]:
        response = self.complete(text, model=model)
        check(response.status_code == 200, f"status {response.status_code}: {response.text}")
        answer: dict[str, Any] = response.json()
        self.paid.add(answer)
        return response, answer

    def new_key(self, name: str, **limits: object) -> dict[str, Any]:
        response = self.client.post("/keys", json={"name": name, **limits}, headers=self._admin)
        check(response.status_code == 201, f"creating a key: status {response.status_code}: {response.text}")
        created: dict[str, Any] = response.json()
        return created

    def key_facts(self, key_id: str) -> dict[str, Any]:
        response = self.client.get(f"/keys/{key_id}", headers=self._admin)
        check(response.status_code == 200, f"reading a key: status {response.status_code}: {response.text}")
        facts: dict[str, Any] = response.json()
        return facts


def bearer(raw_key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {raw_key}"}


def completion(guide: Guide) -> None:
    """A call costs what its tokens cost, to the nano-dollar: here $1.00 a million in, $2.00 a million out."""
    response, answer = guide.answer("A gateway inside your own app, no more, no less")
    usage = answer["usage"]
    price = Decimal(usage["input_tokens"]) * 1 + Decimal(usage["output_tokens"]) * 2
    check(answer["message"]["content"] == "A gateway inside your own app, no more, no less", "the answer is another text")
    check(Decimal(answer["cost_usd"]) == price / 10**6 > 0, f"cost {answer['cost_usd']}, not tokens times price")
    check(not answer["cached"] and response.headers["x-cache"] == "miss", "the first answer came from the cache")
    show(answer=answer["message"]["content"], provider=answer["provider"], tokens=tokens(usage), cost=dollars(answer["cost_usd"]))


def cached(guide: Guide) -> None:
    """The same call again costs nothing."""
    response, answer = guide.answer("A gateway inside your own app, no more, no less")
    check(answer["cached"] and response.headers["x-cache"] == "hit", "the same call was not answered from the cache")
    check(Decimal(answer["cost_usd"]) == 0, f"an answer from the cache cost {answer['cost_usd']}")
    show(answer=answer["message"]["content"], cache=f"hit, {response.headers['age']} s old", cost=dollars(answer["cost_usd"]))


def streamed(guide: Guide) -> None:
    """The pieces as they come, then the bill."""
    text = "These words come one by one, and the bill comes at the end"
    body = {"model": "echo", "messages": [{"role": "user", "content": text}], "stream": True}
    pieces: list[str] = []
    arrived: list[float] = []
    done: dict[str, Any] = {}
    with guide.client.stream("POST", "/complete", json=body, headers=bearer(guide.raw_key)) as response:
        check(response.status_code == 200, f"status {response.status_code}")
        console.print("  ", end="")
        for event, data in events(response.iter_lines()):
            if event == "delta":
                pieces.append(data.get("content") or "")
                arrived.append(time.monotonic())
                console.print(f"[green]{escape(pieces[-1].rstrip())}[/]", end=" ")
            elif event == "done":
                done = data
    console.print()
    check(done, "the stream ended without its bill")
    check("".join(pieces) == text == done["message"]["content"], "the pieces are not the text")
    check(len(pieces) > 5 and arrived[-1] - arrived[0] > 0.1, "the pieces came all at once")
    check(Decimal(done["cost_usd"]) > 0, "the stream was free")
    guide.paid.add(done)
    show(pieces=f"{len(pieces)} over {arrived[-1] - arrived[0]:.2f} s", tokens=tokens(done["usage"]), cost=dollars(done["cost_usd"]))


def events(lines: Iterator[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    event = ""
    for line in lines:
        field, _, value = line.partition(": ")
        if field == "event":
            event = value
        elif field == "data":
            yield event, json.loads(value)


def rate_limited(guide: Guide) -> None:
    """A key with three calls a minute. The fourth is told how long to wait, and that is the true wait of a window that slides."""
    key = guide.new_key("tour: three a minute", requests_per_minute=3)["key"]
    first_sent = time.monotonic()
    first = guide.complete("one", key=key)
    first_answered = time.monotonic()
    check([first.status_code, *(guide.complete(text, key=key).status_code for text in ("two", "three"))] == [200] * 3, "not three let in")
    refused_sent = time.monotonic()
    refused = guide.complete("four", key=key)
    refused_at = time.monotonic()
    check(refused.status_code == 429, f"the fourth call got {refused.status_code}")
    check(refused.json()["error"]["code"] == "rate_limit_exceeded", refused.text)
    wait = int(refused.headers["retry-after-ms"]) / 1000
    least, most = first_sent + WINDOW - refused_at, first_answered + WINDOW - refused_sent
    check(least - CLOCKS_DIFFER <= wait <= most + CLOCKS_DIFFER, f"told to wait {wait} s; the true wait is {least:.3f} to {most:.3f} s")
    check(int(refused.headers["retry-after"]) == math.ceil(wait), "retry-after is not the same wait in whole seconds")
    show(
        refused=f"429 {refused.json()['error']['code']}",
        told=f"wait {wait:.3f} s",
        true=f"the oldest call leaves the window in {least:.3f} to {most:.3f} s",
    )
    if guide.patient:
        with console.status(f"  waiting {wait:.0f} s"):
            time.sleep(wait)
        check(guide.complete("four", key=key).status_code == 200, "not let in after the wait")
        show(then="waited, and let in")


def capped(guide: Guide) -> None:
    """A key with a tiny cap. No call starts whose worst case does not fit, so the cap is never passed."""
    cap = Decimal("0.0008")
    created = guide.new_key("tour: a tiny cap", hard_cap_usd=str(cap))
    let_in, cost = 0, Decimal(0)
    while (response := guide.complete(f"Call number {let_in}: {PADDING}", key=created["key"])).status_code == 200:
        let_in += 1
        cost += Decimal(response.json()["cost_usd"])
        check(let_in < 200, "the cap never held")
    error = response.json()["error"]
    check(response.status_code == 402 and error["code"] == "spend_cap_exceeded", response.text)
    check(error["details"]["scope"] == "principal" and error["details"]["window"] == "total", response.text)
    check(response.headers["x-should-retry"] == "false", "the official clients would retry this")
    total = next(each for each in guide.key_facts(created["id"])["budgets"] if each["scope"] == "principal" and each["window"] == "total")
    check(let_in > 0 and Decimal(total["spent_usd"]) == cost, f"spent {total['spent_usd']}, answers said {cost}")
    check(cost + Decimal(total["held_usd"]) <= Decimal(total["cap_usd"]) == cap, "spent and held are above the cap")
    show(cap=dollars(cap), spent=f"{dollars(cost)} in {let_in} calls", refused=f"402 {error['code']}: {error['message']}")


def fallen_back(guide: Guide) -> None:
    """The first provider of this model always fails. The second answers, and only that is billed."""
    response, answer = guide.answer("Who is there?", model="echo-with-fallback")
    check(answer["provider"] == response.headers["x-aigateway-provider"] == "echo", f"answered by {answer['provider']}")
    attempts = [each for each in usage_of(guide)["data"] if each["request_id"] == answer["id"]]
    booked = {each["provider"]: (each["outcome"], Decimal(each["cost_usd"])) for each in attempts}
    check(
        booked == {"broken": ("released", Decimal(0)), "echo": ("completed", Decimal(answer["cost_usd"]))},
        f"booked {booked}",
    )
    show(asked="broken, then echo", answered=answer["provider"], billed=f"broken {dollars(0)}, echo {dollars(answer['cost_usd'])}")


def usage_of(guide: Guide) -> dict[str, Any]:
    response = guide.client.get("/usage", params={"group_by": "model"}, headers=bearer(guide.raw_key))
    check(response.status_code == 200, f"usage: status {response.status_code}: {response.text}")
    report: dict[str, Any] = response.json()
    return report


def reported(guide: Guide) -> None:
    """The books of the first key: the same sums as its answers said, to the last digit."""
    report = usage_of(guide)
    totals = report["totals"]
    table = Table("model", "calls", "from the cache", "tokens in", "tokens out", "cost")
    for group in report["groups"]:
        cells = (group["calls"], group["cached_calls"], group["input_tokens"], group["output_tokens"])
        table.add_row(group["by"]["model"], *map(str, cells), dollars(group["cost_usd"]))
    console.print(table)
    check(guide.paid.calls > 0, "there was no call to report")
    told = (guide.paid.calls, guide.paid.cached, guide.paid.cost)
    check(
        (totals["calls"], totals["cached_calls"], Decimal(totals["cost_usd"])) == told, f"the report says {totals}, the answers said {told}"
    )
    check(sum(Decimal(group["cost_usd"]) for group in report["groups"]) == guide.paid.cost, "the groups do not add up")
    show(total=f"{totals['calls']} calls, {totals['cached_calls']} from the cache, {dollars(totals['cost_usd'])}: as the answers said")


STOPS: Sequence[tuple[str, Callable[[Guide], None]]] = (
    ("A completion", completion),
    ("The same again", cached),
    ("A stream", streamed),
    ("A rate limit", rate_limited),
    ("A spend cap", capped),
    ("A fallback", fallen_back),
    ("The usage report", reported),
)


def show(**facts: str) -> None:
    for name, fact in facts.items():
        console.print(f"  [dim]{name:>9}[/]  {escape(fact)}", soft_wrap=True)


def tokens(usage: dict[str, int]) -> str:
    return f"{usage['input_tokens']} in, {usage['output_tokens']} out"


def dollars(amount: str | Decimal | int) -> str:
    return f"${Decimal(amount):f}"


@contextmanager
def demo_server(admin_token: str) -> Iterator[dict[str, str]]:
    """The demo as a process of its own, on a free port."""
    command = [sys.executable, str(HERE / "demo.py"), "--json", "--port", "0"]
    environment = {**os.environ, "AIGATEWAY_ADMIN_TOKEN": admin_token}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            check(line, "the server did not start")
            yield json.loads(line)
        finally:
            server.terminate()


def run(*, patient: bool) -> int:
    admin_token = secrets.token_urlsafe(24)
    failed = 0
    with demo_server(admin_token) as where, httpx.Client(base_url=where["url"], timeout=30) as client:
        console.print(Panel.fit(f"The gateway of an ordinary app, at {where['url']}", title="starlette_aigateway, a tour"))
        guide = Guide(client, where["key"], admin_token, patient=patient)
        for number, (title, stop) in enumerate(STOPS, 1):
            console.print(f"\n[bold]{number}. {title}[/]\n  [dim]{stop.__doc__}[/]", soft_wrap=True)
            try:
                stop(guide)
            except (WrongAnswer, httpx.HTTPError, LookupError, ValueError) as wrong:
                failed += 1
                console.print(f"  [red]wrong:[/] {escape(repr(wrong))}", soft_wrap=True)
    console.print(f"\n[bold]{'Everything came out as it should.' if not failed else f'{failed} of {len(STOPS)} came out wrong.'}[/]")
    return 1 if failed else 0
