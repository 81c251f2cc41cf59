<?php
// Runs each line of its input as SQL: rows, then `ok` or `error: ...`. Argument: database.
$db = new PDO('sqlite:' . $argv[1]);
$db->setAttribute(PDO::ATTR_ERRMODE, PDO::ERRMODE_EXCEPTION);
$db->setAttribute(PDO::ATTR_TIMEOUT, 20);
echo $db->getAttribute(PDO::ATTR_CLIENT_VERSION), "\n";
while (($line = fgets(STDIN)) !== false) {
    try {
        $statement = $db->query($line);
        foreach ($statement->fetchAll(PDO::FETCH_NUM) as $row) {
            echo implode('|', $row), "\n";
        }
        $statement = null;
        echo "ok\n";
    } catch (PDOException $error) {
        $statement = null;
        echo 'error: ', $error->getMessage(), "\n";
    }
}
