-- ipguard, schema 2, for PostgreSQL: pages that cost the same however many users there are.
-- Run it with the search path set to the schema that holds the tables.
--
-- Libraries written for schema 1 may use it. What they write is found: the new columns are NULL
-- then. Only their own searches take longer.

-- The users in the order of their names, cut into pieces of about a thousand; the first username
-- that belongs to each.
CREATE TABLE search_blocks (
    first TEXT COLLATE "C" PRIMARY KEY,
    id BIGINT NOT NULL UNIQUE CHECK (id > 0)
);
INSERT INTO search_blocks (first, id) VALUES ('', 1);
INSERT INTO search_blocks (first, id)
SELECT username, 1 + place / 1000
FROM (SELECT username, row_number() OVER (ORDER BY username) AS place FROM users) u
WHERE place % 1000 = 0;

-- The block that the user is in: 0 where the term is the username, NULL where nobody has said yet.
-- The account of the user; NULL where the term is its name, or the username.
DROP INDEX search_terms_by_term;
ALTER TABLE search_terms ADD COLUMN block BIGINT, ADD COLUMN account_id TEXT COLLATE "C";
UPDATE search_terms t SET
    block = CASE WHEN t.term = t.username THEN 0 ELSE u.block END,
    account_id = CASE WHEN t.term IN (t.username, lower(u.account_id)) THEN NULL ELSE u.account_id END
FROM (
    SELECT username, account_id, 1 + row_number() OVER (ORDER BY username) / 1000 AS block FROM users
) u
WHERE t.username = u.username;
CREATE INDEX search_terms_of_block ON search_terms (block, term, username) WHERE block > 0;
CREATE INDEX search_terms_of_account ON search_terms (account_id, block, term, username)
    WHERE account_id IS NOT NULL;
CREATE INDEX search_terms_unplaced ON search_terms (term, username) WHERE block IS NULL;

CREATE INDEX users_of_account_present ON users (account_id, removed, username);
CREATE INDEX users_by_presence ON users (removed, username, account_id);

-- How many bytes of the first address the last one begins with, and 100 more for IPv6: runs of
-- addresses that share as much, and hold an address, begin near it. The queries say the same words.
CREATE INDEX restrictions_of_network ON restrictions (
    (CASE length(first_ip)
        WHEN 16 THEN CASE
            WHEN substr(first_ip, 1, 1) <> substr(last_ip, 1, 1) THEN 100
            WHEN substr(first_ip, 1, 2) <> substr(last_ip, 1, 2) THEN 101
            WHEN substr(first_ip, 1, 3) <> substr(last_ip, 1, 3) THEN 102
            WHEN substr(first_ip, 1, 4) <> substr(last_ip, 1, 4) THEN 103
            WHEN substr(first_ip, 1, 5) <> substr(last_ip, 1, 5) THEN 104
            WHEN substr(first_ip, 1, 6) <> substr(last_ip, 1, 6) THEN 105
            WHEN substr(first_ip, 1, 7) <> substr(last_ip, 1, 7) THEN 106
            WHEN substr(first_ip, 1, 8) <> substr(last_ip, 1, 8) THEN 107
            WHEN substr(first_ip, 1, 9) <> substr(last_ip, 1, 9) THEN 108
            WHEN substr(first_ip, 1, 10) <> substr(last_ip, 1, 10) THEN 109
            WHEN substr(first_ip, 1, 11) <> substr(last_ip, 1, 11) THEN 110
            WHEN substr(first_ip, 1, 12) <> substr(last_ip, 1, 12) THEN 111
            WHEN substr(first_ip, 1, 13) <> substr(last_ip, 1, 13) THEN 112
            WHEN substr(first_ip, 1, 14) <> substr(last_ip, 1, 14) THEN 113
            WHEN substr(first_ip, 1, 15) <> substr(last_ip, 1, 15) THEN 114
            WHEN substr(first_ip, 1, 16) <> substr(last_ip, 1, 16) THEN 115
            ELSE 116 END
        ELSE CASE
            WHEN substr(first_ip, 1, 1) <> substr(last_ip, 1, 1) THEN 0
            WHEN substr(first_ip, 1, 2) <> substr(last_ip, 1, 2) THEN 1
            WHEN substr(first_ip, 1, 3) <> substr(last_ip, 1, 3) THEN 2
            WHEN substr(first_ip, 1, 4) <> substr(last_ip, 1, 4) THEN 3
            ELSE 4 END
    END),
    first_ip, last_ip, username
);

-- Who could write terms goes on doing so, in blocks.
DO $$
DECLARE
    role text;
BEGIN
    FOR role IN
        SELECT DISTINCT CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE a.grantee::regrole::text END
        FROM pg_class c, aclexplode(c.relacl) a
        WHERE c.oid = 'search_terms'::regclass AND a.privilege_type = 'INSERT'
            AND a.grantee <> c.relowner
    LOOP
        EXECUTE format('GRANT SELECT, INSERT ON search_blocks TO %s', role);
        EXECUTE format('GRANT UPDATE ON search_terms TO %s', role);
    END LOOP;
END
$$;

-- Who reads policies waits for what follows, until the commit.
DROP INDEX users_of_account;
ALTER INDEX users_of_account_present RENAME TO users_of_account;
DROP INDEX restrictions_by_address;

UPDATE schema_version SET version = 2;
