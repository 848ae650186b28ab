-- ipguard, schema 5, for PostgreSQL: who a user is.
-- Run it with the search path set to the schema that holds the tables.
--
-- Libraries written for schema 1 may use it. They leave both columns as they are.

-- The username as the host spells it; NULL if no library that knows spellings has written the user.
-- And the host's immutable key of the user, or NULL.
ALTER TABLE users ADD COLUMN spelling TEXT COLLATE "C", ADD COLUMN uid TEXT COLLATE "C";
CREATE UNIQUE INDEX users_by_uid ON users (uid) WHERE uid IS NOT NULL;

UPDATE schema_version SET version = 5;
