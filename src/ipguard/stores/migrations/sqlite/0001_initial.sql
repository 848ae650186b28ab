-- ipguard, schema 1, for SQLite.
--
-- Times are microseconds since 1970-01-01 UTC. Addresses are 4 or 16 bytes in network order, which
-- compare as addresses do. Usernames are canonical. `removed` is 0 or 1.

PRAGMA application_id = 0x49504764;  -- "IPGd": another program's database is never taken for ours

-- `oldest` is the oldest schema version that a library must have been written for to use this one.
CREATE TABLE schema_version (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    version INTEGER NOT NULL,
    oldest INTEGER NOT NULL
);

-- The audit trail and the feed of guards in one. `touched` says whose policy the change touches:
-- NULL for nobody's, '*' for everybody's, else the usernames as a JSON array.
CREATE TABLE changes (
    revision INTEGER PRIMARY KEY,
    token TEXT NOT NULL,
    at INTEGER NOT NULL,
    actor TEXT,
    actor_address TEXT,
    action TEXT NOT NULL,
    username TEXT,
    account_id TEXT,
    detail TEXT NOT NULL,
    touched TEXT
);
CREATE INDEX changes_that_touch ON changes (revision) WHERE touched IS NOT NULL;
CREATE INDEX changes_of_account ON changes (account_id, revision);
CREATE INDEX changes_of_user ON changes (username, revision);

-- One row: where the trail is. A writer's first statement reads it, every append moves it.
CREATE TABLE head (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    revision INTEGER NOT NULL,
    token TEXT NOT NULL,
    touching INTEGER NOT NULL  -- the last revision that touched a policy
);

CREATE TABLE users (
    username TEXT PRIMARY KEY,
    full_name TEXT NOT NULL,
    account_id TEXT NOT NULL,
    email TEXT,
    removed INTEGER NOT NULL DEFAULT 0 CHECK (removed IN (0, 1))
) WITHOUT ROWID;
CREATE INDEX users_of_account ON users (account_id, username);

-- What the overview's search looks up by its beginning.
CREATE TABLE search_terms (
    username TEXT NOT NULL,
    term TEXT NOT NULL,
    PRIMARY KEY (username, term)
) WITHOUT ROWID;
CREATE INDEX search_terms_by_term ON search_terms (term, username);

-- In the order of a policy, so that reading one is a single walk.
CREATE TABLE restrictions (
    username TEXT NOT NULL,
    created_at INTEGER NOT NULL,
    id TEXT NOT NULL,
    first_ip BLOB NOT NULL,
    last_ip BLOB NOT NULL,
    label TEXT NOT NULL,
    created_by TEXT NOT NULL,
    expires_at INTEGER,
    PRIMARY KEY (username, created_at, id),
    CHECK (length(first_ip) IN (4, 16) AND length(first_ip) = length(last_ip) AND first_ip <= last_ip)
) WITHOUT ROWID;
CREATE UNIQUE INDEX restrictions_by_id ON restrictions (id);
CREATE INDEX restrictions_by_address ON restrictions (first_ip, last_ip, username);

CREATE TABLE requests (
    id TEXT PRIMARY KEY,
    username TEXT NOT NULL,
    kind TEXT NOT NULL,
    first_ip BLOB NOT NULL,
    last_ip BLOB NOT NULL,
    label TEXT NOT NULL,
    requested_by TEXT NOT NULL,
    requested_at INTEGER NOT NULL,
    expires_at INTEGER NOT NULL,
    number_expires_at INTEGER NOT NULL,
    attempts_left INTEGER NOT NULL,
    state TEXT NOT NULL,
    restriction_id TEXT,
    restriction_expires_at INTEGER,
    reason TEXT NOT NULL,
    email TEXT NOT NULL,
    key_id BLOB NOT NULL,
    digest BLOB NOT NULL,
    resends INTEGER NOT NULL,
    mails_failed INTEGER NOT NULL,
    sent_at INTEGER
) WITHOUT ROWID;
CREATE INDEX requests_pending ON requests (username, requested_at, id) WHERE state = 'pending';
CREATE INDEX requests_of_actor ON requests (requested_by, requested_at);

CREATE TABLE failures (
    actor TEXT PRIMARY KEY,
    count INTEGER NOT NULL
) WITHOUT ROWID;

-- Revision 0 has a token too: a cursor on an empty store must not fit another empty store.
INSERT INTO changes (revision, token, at, action, detail)
VALUES (0, lower(hex(randomblob(8))), 0, 'created', '');
INSERT INTO head (id, revision, token, touching) SELECT 1, 0, token, 0 FROM changes;
INSERT INTO schema_version (id, version, oldest) VALUES (1, 1, 1);
