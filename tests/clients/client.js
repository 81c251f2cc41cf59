// Runs each line of its input as SQL: rows, then `ok` or `error: ...`. Arguments: module, database.
const [module_, database] = process.argv.slice(2);
const fs = require("node:fs");
let prepare, version;
if (module_ === "node:sqlite") {
  const { DatabaseSync } = require("node:sqlite");
  const db = new DatabaseSync(database);
  db.exec("PRAGMA busy_timeout=20000");
  prepare = (sql) => ({ all: () => db.prepare(sql).all() });
} else {
  const db = new (require("better-sqlite3"))(database, { timeout: 20000 });
  prepare = (sql) => {
    const statement = db.prepare(sql);
    return { all: () => (statement.reader ? statement.all() : (statement.run(), [])) };
  };
}
const say = (text) => fs.writeSync(1, text + "\n");
say(Object.values(prepare("SELECT sqlite_version()").all()[0])[0]);
require("node:readline")
  .createInterface({ input: process.stdin })
  .on("line", (line) => {
    try {
      for (const row of prepare(line).all()) {
        say(Object.values(row).map((value) => value ?? "").join("|"));
      }
      say("ok");
    } catch (error) {
      say("error: " + error.message);
    }
  });
