"""An app whose gateway cannot start: a file lies where its directory would be."""

from pathlib import Path

from starlette.applications import Starlette

from starlette_aigateway import AIGateway, AIGatewayMiddleware
from starlette_aigateway.providers import EchoProvider

app = AIGatewayMiddleware(Starlette(), AIGateway(providers=[EchoProvider()], data_dir=Path(__file__)))
