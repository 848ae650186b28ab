"""The settings of Django, and those of ipguard."""

import os
import secrets
from pathlib import Path

DATA = Path(os.environ.get("BANK_DATA", Path(__file__).resolve().parent.parent / "data"))
DATA.mkdir(exist_ok=True)
SECRET_KEY = os.environ.get("SECRET_KEY") or secrets.token_urlsafe(50)  # sessions end with it
DEBUG = False
ALLOWED_HOSTS = ["127.0.0.1", "localhost"]
ROOT_URLCONF = "bank.urls"
AUTH_USER_MODEL = "bank.Customer"
TIME_ZONE = "UTC"
LOGIN_URL = "login"
LOGIN_REDIRECT_URL = "home"
LOGOUT_REDIRECT_URL = "home"
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": DATA / "bank.db"}}
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
            ]
        },
    }
]
INSTALLED_APPS = [
    "bank",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "ipguard.contrib.django",
]
MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "ipguard.contrib.django.GuardMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
]
AUTHENTICATION_BACKENDS = [
    "ipguard.contrib.django.GuardBackend",
    "django.contrib.auth.backends.ModelBackend",
]
IPGUARD = {
    "URL": f"sqlite:///{DATA / 'ipguard.db'}",
    "KEY_FILE": DATA / "ipguard.key",
    "PROXIES": [],  # without a proxy, the connection's peer is the client
    "ACTOR": "bank.models.ipguard_actor",
    "MAIL": "console",  # prints the mails
}
