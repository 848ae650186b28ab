"""The settings of the sample bank for tests: with django-axes, which a test turns on."""

from bank.settings import *  # noqa: F403
from bank.settings import INSTALLED_APPS, MIDDLEWARE

SECRET_KEY = "a test's key, long enough for Django's check of its length and of its letters"
ALLOWED_HOSTS = ["*"]
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
DEFAULT_FROM_EMAIL = "no-reply@bank.example"
INSTALLED_APPS = [*INSTALLED_APPS, "axes"]
MIDDLEWARE = [*MIDDLEWARE, "axes.middleware.AxesMiddleware"]
AXES_ENABLED = False
AXES_FAILURE_LIMIT = 3
AXES_LOCKOUT_PARAMETERS = ["username"]
MAILERS = {"default": {"BACKEND": "django.core.mail.backends.locmem.EmailBackend"}}  # from 6.1 on
