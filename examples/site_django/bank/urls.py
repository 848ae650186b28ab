"""The site: a home page, Django's own sign-in, and ipguard's page."""

from django.contrib.auth.decorators import login_required
from django.shortcuts import render
from django.urls import include, path


@login_required
def home(request):
    return render(request, "home.html")


urlpatterns = [
    path("", home, name="home"),
    path("", include("django.contrib.auth.urls")),
    path("ip-restrictions/", include("ipguard.contrib.django.urls")),
]
