"""The smoke test of `dev.py build`, which runs with the wheel and its dependencies alone."""

import sys
import tempfile
from pathlib import Path

import ipguard

HEAVY = {"sqlite3", "smtplib", "ssl", "fastapi", "starlette", "django", "flask", "psycopg"}

loaded = HEAVY & set(sys.modules)
assert not loaded, f"import ipguard loads {loaded}"
assert Path(sys.prefix) in Path(ipguard.__file__).parents, f"not the wheel: {ipguard.__file__}"
assert Path(ipguard.__file__).with_name("py.typed").is_file()
migrations = Path(ipguard.__file__).parent / "stores" / "migrations"
assert list(migrations.rglob("*.sql")), "the wheel has no migrations"

boss = ipguard.Actor(username="boss", email="boss@example.com", manages=ipguard.Actor.EVERY_ACCOUNT)
user = ipguard.User(username="jsmith", full_name="John Smith", account_id="U1")
with tempfile.TemporaryDirectory() as folder:
    for url in ("memory://", f"sqlite:///{folder}/smoke.db"):
        with ipguard.open_store(url) as store, ipguard.Guard(store) as guard:
            from ipguard.testing import Outbox

            flow = ipguard.Workflow(store, Outbox(), key=bytes(32))
            store.put_users([user])
            assert guard.is_allowed("jsmith", "203.0.113.8"), "refused without restrictions"
            applied = flow.impose(boss, "jsmith", "203.0.113.7", reason="smoke")
            assert guard.wait_for(applied.revision, 10), "the guard did not see the change"
            assert guard.is_allowed("jsmith", "203.0.113.7"), "refused a listed address"
            assert not guard.is_allowed("jsmith", "203.0.113.8"), "allowed another address"
            assert not guard.is_allowed("jsmith", "junk"), "allowed a malformed address"
print(f"smoke: ipguard {ipguard.__version__} works on Python {sys.version.split()[0]}")
