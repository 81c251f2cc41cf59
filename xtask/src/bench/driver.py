"""The application of `cargo xtask bench`: an ordinary Python program on the sqlite3 module.

It keeps one connection per database open, in autocommit mode, and does what it is told: each line of input is a JSON
object {"do": NAME, ...}, each line of output the answer, {"error": TEXT} when it went wrong.
"""

import json
import os
import random
import sqlite3
import sys
import time

INSERT = "INSERT INTO t(v) VALUES (?)"
VALUE = "x" * 100

connections = {}


def connect(path):
    # isolation_level=None: autocommit, every statement is a transaction of its own.
    return sqlite3.connect(path, timeout=30, isolation_level=None)


def version():
    return {"sqlite": sqlite3.sqlite_version, "python": sys.version.split()[0]}


def create(path, mode, rows):
    """Makes a database with rows in one transaction, switches its journal mode, and closes it."""
    db = connect(path)
    now = db.execute(f"PRAGMA journal_mode={mode}").fetchone()[0]
    if now != mode:
        raise RuntimeError(f"{path}: the journal mode is {now}, not {mode}")
    db.execute("CREATE TABLE t(id INTEGER PRIMARY KEY, v)")
    db.execute("BEGIN")
    db.executemany(INSERT, ((VALUE,) for _ in range(rows)))
    db.execute("COMMIT")
    db.close()
    return {}


def create_large(path, bytes):
    """Makes a database of about so many bytes, of which LZ4 can compress a half."""
    db = connect(path)
    db.execute("PRAGMA journal_mode=OFF")
    db.execute("PRAGMA synchronous=OFF")
    db.execute("CREATE TABLE t(id INTEGER PRIMARY KEY, v)")
    db.execute("BEGIN")
    # Two rows fill a page of 4096 bytes.
    row = 2000
    filler = b"litefs " * (row // 14)
    db.executemany(INSERT, ((os.urandom(row - len(filler)) + filler,) for _ in range(bytes // 2048)))
    db.execute("COMMIT")
    db.execute("PRAGMA journal_mode=WAL")
    db.close()
    return {"bytes": os.path.getsize(path)}


def open_database(name, path, synchronous):
    db = connect(path)
    db.execute(f"PRAGMA synchronous={synchronous}")
    rows = db.execute("SELECT max(id) FROM t").fetchone()[0] or 0
    connections[name] = (db, rows)
    return {"rows": rows}


def close_database(name):
    connections.pop(name)[0].close()
    return {}


def commits(name, seconds):
    execute = connections[name][0].execute
    clock = time.perf_counter
    count = 0
    begin = clock()
    end = begin + seconds
    while True:
        execute(INSERT, (VALUE,))
        count += 1
        now = clock()
        if now >= end:
            return {"count": count, "seconds": now - begin}


def scan(name):
    """Reads everything once."""
    connections[name][0].execute("SELECT sum(length(v)) FROM t").fetchone()
    return {}


def reads(name, seconds):
    db, rows = connections[name]
    execute = db.execute
    clock = time.perf_counter
    ids = [(random.randint(1, rows),) for _ in range(20000)]
    count = 0
    begin = clock()
    end = begin + seconds
    while True:
        for id in ids[:100]:
            if execute("SELECT v FROM t WHERE id = ?", id).fetchone() is None:
                raise RuntimeError(f"row {id} is not there")
        ids = ids[100:] + ids[:100]
        count += 100
        now = clock()
        if now >= end:
            return {"count": count, "seconds": now - begin}


def files(dir, seconds):
    """Makes, writes, reads and removes files that belong to no database."""
    path = os.path.join(dir, "file")
    clock = time.perf_counter
    count = 0
    begin = clock()
    end = begin + seconds
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        for i in range(8):
            os.pwrite(fd, b"x" * 512, i * 512)
            os.pread(fd, 512, i * 512)
        os.close(fd)
        os.unlink(path)
        count += 1
        now = clock()
        if now >= end:
            return {"count": count, "seconds": now - begin}


def pace(name, rate, count):
    """Commits at a steady rate; answers when each commit had returned."""
    execute = connections[name][0].execute
    returned = []
    begin = time.monotonic_ns()
    for i in range(count):
        ahead = begin + i * 1_000_000_000 // rate - time.monotonic_ns()
        if ahead > 0:
            time.sleep(ahead / 1e9)
        execute(INSERT, (VALUE,))
        returned.append(time.monotonic_ns())
    return {"times": returned, "seconds": (returned[-1] - begin) / 1e9}


def watch(name, count, timeout):
    """Polls an open connection for new rows; answers when each was seen."""
    execute = connections[name][0].execute
    newest = "SELECT max(id) FROM t"
    last = execute(newest).fetchone()[0] or 0
    until = last + count
    give_up = time.monotonic_ns() + int(timeout * 1e9)
    seen = []
    print(json.dumps({"watching": True}), flush=True)
    while last < until:
        now_there = execute(newest).fetchone()[0] or 0
        now = time.monotonic_ns()
        seen.extend([now] * (now_there - last))
        last = now_there
        if now > give_up:
            raise RuntimeError(f"{until - last} of {count} rows did not appear within {timeout} s")
        # Leaves the processors to the agents; adds at most this much to what is measured.
        time.sleep(0.0001)
    return {"times": seen}


COMMANDS = {
    "version": version,
    "create": create,
    "create_large": create_large,
    "open": open_database,
    "close": close_database,
    "commits": commits,
    "scan": scan,
    "reads": reads,
    "files": files,
    "pace": pace,
    "watch": watch,
}

for line in sys.stdin:
    arguments = json.loads(line)
    try:
        answer = COMMANDS[arguments.pop("do")](**arguments)
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer), flush=True)
