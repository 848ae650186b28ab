-- ipguard, schema 7, for SQLite: the record, and where users log in from.
--
-- Libraries written for schema 1 may use it. Restrictions that they end are kept too, by a trigger.
-- Their entries have no `salt`, so `verify` reports them; their restrictions have no `began`.

-- The random part of the token, in hexadecimal, and the digest of the restrictions that the entry
-- added and ended; '' if there are none, NULL in entries of older libraries.
ALTER TABLE changes ADD COLUMN salt TEXT;
ALTER TABLE changes ADD COLUMN restrictions TEXT;
CREATE INDEX changes_by_time ON changes (at, revision);
CREATE INDEX changes_of_usernames ON changes (revision)
    WHERE action IN ('put_users', 'remove_users', 'rename_user');

-- The record begins after this revision.
ALTER TABLE head ADD COLUMN recorded INTEGER;
UPDATE head SET recorded = revision;

-- The revision at which the restriction came into force; 0 if that was before the record began, NULL
-- if an older library added it since. An import writes its restrictions with its number, which is
-- negative, and `imports` has the revision.
ALTER TABLE restrictions ADD COLUMN began INTEGER;
UPDATE restrictions SET began = 0;
CREATE INDEX restrictions_by_beginning ON restrictions (began, id);
CREATE TABLE imports (
    number INTEGER PRIMARY KEY CHECK (number < 0),
    revision INTEGER NOT NULL
);
CREATE INDEX imports_by_revision ON imports (revision);

-- Restrictions that ended, and at which revision. A restriction that was moved from one username to
-- another may be here more than once. `began` is never the number of an import.
CREATE TABLE past_restrictions (
    username TEXT NOT NULL,
    ended INTEGER NOT NULL,
    id TEXT NOT NULL,
    first_ip BLOB NOT NULL,
    last_ip BLOB NOT NULL,
    label TEXT NOT NULL,
    created_at INTEGER NOT NULL,
    created_by TEXT NOT NULL,
    expires_at INTEGER,
    began INTEGER,
    PRIMARY KEY (username, ended, id)
) WITHOUT ROWID;
CREATE INDEX past_restrictions_by_beginning ON past_restrictions (began, id);
CREATE INDEX past_restrictions_by_end ON past_restrictions (ended, id);

-- A row that is deleted ends with the next entry of the audit log. One that was written since the
-- latest entry was never in force. A change that knows a later revision for a row has written it to
-- `past_restrictions` already.
CREATE TRIGGER restriction_ended AFTER DELETE ON restrictions
BEGIN
    INSERT INTO past_restrictions (
        username, ended, id, first_ip, last_ip, label, created_at, created_by, expires_at, began
    )
    SELECT OLD.username, h.revision + 1, OLD.id, OLD.first_ip, OLD.last_ip, OLD.label,
        OLD.created_at, OLD.created_by, OLD.expires_at, COALESCE(i.revision, OLD.began)
    FROM head h LEFT JOIN imports i ON i.number = OLD.began
    WHERE h.id = 1
        AND (OLD.began IS NULL OR COALESCE(i.revision, OLD.began) BETWEEN 0 AND h.revision)
        AND NOT EXISTS (
            SELECT 1 FROM past_restrictions p
            WHERE p.username = OLD.username AND p.ended > h.revision AND p.id = OLD.id
        );
END;

-- An older library that renames a user deletes its restrictions and inserts them under the new
-- username, without `began`. They begin there when they end under the old one.
CREATE TRIGGER restriction_moved AFTER INSERT ON restrictions WHEN NEW.began IS NULL
BEGIN
    UPDATE restrictions SET began = (
        SELECT p.ended FROM head h JOIN past_restrictions p ON p.ended = h.revision + 1
        WHERE h.id = 1 AND p.id = NEW.id LIMIT 1
    ) WHERE id = NEW.id;
END;

-- How often a user gave the right password from an address, and when the user was last told about
-- refused logins.
CREATE TABLE sightings (
    username TEXT NOT NULL,
    address BLOB NOT NULL,
    first_at INTEGER NOT NULL,
    last_at INTEGER NOT NULL,
    allowed INTEGER NOT NULL,
    refused INTEGER NOT NULL,
    told_at INTEGER,
    PRIMARY KEY (username, address),
    CHECK (length(address) IN (4, 16))
) WITHOUT ROWID;
CREATE INDEX sightings_by_age ON sightings (last_at);

UPDATE schema_version SET version = 7;
