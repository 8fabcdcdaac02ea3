"""A Django project with a gateway: `asgi.py` says how it is served."""
