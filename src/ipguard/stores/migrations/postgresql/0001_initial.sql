-- ipguard, schema 1, for PostgreSQL. Run it with the search path set to the schema that is to hold it.
--
-- Times are microseconds since 1970-01-01 UTC. Addresses are 4 or 16 bytes in network order, which
-- compare as addresses do. Usernames are canonical. `removed` is 0 or 1.

-- `oldest` is the oldest schema version that a library must have been written for to use this one.
CREATE TABLE schema_version (
    id BIGINT PRIMARY KEY CHECK (id = 1),
    version BIGINT NOT NULL,
    oldest BIGINT NOT NULL
);

-- The audit trail and the feed of guards in one. `touched` says whose policy the change touches:
-- NULL for nobody's, '*' for everybody's, else the usernames as a JSON array.
CREATE TABLE changes (
    revision BIGINT PRIMARY KEY,
    token TEXT COLLATE "C" NOT NULL,
    at BIGINT NOT NULL,
    actor TEXT COLLATE "C",
    actor_address TEXT COLLATE "C",
    action TEXT COLLATE "C" NOT NULL,
    username TEXT COLLATE "C",
    account_id TEXT COLLATE "C",
    detail TEXT COLLATE "C" NOT NULL,
    touched TEXT COLLATE "C"
);
CREATE INDEX changes_that_touch ON changes (revision) WHERE touched IS NOT NULL;
CREATE INDEX changes_of_account ON changes (account_id, revision);
CREATE INDEX changes_of_user ON changes (username, revision);

-- One row: where the trail is. A writer's first statement reads it, every append moves it.
CREATE TABLE head (
    id BIGINT PRIMARY KEY CHECK (id = 1),
    revision BIGINT NOT NULL,
    token TEXT COLLATE "C" NOT NULL,
    touching BIGINT NOT NULL  -- the last revision that touched a policy
);

CREATE TABLE users (
    username TEXT COLLATE "C" PRIMARY KEY,
    full_name TEXT COLLATE "C" NOT NULL,
    account_id TEXT COLLATE "C" NOT NULL,
    email TEXT COLLATE "C",
    removed BIGINT NOT NULL DEFAULT 0 CHECK (removed IN (0, 1))
);
CREATE INDEX users_of_account ON users (account_id, username);

-- What the overview's search looks up by its beginning.
CREATE TABLE search_terms (
    username TEXT COLLATE "C" NOT NULL,
    term TEXT COLLATE "C" NOT NULL,
    PRIMARY KEY (username, term)
);
CREATE INDEX search_terms_by_term ON search_terms (term, username);

-- In the order of a policy, so that reading one is a single walk.
CREATE TABLE restrictions (
    username TEXT COLLATE "C" NOT NULL,
    created_at BIGINT NOT NULL,
    id TEXT COLLATE "C" NOT NULL,
    first_ip BYTEA NOT NULL,
    last_ip BYTEA NOT NULL,
    label TEXT COLLATE "C" NOT NULL,
    created_by TEXT COLLATE "C" NOT NULL,
    expires_at BIGINT,
    PRIMARY KEY (username, created_at, id),
    CHECK (length(first_ip) IN (4, 16) AND length(first_ip) = length(last_ip) AND first_ip <= last_ip)
);
CREATE UNIQUE INDEX restrictions_by_id ON restrictions (id);
CREATE INDEX restrictions_by_address ON restrictions (first_ip, last_ip, username);

CREATE TABLE requests (
    id TEXT COLLATE "C" PRIMARY KEY,
    username TEXT COLLATE "C" NOT NULL,
    kind TEXT COLLATE "C" NOT NULL,
    first_ip BYTEA NOT NULL,
    last_ip BYTEA NOT NULL,
    label TEXT COLLATE "C" NOT NULL,
    requested_by TEXT COLLATE "C" NOT NULL,
    requested_at BIGINT NOT NULL,
    expires_at BIGINT NOT NULL,
    number_expires_at BIGINT NOT NULL,
    attempts_left BIGINT NOT NULL,
    state TEXT COLLATE "C" NOT NULL,
    restriction_id TEXT COLLATE "C",
    restriction_expires_at BIGINT,
    reason TEXT COLLATE "C" NOT NULL,
    email TEXT COLLATE "C" NOT NULL,
    key_id BYTEA NOT NULL,
    digest BYTEA NOT NULL,
    resends BIGINT NOT NULL,
    mails_failed BIGINT NOT NULL,
    sent_at BIGINT
);
CREATE INDEX requests_pending ON requests (username, requested_at, id) WHERE state = 'pending';
CREATE INDEX requests_of_actor ON requests (requested_by, requested_at);

CREATE TABLE failures (
    actor TEXT COLLATE "C" PRIMARY KEY,
    count BIGINT NOT NULL
);

-- Revision 0 has a token too: a cursor on an empty store must not fit another empty store.
INSERT INTO changes (revision, token, at, action, detail)
VALUES (0, left(replace(gen_random_uuid()::text, '-', ''), 16), 0, 'created', '');
INSERT INTO head (id, revision, token, touching) SELECT 1, 0, token, 0 FROM changes;
INSERT INTO schema_version (id, version, oldest) VALUES (1, 1, 1);
