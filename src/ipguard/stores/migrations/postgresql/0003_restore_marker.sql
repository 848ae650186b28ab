-- ipguard, schema 3, for PostgreSQL: a schema that is being restored is not read.
-- Run it with the search path set to the schema that holds the tables.
--
-- Libraries written for schema 1 may use it.

-- Its one row says that the tables are complete. pg_dump and other tools write tables in the order
-- of their names, so this row is restored last. Without it, ipguard answers nothing. The row is
-- never updated: its xmin tells guards whether the tables are those that they read before.
CREATE TABLE zz_restore_marker (
    id BIGINT PRIMARY KEY CHECK (id = 1)
);
INSERT INTO zz_restore_marker (id) VALUES (1);

-- Emptying a table that ipguard never empties is the first step of restoring data in place.
CREATE FUNCTION remove_restore_marker() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    EXECUTE format('DELETE FROM %I.zz_restore_marker', TG_TABLE_SCHEMA);
    RETURN NULL;
END
$$;
CREATE TRIGGER emptied AFTER DELETE OR TRUNCATE ON head
    FOR EACH STATEMENT EXECUTE FUNCTION remove_restore_marker();
CREATE TRIGGER emptied AFTER DELETE OR TRUNCATE ON schema_version
    FOR EACH STATEMENT EXECUTE FUNCTION remove_restore_marker();
CREATE TRIGGER emptied AFTER DELETE OR TRUNCATE ON users
    FOR EACH STATEMENT EXECUTE FUNCTION remove_restore_marker();
CREATE TRIGGER emptied AFTER TRUNCATE ON restrictions
    FOR EACH STATEMENT EXECUTE FUNCTION remove_restore_marker();
CREATE TRIGGER emptied AFTER TRUNCATE ON changes
    FOR EACH STATEMENT EXECUTE FUNCTION remove_restore_marker();

-- Roles that read the head keep working without running `grants` again.
DO $$
DECLARE
    role text;
BEGIN
    FOR role IN
        SELECT DISTINCT CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE a.grantee::regrole::text END
        FROM pg_class c, aclexplode(c.relacl) a
        WHERE c.oid = 'head'::regclass AND a.privilege_type = 'SELECT' AND a.grantee <> c.relowner
    LOOP
        EXECUTE format('GRANT SELECT ON zz_restore_marker TO %s', role);
    END LOOP;
END
$$;

UPDATE schema_version SET version = 3;
