"""What is measured, and against what."""

from __future__ import annotations

import json
from typing import NamedTuple

from .load import NUMBER

CASES = ("hit", "miss", "stream")
CALL = "/v1/chat/completions"
SYSTEM = (
    "You answer questions of a team that runs web services. Use plain words and at most three sentences, say when you are not sure, and "
    "never repeat names of hosts, keys or customers."
)
QUESTION = (
    "One of our batch jobs used the whole quota of a shared API yesterday, and everybody who sat in front of a screen was refused for two "
    "hours. How does one usually keep a single caller from starving the others, and where does such a limit belong: into the client, into "
    "a proxy, or into the service itself?"
)
REPLY = "Into the proxy: clients change, and the service sees one credential. Give the batch job a limit of its own."
FOLLOW_UP = f"Explain in two sentences what a sliding window does, and when a bucket of tokens is better. This is question {NUMBER}."


class Case(NamedTuple):
    """One row. `base` is the row that it is compared with; `reaches` says whether each call goes on to the upstream."""

    name: str
    server: str
    label: str
    base: str | None
    stream: bool = False
    unique: bool = True
    reaches: bool = True


BARE = Case("bare", "bare", "bare Starlette", None, unique=False, reaches=False)
PASSED = Case("passed", "passthrough", "bare pass-through", None)
PASSED_STREAM = Case("passed_stream", "passthrough", "bare pass-through, stream", None, stream=True)
GATEWAY = {
    "hit": (BARE, Case("hit", "gateway", "gateway, cache hit", "bare", unique=False, reaches=False)),
    "miss": (PASSED, Case("miss", "gateway", "gateway, miss", "passed")),
    "stream": (PASSED_STREAM, Case("stream", "gateway", "gateway, stream", "passed_stream", stream=True)),
}


def chosen(names: list[str], workers: list[int]) -> list[Case]:
    """The rows of one round, in order: each case after its base, with more workers after one."""
    rows: list[Case] = []
    for name in names:
        base, one = GATEWAY[name]
        rows += [base, one]
        rows += [
            one._replace(name=f"{name}_{count}", server=f"gateway_{count}", label=f"{one.label}, {count} workers", base=name)
            for count in workers
        ]
    return rows


def body(stream: bool) -> str:
    """A conversation of some 1,200 bytes."""
    messages = [("system", SYSTEM), ("user", QUESTION), ("assistant", REPLY), ("user", FOLLOW_UP)]
    call = {
        "model": "gpt-4o-mini",
        "messages": [{"role": role, "content": content} for role, content in messages],
        "temperature": 0.2,
        "max_tokens": 256,
    }
    return json.dumps({**call, "stream": True, "stream_options": {"include_usage": True}} if stream else call)
