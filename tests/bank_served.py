"""The settings of the sample bank as `tests.hosts` serves it."""

import os

from bank.settings import *  # noqa: F403
from bank.settings import IPGUARD

IPGUARD = IPGUARD | {
    "URL": os.environ["IPGUARD_URL"],
    "PROXIES": os.environ.get("PROXIES", "").split(),
    "UNIX_SOCKET": "UNIX_SOCKET" in os.environ,
}
SECURE_PROXY_SSL_HEADER = ("HTTP_X_FORWARDED_PROTO", "https")
