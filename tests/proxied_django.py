"""The login server of `proxied_app` as a view of Django."""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

from django.conf import settings
from django.core.asgi import get_asgi_application
from django.core.wsgi import get_wsgi_application
from django.http import HttpRequest, HttpResponse
from django.urls import path

from tests.proxied_app import answer, others, setup


def login(request: HttpRequest) -> HttpResponse:
    more = [other.wsgi(request.META) for other in others]
    peer = request.META.get("REMOTE_ADDR")
    return HttpResponse(answer(setup["address_of"](request), more, peer, request.scheme))


urlpatterns = [path("", login)]
settings.configure(ALLOWED_HOSTS=["*"], ROOT_URLCONF=__name__, SECRET_KEY="x" * 50)
wsgi = get_wsgi_application()
asgi = setup.get("always_https", lambda app: app)(get_asgi_application())
