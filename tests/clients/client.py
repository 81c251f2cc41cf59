"""Runs each line of its input as SQL: rows, then `ok` or `error: ...`. Arguments: module, database."""
import sys

module, database = sys.argv[1:]
if module == "apsw":
    import apsw as library
    connection = library.Connection(database)
    connection.set_busy_timeout(20000)
    version, failure = library.sqlite_lib_version(), library.Error
else:
    if module == "pysqlite3":
        from pysqlite3 import dbapi2 as library
    else:
        import sqlite3 as library
    connection = library.connect(database, timeout=20, isolation_level=None)
    version, failure = library.sqlite_version, library.Error
print(version, flush=True)
for line in sys.stdin:
    try:
        for row in connection.cursor().execute(line):
            print("|".join("" if value is None else str(value) for value in row))
        print("ok", flush=True)
    except failure as error:
        print("error:", error, flush=True)
connection.close()
