/* Runs each line of its input as SQL: rows, then `ok` or `error: ...`. Argument: database. */
#include <sqlite3.h>
#include <stdio.h>

static int row(void *unused, int columns, char **values, char **names) {
    (void)unused;
    (void)names;
    for (int i = 0; i < columns; i++) printf("%s%s", i ? "|" : "", values[i] ? values[i] : "");
    putchar('\n');
    return 0;
}

int main(int argc, char **argv) {
    static char line[1 << 16];
    sqlite3 *db;
    if (argc < 2 || sqlite3_open(argv[1], &db)) return 1;
    sqlite3_busy_timeout(db, 20000);
    setvbuf(stdout, NULL, _IOLBF, 0);
    puts(sqlite3_libversion());
    while (fgets(line, sizeof line, stdin)) {
        char *message = NULL;
        if (sqlite3_exec(db, line, row, NULL, &message)) printf("error: %s\n", message);
        else puts("ok");
        sqlite3_free(message);
    }
    return sqlite3_close(db);
}
