# Runs each line of its input as SQL: rows, then `ok` or `error: ...`. Argument: database.
require "sqlite3"
$stdout.sync = true
db = SQLite3::Database.new(ARGV[0])
db.busy_timeout = 20_000
puts SQLite3::SQLITE_VERSION
while (line = $stdin.gets)
  begin
    db.execute(line).each { |row| puts row.map(&:to_s).join("|") }
    puts "ok"
  rescue SQLite3::Exception => error
    puts "error: #{error.message}"
  end
end
db.close
