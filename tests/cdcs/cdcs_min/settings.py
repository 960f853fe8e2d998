"""Settings of the test CDCS. What differs between two instances comes from CDCS_TEST_* variables.

CDCS_TEST_DATABASE: the SQLite file; CDCS_TEST_MEDIA: the folder of uploaded documents;
CDCS_TEST_SECRET_KEY: Django's secret, the same for all processes of one instance.
"""

import os

SECRET_KEY = os.environ["CDCS_TEST_SECRET_KEY"]
MEDIA_ROOT = os.environ["CDCS_TEST_MEDIA"]
MEDIA_URL = "/media/"
STATIC_URL = "/static/"
DEBUG = False
ALLOWED_HOSTS = ["*"]  # it listens on 127.0.0.1 only
ROOT_URLCONF = "cdcs_min.urls"
WSGI_APPLICATION = "cdcs_min.wsgi.application"
SITE_ID = 1
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
USE_TZ = True
TIME_ZONE = "UTC"
LOGIN_URL = "core_main_app_login"

INSTALLED_APPS = [
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.sites",
    "django.contrib.staticfiles",
    "rest_framework",
    "rest_framework.authtoken",
    "drf_spectacular",
    "menu",
    "core_main_app",
]
MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
]
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.debug",
                "django.template.context_processors.request",
                "django.template.context_processors.i18n",  # the page of one record fails without it
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
                "core_main_app.utils.custom_context_processors.domain_context_processor",
            ]
        },
    }
]

DATABASES = {
    "default": {
        # core_main_app compares this name literally.
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": os.environ["CDCS_TEST_DATABASE"],
        "OPTIONS": {
            # A transaction that begins as a reader and then writes would get "database is locked" at once,
            # without the time-out, whenever another worker wrote in between.
            "transaction_mode": "IMMEDIATE",
            "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;",
            "timeout": 30,
        },
    }
}

# The order decides the status of a bad token: Session first, as in production, gives 403 instead of 401.
REST_FRAMEWORK = {
    "DEFAULT_AUTHENTICATION_CLASSES": [
        "rest_framework.authentication.SessionAuthentication",
        "rest_framework.authentication.TokenAuthentication",
    ],
    "DEFAULT_SCHEMA_CLASS": "drf_spectacular.openapi.AutoSchema",
}

# core_main_app reads these from here without a default, and refuses to start with another scheduler
# (which needs not be installed).
CELERYBEAT_SCHEDULER = "django_celery_beat.schedulers:DatabaseScheduler"
MONGODB_INDEXING = False
CAN_ANONYMOUS_ACCESS_PUBLIC_DOCUMENT = True
SERVER_URI = "http://127.0.0.1"
CUSTOM_NAME = "NexusLIMS"
