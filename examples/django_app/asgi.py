"""A Django project with the gateway around its ASGI app. Django has no lifespan; the middleware gives it one.

    $ uvicorn --app-dir examples django_app.asgi:application --port 8000

Log in at /login/ana, then ask at /shout. Everything is kept in `AIGATEWAY_DATA_DIR` (.demo-data).
"""

import os

from django.core.asgi import get_asgi_application

from starlette_aigateway import AIGatewayMiddleware

from .ai import gateway

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "django_app.settings")
application = AIGatewayMiddleware(get_asgi_application(), gateway, path="/api/ai-gateway")
