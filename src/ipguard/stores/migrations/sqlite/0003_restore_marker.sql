-- ipguard, schema 3, for SQLite: a database that is being restored is not read.
--
-- Libraries written for schema 1 may use it.

-- Its one row says that the tables are complete. `.dump` writes tables in the order in which they
-- were created, and other tools in the order of their names, so this row is restored last. Without
-- it, ipguard answers nothing.
CREATE TABLE zz_restore_marker (
    id INTEGER PRIMARY KEY CHECK (id = 1)
);
INSERT INTO zz_restore_marker (id) VALUES (1);

-- Emptying a table that ipguard never empties is the first step of restoring data in place.
CREATE TRIGGER head_emptied AFTER DELETE ON head
BEGIN
    DELETE FROM zz_restore_marker;
END;
CREATE TRIGGER schema_version_emptied AFTER DELETE ON schema_version
BEGIN
    DELETE FROM zz_restore_marker;
END;
CREATE TRIGGER users_emptied AFTER DELETE ON users
BEGIN
    DELETE FROM zz_restore_marker;
END;

UPDATE schema_version SET version = 3;
