-- ipguard, schema 6, for SQLite: requests for changes.
--
-- Libraries written for schema 1 may use it. They know requests that add or end one restriction and
-- demand a number alone. While another request is pending its state is 'open', so that they neither
-- list nor confirm it.

-- What a request adds, ends, does, demands and has got, as JSON; NULL if an older library made it.
ALTER TABLE requests ADD COLUMN content TEXT;
-- The id of the first of several requests that one number confirms, or NULL.
ALTER TABLE requests ADD COLUMN batch TEXT;
CREATE INDEX requests_of_batch ON requests (batch) WHERE batch IS NOT NULL;
-- How many approvals a request demands.
ALTER TABLE requests ADD COLUMN approvals_needed INTEGER NOT NULL DEFAULT 0;

-- The condition of these indexes is that of the queries, word by word: databases use them for no
-- other. They use the first one for older libraries too, whose condition is its first half.
DROP INDEX requests_pending;
CREATE INDEX requests_pending ON requests (username, requested_at, id)
    WHERE state = 'pending' OR state = 'open';
CREATE INDEX requests_unexpired ON requests (expires_at, username)
    WHERE state = 'pending' OR state = 'open';
CREATE INDEX restrictions_by_expiry ON restrictions (expires_at, username)
    WHERE expires_at IS NOT NULL;

UPDATE schema_version SET version = 6;
