"""The customers, and who of them administers restrictions."""

from django.contrib.auth.models import AbstractUser
from django.db import models

from ipguard import Actor


class Customer(AbstractUser):
    account_id = models.CharField(max_length=64)


def ipguard_actor(request):
    u = request.user
    return Actor(username=u.username, email=u.email, manages={u.account_id}) if u.is_staff else None
