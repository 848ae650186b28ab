#!/usr/bin/env python3
# mypy: disable-error-code="import-untyped,untyped-decorator"
"""The page mounted next to a Django project, with its users and sessions. Needs django.

    python examples/page_django.py    # then http://127.0.0.1:8004/ip-restrictions/

In a project, `create_app` belongs in wsgi.py; the rest is a project in one file.
"""

from __future__ import annotations

import secrets
import tempfile
from pathlib import Path
from typing import Any

import django
from django.conf import settings
from page_sample import ADMINISTRATOR, CLIENT, PASSWORD, actor_for, open_sample
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.serving import run_simple
from werkzeug.utils import redirect
from werkzeug.wrappers import Request

import ipguard
from ipguard.admin import wsgi_app

if not settings.configured:
    settings.configure(
        SECRET_KEY=secrets.token_urlsafe(50),
        ALLOWED_HOSTS=["*"],
        ROOT_URLCONF=__name__,
        INSTALLED_APPS=[
            "django.contrib.auth",
            "django.contrib.contenttypes",
            "django.contrib.sessions",
        ],
        MIDDLEWARE=[
            "django.contrib.sessions.middleware.SessionMiddleware",
            "django.contrib.auth.middleware.AuthenticationMiddleware",
        ],
        DATABASES={
            "default": {
                "ENGINE": "django.db.backends.sqlite3",
                "NAME": Path(tempfile.mkdtemp()) / "django.db",
            }
        },
        USE_TZ=True,
    )
    django.setup()

# These modules of Django can only be imported after django.setup().
from django.contrib import auth
from django.contrib.sessions.middleware import SessionMiddleware
from django.core.handlers.wsgi import WSGIRequest
from django.core.management import call_command
from django.core.wsgi import get_wsgi_application
from django.db import close_old_connections
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.urls import path
from django.views.decorators.csrf import csrf_exempt

FORM = """<!doctype html><title>Sign in</title><form method="post">
<label>Username <input name="username"></label>
<label>Password <input name="password" type="password"></label><button>Sign in</button></form>"""


def authenticate(asked: Request) -> Any:
    # The page runs outside Django, so look up the session and the user here.
    close_old_connections()
    request = WSGIRequest(asked.environ)
    SessionMiddleware(lambda _: HttpResponse()).process_request(request)
    user = auth.get_user(request)
    if not user.is_authenticated:
        return redirect("/login", 303)
    return actor_for(user.get_username(), CLIENT.wsgi(request.META))


def create_app(flow: ipguard.Workflow, guard: ipguard.Guard) -> Any:
    page = wsgi_app(flow, guard, authenticate=authenticate, brand="Example Bank")
    return DispatcherMiddleware(get_wsgi_application(), {"/ip-restrictions": page})


# ------------------------------------------------------------------ the project


@csrf_exempt  # for brevity; a project uses Django's own login view
def login(request: HttpRequest) -> HttpResponse:
    user = auth.authenticate(
        request,
        username=request.POST.get("username", ""),
        password=request.POST.get("password", ""),
    )
    if user is None:
        return HttpResponse(FORM, status=200 if request.method == "GET" else 401)
    auth.login(request, user)
    return HttpResponseRedirect("/ip-restrictions/")


urlpatterns = [path("login", login)]


def fill() -> None:
    """Create the project's tables and its user."""
    call_command("migrate", verbosity=0)
    users = auth.get_user_model().objects
    if not users.filter(username=ADMINISTRATOR).exists():
        users.create_user(ADMINISTRATOR, password=PASSWORD)


if __name__ == "__main__":
    fill()
    print(f"http://127.0.0.1:8004/ip-restrictions/ as {ADMINISTRATOR}, {PASSWORD!r}", flush=True)
    run_simple("127.0.0.1", 8004, create_app(*open_sample()), threaded=True)
