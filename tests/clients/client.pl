# Runs each line of its input as SQL: rows, then `ok` or `error: ...`. Argument: database.
use strict;
use warnings;
use DBI;
$| = 1;
my $db = DBI->connect("dbi:SQLite:dbname=$ARGV[0]", "", "", { RaiseError => 1, PrintError => 0, AutoCommit => 1 });
$db->sqlite_busy_timeout(20000);
print "$db->{sqlite_version}\n";
while (my $line = <STDIN>) {
    eval {
        my $statement = $db->prepare($line);
        $statement->execute;
        if ($statement->{NUM_OF_FIELDS}) {
            while (my $row = $statement->fetchrow_arrayref) {
                print join("|", map { $_ // "" } @$row), "\n";
            }
        }
        print "ok\n";
        1;
    } or print "error: ", $@ =~ s/\n/ /gr, "\n";
}
$db->disconnect;
