"""The settings of the sample bank behind a proxy, from the environment of its server."""

import json
import os

from bank.settings import *  # noqa: F403
from bank.settings import IPGUARD

IPGUARD = IPGUARD | json.loads(os.environ["BANK_IPGUARD"])
CSRF_TRUSTED_ORIGINS = [os.environ["BANK_ORIGIN"]]
SECURE_PROXY_SSL_HEADER = ("HTTP_X_FORWARDED_PROTO", "https")
DEFAULT_FROM_EMAIL = "no-reply@bank.example"
