"""The smallest Django project that serves the REST API of a real CDCS."""

# Imported so that core_main_app's shared tasks find an app that runs them at once, without a broker.
from cdcs_min.celery import app

__all__ = ["app"]
