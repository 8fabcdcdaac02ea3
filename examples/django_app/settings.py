"""What Django needs. No database: who is logged in stands in a signed cookie."""

import os

SECRET_KEY = os.environ.get("DJANGO_SECRET_KEY", "only for an example")
ALLOWED_HOSTS = ["127.0.0.1", "localhost"]
ROOT_URLCONF = "django_app.urls"
MIDDLEWARE = ["django_app.refusals.Refusals"]
USE_TZ = True
