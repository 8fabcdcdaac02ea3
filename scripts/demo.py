"""Serves `examples/starlette_app.py`. Run by scripts/demo, which has set the environment up."""

from __future__ import annotations

import argparse
import json
import os
import secrets
import socket
import sys
from pathlib import Path

import uvicorn
from rich.console import Console
from rich.panel import Panel

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "examples")]

console = Console(highlight=False)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/demo", description=(__doc__ or "").partition(".")[0])
    parser.add_argument("--port", type=int, default=8000, help="of 127.0.0.1; a free one where it is taken (default: 8000)")
    parser.add_argument("--tour", action="store_true", help="show what the gateway does, over the socket, and exit")
    parser.add_argument("--patient", action="store_true", help="with --tour: wait a rate limit out as well, up to a minute")
    parser.add_argument("--json", action="store_true", help="say where it serves and the keys as one line of JSON, for programs")
    return parser.parse_args()


def listen(port: int) -> socket.socket:
    try:
        return socket.create_server(("127.0.0.1", port))
    except OSError:
        listener = socket.create_server(("127.0.0.1", 0))
        print(f"Port {port} is taken; serving on {listener.getsockname()[1]}", file=sys.stderr)
        return listener


class DemoServer(uvicorn.Server):
    """Mints a key once it serves, and tells it."""

    def __init__(self, config: uvicorn.Config, *, as_json: bool) -> None:
        super().__init__(config)
        self._as_json = as_json

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.started or not sockets:
            return
        import starlette_app

        url = f"http://127.0.0.1:{sockets[0].getsockname()[1]}{starlette_app.MOUNT}"
        raw_key, _ = await starlette_app.gateway.create_key("demo", requests_per_minute=60, monthly_cap_usd="5.00")
        if self._as_json:
            print(json.dumps({"url": url, "key": raw_key}), flush=True)
        else:
            tell(url, raw_key, os.environ["AIGATEWAY_ADMIN_TOKEN"])


def tell(url: str, raw_key: str, admin_token: str) -> None:
    home = url.removesuffix("/api/ai-gateway")
    console.print(Panel.fit(f"The app: {home}/\nThe gateway inside it: {url}", title="Up"))
    console.print("A key, shown this once: 60 requests a minute, $5.00 a month", style="bold")
    console.print(f"  {raw_key}\n", soft_wrap=True)
    console.print("With curl", style="bold")
    plain(f"""\
curl {url}/complete \\
  -H 'authorization: Bearer {raw_key}' -H 'content-type: application/json' \\
  -d '{{"model": "echo", "messages": [{{"role": "user", "content": "hello"}}]}}'
""")
    console.print("With the official client: pip install openai", style="bold")
    plain(f"""\
from openai import OpenAI
client = OpenAI(base_url="{url}/v1", api_key="{raw_key}")
print(client.chat.completions.create(model="echo", messages=[{{"role": "user", "content": "hello"}}]).choices[0].message.content)
""")
    console.print("As the host's own user, and as its administrator", style="bold")
    plain(f"""\
curl '{home}/shout?text=hello' -H 'x-session: session-of-ana'
curl {url}/usage -H 'authorization: Bearer {admin_token}'
""")
    console.print("Ctrl-C stops it.", style="dim")


def plain(text: str) -> None:
    """Text to be copied: neither styled nor wrapped."""
    print(text, flush=True)


def serve(port: int, *, as_json: bool) -> int:
    os.environ.setdefault("AIGATEWAY_ADMIN_TOKEN", secrets.token_urlsafe(24))
    with listen(port) as listener:
        server = DemoServer(uvicorn.Config("starlette_app:app", log_level="warning"), as_json=as_json)
        try:
            server.run(sockets=[listener])
        except KeyboardInterrupt:  # uvicorn has stopped in good order and raises the signal again
            if not as_json:
                console.print("Stopped.")
        return 0 if server.started else 1


def main() -> int:
    options = arguments()
    if options.tour:
        import tour

        return tour.run(patient=options.patient)
    return serve(options.port, as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
