"""The URLs of the page: `reverse("ipguard:page")`, or with `args=["history"]`."""

from django.urls import path

from ipguard.contrib.django import page

app_name = "ipguard"
urlpatterns = [path("", page, name="page"), path("<path:path>", page, name="page")]
