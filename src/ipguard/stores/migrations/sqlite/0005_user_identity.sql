-- ipguard, schema 5, for SQLite: who a user is.
--
-- Libraries written for schema 1 may use it. They leave both columns as they are.

-- The username as the host spells it; NULL if no library that knows spellings has written the user.
ALTER TABLE users ADD COLUMN spelling TEXT;
-- The host's immutable key of the user, or NULL.
ALTER TABLE users ADD COLUMN uid TEXT;
CREATE UNIQUE INDEX users_by_uid ON users (uid) WHERE uid IS NOT NULL;

UPDATE schema_version SET version = 5;
