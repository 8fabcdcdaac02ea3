"""`python -m starlette_aigateway`: the `aigateway` command."""

from .cli import main

main()
