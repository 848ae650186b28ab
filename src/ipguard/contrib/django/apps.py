"""The application, as Django finds it in `INSTALLED_APPS`."""

from __future__ import annotations

from django.apps import AppConfig
from django.conf import settings
from django.contrib.auth.signals import user_login_failed
from django.core import checks
from django.core.signals import setting_changed
from django.db.models.signals import post_save, pre_delete

from ipguard.contrib import django as kit


class IPGuardConfig(AppConfig):
    """Connects the kit to the project's users and checks."""

    name = "ipguard.contrib.django"
    label = "ipguard"
    verbose_name = "IP restrictions"

    def ready(self) -> None:
        checks.register(kit.check_settings, checks.Tags.security)
        setting_changed.connect(kit.forget_kit)
        post_save.connect(kit.user_saved, sender=settings.AUTH_USER_MODEL)
        pre_delete.connect(kit.user_deleted, sender=settings.AUTH_USER_MODEL)
        kit.ignore_refusals(user_login_failed)
