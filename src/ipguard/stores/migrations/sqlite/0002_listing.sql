-- ipguard, schema 2, for SQLite: pages that cost the same however many users there are.
--
-- Libraries written for schema 1 may use it. What they write is found: the new columns are NULL
-- then. Only their own searches take longer.

-- The users in the order of their names, cut into pieces of about a thousand; the first username
-- that belongs to each.
CREATE TABLE search_blocks (
    first TEXT PRIMARY KEY,
    id INTEGER NOT NULL UNIQUE CHECK (id > 0)
) WITHOUT ROWID;
INSERT INTO search_blocks (first, id) VALUES ('', 1);
INSERT INTO search_blocks (first, id)
SELECT username, 1 + place / 1000
FROM (SELECT username, row_number() OVER (ORDER BY username) AS place FROM users)
WHERE place % 1000 = 0;

-- The block that the user is in: 0 where the term is the username, NULL where nobody has said yet.
-- The account of the user; NULL where the term is its name, or the username.
DROP INDEX search_terms_by_term;
ALTER TABLE search_terms ADD COLUMN block INTEGER;
ALTER TABLE search_terms ADD COLUMN account_id TEXT;
UPDATE search_terms SET
    block = CASE WHEN term = username THEN 0 ELSE (
        SELECT b.id FROM search_blocks b WHERE b.first <= search_terms.username
        ORDER BY b.first DESC LIMIT 1
    ) END,
    account_id = CASE WHEN term = username THEN NULL ELSE (
        SELECT u.account_id FROM users u
        WHERE u.username = search_terms.username AND lower(u.account_id) <> search_terms.term
    ) END;
CREATE INDEX search_terms_of_block ON search_terms (block, term, username) WHERE block > 0;
CREATE INDEX search_terms_of_account ON search_terms (account_id, block, term, username)
    WHERE account_id IS NOT NULL;
CREATE INDEX search_terms_unplaced ON search_terms (term, username) WHERE block IS NULL;

-- How many bytes of the first address the last one begins with, and 100 more for IPv6: runs of
-- addresses that share as much, and hold an address, begin near it. The queries say the same words.
DROP INDEX restrictions_by_address;
CREATE INDEX restrictions_of_network ON restrictions (
    CASE length(first_ip)
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
    END,
    first_ip, last_ip, username
);

DROP INDEX users_of_account;
CREATE INDEX users_of_account ON users (account_id, removed, username);
CREATE INDEX users_by_presence ON users (removed, username, account_id);

UPDATE schema_version SET version = 2;
