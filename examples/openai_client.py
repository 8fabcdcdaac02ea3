"""The official `openai` client against a running gateway: a base URL and a key, nothing else. Start `scripts/demo`, which prints both.

$ AIGATEWAY_URL=http://127.0.0.1:8000/api/ai-gateway AIGATEWAY_KEY=aigw_... python examples/openai_client.py
"""

from __future__ import annotations

import os
import sys

import openai


def main() -> int:
    model = os.environ.get("AIGATEWAY_MODEL", "echo")
    with openai.OpenAI(base_url=f"{os.environ['AIGATEWAY_URL']}/v1", api_key=os.environ["AIGATEWAY_KEY"]) as client:
        answer = client.chat.completions.create(model=model, messages=[{"role": "user", "content": "Hello from the official client"}])
        print(f"whole: {answer.choices[0].message.content}")

        print("streamed:", end=" ")
        stream = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "These words come one by one"}],
            stream=True,
            stream_options={"include_usage": True},
        )
        tokens = 0
        for chunk in stream:
            if chunk.choices:
                print(chunk.choices[0].delta.content or "", end="", flush=True)
            if chunk.usage is not None:
                tokens = chunk.usage.total_tokens
        print(f" ({tokens} tokens)")

        try:
            client.chat.completions.create(model="no-such-model", messages=[{"role": "user", "content": "hello"}])
        except openai.NotFoundError as error:
            print(f"an error as the client knows it: {error.status_code} {error.code}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
