-- ipguard, schema 7, for PostgreSQL: the record, and where users log in from.
-- Run it with the search path set to the schema that holds the tables.
--
-- Libraries written for schema 1 may use it. Restrictions that they end are kept too, by a trigger.
-- Their entries have no `salt`, so `verify` reports them; their restrictions have no `began`.

-- The random part of the token, in hexadecimal, and the digest of the restrictions that the entry
-- added and ended; '' if there are none, NULL in entries of older libraries.
ALTER TABLE changes ADD COLUMN salt TEXT COLLATE "C", ADD COLUMN restrictions TEXT COLLATE "C";
CREATE INDEX changes_by_time ON changes (at, revision);
CREATE INDEX changes_of_usernames ON changes (revision)
    WHERE action IN ('put_users', 'remove_users', 'rename_user');

-- The record begins after this revision.
ALTER TABLE head ADD COLUMN recorded BIGINT;
UPDATE head SET recorded = revision;

-- The revision at which the restriction came into force; 0 if that was before the record began, NULL
-- if an older library added it since. An import writes its restrictions before it has a revision:
-- they have its number, which is negative, and `imports` has the revision.
ALTER TABLE restrictions ADD COLUMN began BIGINT DEFAULT 0;
ALTER TABLE restrictions ALTER COLUMN began DROP DEFAULT;
CREATE INDEX restrictions_by_beginning ON restrictions (began, id);
CREATE TABLE imports (
    number BIGINT PRIMARY KEY CHECK (number < 0),
    revision BIGINT NOT NULL
);
CREATE INDEX imports_by_revision ON imports (revision);

-- Restrictions that ended, and at which revision. A restriction that was moved from one username to
-- another may be here more than once. `began` is never the number of an import.
CREATE TABLE past_restrictions (
    username TEXT COLLATE "C" NOT NULL,
    ended BIGINT NOT NULL,
    id TEXT COLLATE "C" NOT NULL,
    first_ip BYTEA NOT NULL,
    last_ip BYTEA NOT NULL,
    label TEXT COLLATE "C" NOT NULL,
    created_at BIGINT NOT NULL,
    created_by TEXT COLLATE "C" NOT NULL,
    expires_at BIGINT,
    began BIGINT,
    PRIMARY KEY (username, ended, id)
);
CREATE INDEX past_restrictions_by_beginning ON past_restrictions (began, id);
CREATE INDEX past_restrictions_by_end ON past_restrictions (ended, id);

-- A row that is deleted ends with the next entry of the audit log. One that was written since the
-- latest entry was never in force. A change that knows a later revision for a row has written it to
-- `past_restrictions` already.
CREATE FUNCTION keep_ended_restrictions() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    EXECUTE format(
        'INSERT INTO %1$I.past_restrictions (
            username, ended, id, first_ip, last_ip, label, created_at, created_by, expires_at, began
        )
        SELECT g.username, h.revision + 1, g.id, g.first_ip, g.last_ip, g.label, g.created_at,
            g.created_by, g.expires_at, COALESCE(i.revision, g.began)
        FROM gone g
        JOIN %1$I.head h ON h.id = 1
        LEFT JOIN %1$I.imports i ON i.number = g.began
        WHERE (g.began IS NULL OR COALESCE(i.revision, g.began) BETWEEN 0 AND h.revision)
            AND NOT EXISTS (
                SELECT 1 FROM %1$I.past_restrictions p
                WHERE p.username = g.username AND p.ended > h.revision AND p.id = g.id
            )',
        TG_TABLE_SCHEMA
    );
    RETURN NULL;
END
$$;
CREATE TRIGGER ended AFTER DELETE ON restrictions REFERENCING OLD TABLE AS gone
    FOR EACH STATEMENT EXECUTE FUNCTION keep_ended_restrictions();

-- An older library that renames a user deletes its restrictions and inserts them under the new
-- username, without `began`. They begin there when they end under the old one.
CREATE FUNCTION date_moved_restrictions() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    EXECUTE format(
        'SELECT p.ended FROM %1$I.head h JOIN %1$I.past_restrictions p ON p.ended = h.revision + 1
        WHERE h.id = 1 AND p.id = $1 LIMIT 1',
        TG_TABLE_SCHEMA
    ) INTO NEW.began USING NEW.id;
    RETURN NEW;
END
$$;
CREATE TRIGGER moved BEFORE INSERT ON restrictions
    FOR EACH ROW WHEN (NEW.began IS NULL) EXECUTE FUNCTION date_moved_restrictions();

-- How often a user gave the right password from an address, and when the user was last told about
-- refused logins.
CREATE TABLE sightings (
    username TEXT COLLATE "C" NOT NULL,
    address BYTEA NOT NULL,
    first_at BIGINT NOT NULL,
    last_at BIGINT NOT NULL,
    allowed BIGINT NOT NULL,
    refused BIGINT NOT NULL,
    told_at BIGINT,
    PRIMARY KEY (username, address),
    CHECK (length(address) IN (4, 16))
);
CREATE INDEX sightings_by_age ON sightings (last_at);

-- Roles that read or write restrictions keep working without running `grants` again.
DO $$
DECLARE
    role text;
    writes boolean;
BEGIN
    FOR role, writes IN
        SELECT CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE a.grantee::regrole::text END,
            bool_or(a.privilege_type = 'DELETE')
        FROM pg_class c, aclexplode(c.relacl) a
        WHERE c.oid = 'restrictions'::regclass AND a.privilege_type IN ('SELECT', 'DELETE')
            AND a.grantee <> c.relowner
        GROUP BY 1
    LOOP
        EXECUTE format('GRANT SELECT, INSERT, UPDATE, DELETE ON sightings TO %s', role);
        IF writes THEN
            EXECUTE format('GRANT SELECT, INSERT ON past_restrictions, imports TO %s', role);
        END IF;
    END LOOP;
END
$$;

UPDATE schema_version SET version = 7;
