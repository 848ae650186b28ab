#!/usr/bin/env python3
"""A sample bank on Django with ipguard. Needs django and ipguard[admin,cli].

python examples/site_django/manage.py    # then http://127.0.0.1:8004/
"""

import os
import sys

import django
from django.contrib import auth
from django.core.management import call_command, execute_from_command_line

PASSWORD = "correct horse"

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "bank.settings")
if sys.argv[1:]:
    sys.exit(execute_from_command_line(sys.argv))
django.setup()
if not django.conf.settings.IPGUARD["KEY_FILE"].exists():
    call_command("ipguard", "init")
    call_command("migrate", run_syncdb=True, verbosity=0)
    for name in ("rjones", "jsmith", "mlee"):  # rjones administers the others
        more = {"is_staff": name == "rjones", "account_id": "U1234567"}
        users = auth.get_user_model().objects
        users.create_user(name, f"{name}@bank.example", PASSWORD, **more)
print(f"http://127.0.0.1:8004/ as rjones, jsmith or mlee, {PASSWORD!r}", flush=True)
call_command("runserver", "127.0.0.1:8004", use_reloader=False)
