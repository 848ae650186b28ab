-- ipguard, schema 4, for SQLite: one table of search terms, without blocks.
--
-- Libraries written for schema 1 may use it. Each of their terms is found: a term without an account
-- was written by one of them. `block` and the table `search_blocks` are there for them only.

DROP INDEX search_terms_of_block;
DROP INDEX search_terms_of_account;
DROP INDEX search_terms_unplaced;

-- Words end at hyphens and apostrophes too. The terms of names have an account; a name may also be
-- the username.
INSERT OR IGNORE INTO search_terms (username, term, account_id)
WITH RECURSIVE marks (mark) AS (
    VALUES ('-'), (''''), ('"'), ('`'), (','), ('.'), (';'), (':'), ('('), (')'), ('['), (']'),
        ('/'), ('«'), ('·'), ('»'), ('ʹ'), ('ʺ'), ('ʻ'), ('ʼ'), ('‐'), ('‑'), ('‒'), ('–'), ('—'),
        ('―'), ('‖'), ('‗'), ('‘'), ('’'), ('‚'), ('‛'), ('“'), ('”'), ('„'), ('‟'), ('′'), ('・')
),
parts (username, account_id, term) AS (
    SELECT t.username, u.account_id, t.term
    FROM search_terms t JOIN users u ON u.username = t.username
    WHERE (t.account_id IS NOT NULL OR lower(u.full_name) = t.term)
        AND t.term GLOB '*[]-''"`,.;:()[/«·»ʹʺʻʼ‐‑‒–—―‖‗‘’‚‛“”„‟′・]*'
    UNION
    SELECT p.username, p.account_id, ltrim(substr(p.term, instr(p.term, m.mark) + 1))
    FROM parts p CROSS JOIN marks m
    WHERE instr(p.term, m.mark) > 0
)
SELECT username, term, account_id FROM parts WHERE term <> '';

UPDATE search_terms SET block = NULL, account_id = (
    SELECT u.account_id FROM users u WHERE u.username = search_terms.username
);
CREATE INDEX search_terms_by_term ON search_terms (term, username);
CREATE INDEX search_terms_of_account ON search_terms (account_id, term, username);
CREATE INDEX search_terms_of_block ON search_terms (block, term, username) WHERE block > 0;

UPDATE schema_version SET version = 4;
