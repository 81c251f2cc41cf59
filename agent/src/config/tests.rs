use super::*;
use std::fs;

/// A configuration directory with `db.toml` and drop-ins.
struct Files(tempfile::TempDir);

impl Files {
    fn new(files: &[(&str, &str)]) -> Files {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        Files(dir)
    }

    fn source(&self) -> Source {
        Source { dir: self.0.path().to_owned(), ..Source::default() }
    }

    fn load(&self) -> Result<Config, ConfigError> {
        Config::load(&self.source())
    }

    /// The problems of a `db.toml`, without the directory.
    fn problems(text: &str) -> Vec<String> {
        let files = Files::new(&[("db.toml", text)]);
        let dir = format!("{}/", files.0.path().display());
        let problems = files.load().expect_err("accepted").problems;
        problems.iter().map(|problem| problem.to_string().replace(&dir, "")).collect()
    }
}

#[test]
fn without_any_file_the_defaults_make_a_primary_of_a_cluster_of_one() {
    let config = Files::new(&[]).load().unwrap();
    assert_eq!(config.cluster, "db");
    assert_eq!(config.data.dir, Path::new("/var/lib/litefs/db"));
    assert_eq!(config.mount.dir, Path::new("/srv/litefs/db"));
    assert_eq!(config.socket.path, Path::new("/run/litefs/db/control.sock"));
    assert_eq!(config.http.advertise_url, format!("http://{}:20202", config.node.name));
    assert_eq!(config.lease.role, LeaseRole::Primary);
    assert_eq!(config.log.segment_size, 32 << 20);
    assert!(config.origins.is_empty());
}

#[test]
fn later_layers_win_and_every_value_knows_its_place() {
    let files = Files::new(&[
        ("db.toml", "[http]\nlisten = \"0.0.0.0:1\"\n[log]\nretention-age = \"1h\"\n[node]\nname = \"a\"\n"),
        ("db.toml.d/20-b.toml", "http.listen = \"0.0.0.0:3\"\n"),
        ("db.toml.d/10-a.toml", "http.listen = \"0.0.0.0:2\"\nmount.threads = 3\n"),
        ("db.toml.d/ignored.txt", "not toml at all"),
    ]);
    let mut source = files.source();
    source.set = vec!["mount.threads=5".into(), "node.name=host-7".into()];
    let config = Config::load(&source).unwrap();
    assert_eq!(config.http.listen.port(), 3);
    assert_eq!(config.mount.threads, 5);
    assert_eq!(config.log.retention_age, Duration::from_secs(3600));
    assert_eq!(config.http.advertise_url, "http://host-7:3");
    let origin = |key| config.origins[key].to_string();
    assert!(origin("http.listen").ends_with("db.toml.d/20-b.toml:1:15"), "{}", origin("http.listen"));
    assert!(origin("log.retention-age").ends_with("db.toml:4:17"));
    assert_eq!(origin("mount.threads"), "command line, --set mount.threads=5");
    assert_eq!(config.reload().unwrap().to_toml(), config.to_toml());
}

#[test]
fn what_show_prints_is_a_configuration_with_the_same_values() {
    let files = Files::new(&[(
        "db.toml",
        "[lease]\nrole = \"replica\"\nprimary-url = \"http://a:1/\"\n[log]\nretention-age = \"90s\"\nretention-size = 33554433\n",
    )]);
    let config = files.load().unwrap();
    let shown = config.to_toml();
    assert!(shown.contains("primary-url = \"http://a:1\"  # "), "{shown}");
    let again = Files::new(&[("db.toml", &shown)]).load().unwrap();
    assert_eq!(toml::to_string(&again).unwrap(), toml::to_string(&config).unwrap());
}

#[test]
fn the_key_table_and_the_structs_name_the_same_keys() {
    let optional = r#"
        http.token-file = "/t"
        mount.helper = "/h"
        consul = { token-file = "/c", tls-ca = "/a", tls-certificate = "/c", tls-key = "/k" }
        lease = { role = "replica", primary-url = "https://a:1" }
        tls = { certificate = "/c", key = "/k", ca = "/a", peer-name = "n" }
    "#;
    let files = Files::new(&[("db.toml", optional)]);
    let values = toml::Table::try_from(files.load().unwrap()).unwrap();
    let mut in_structs: Vec<String> = Vec::new();
    for (name, value) in &values {
        match value {
            toml::Value::Table(table) => in_structs.extend(table.keys().map(|key| format!("{name}.{key}"))),
            _ => in_structs.push(name.clone()),
        }
    }
    let mut in_table: Vec<&str> = KEYS.iter().map(|key| key.path).collect();
    in_structs.sort();
    in_table.sort_unstable();
    assert_eq!(in_structs, in_table);
}

#[test]
fn documented_defaults_are_the_defaults() {
    let config = Files::new(&[]).load().unwrap();
    let values = toml::Table::try_from(&config).unwrap();
    for key in KEYS {
        let value = match key.table_and_name() {
            (Some(table), name) => values[table].get(name),
            (None, name) => values.get(name),
        };
        let documented = key
            .default
            .replace("<cluster>", "db")
            .replace("<node.name>", &config.node.name)
            .replace("<port of http.listen>", "20202")
            .replace("the host name", &format!("{:?}", config.node.name));
        let actual = value.map_or("none".to_owned(), ToString::to_string);
        assert_eq!(actual, documented, "{}", key.path);
    }
}

#[test]
fn the_reference_page_has_the_key_table() {
    let mut table = String::from("| key | default | meaning |\n|---|---|---|\n");
    for key in KEYS {
        let written = key.default.starts_with('"') || key.default.parse::<u64>().is_ok();
        let default = if written { format!("`{}`", key.default) } else { key.default.to_owned() };
        table.push_str(&format!("| `{}` | {default} | {} |\n", key.path, key.doc));
    }
    let page = include_str!("../../../docs/configuration.md");
    assert!(page.contains(&table), "docs/configuration.md should have this table:\n{table}");
    let mut table = String::from("| key of a hook | default | meaning |\n|---|---|---|\n");
    for (name, default, doc) in HOOK_KEYS {
        let default = if default.starts_with('"') { format!("`{default}`") } else { default.to_owned() };
        table.push_str(&format!("| `{name}` | {default} | {doc} |\n"));
    }
    assert!(page.contains(&table), "docs/configuration.md should have this table:\n{table}");
    let mut table = String::from("| key of a rule | default | meaning |\n|---|---|---|\n");
    for (name, default, doc) in SYNC_RULE_KEYS {
        table.push_str(&format!("| `{name}` | {default} | {doc} |\n"));
    }
    assert!(page.contains(&table), "docs/configuration.md should have this table:\n{table}");
}

#[test]
fn unknown_keys_and_tables_are_errors_with_a_place_and_a_suggestion() {
    assert_eq!(
        Files::problems(
            "[lease]\nrole = \"primary\"\n  primry-url = \"x\"\n\n[replicaton]\nheartbeat = \"1s\"\n"
        ),
        [
            "db.toml:3:3: unknown key lease.primry-url\n  help: did you mean lease.primary-url?",
            "db.toml:5:2: unknown table [replicaton]\n  help: did you mean [replication]?",
        ]
    );
    assert_eq!(
        Files::problems("[http]\nprimary-url = \"x\"\n"),
        ["db.toml:2:1: unknown key http.primary-url\n  help: did you mean lease.primary-url?"]
    );
    assert_eq!(
        Files::problems("zebra = 1\n"),
        ["db.toml:1:1: unknown key zebra\n  help: `litefs config show` prints all keys"]
    );
    assert_eq!(
        Files::problems("http = \"x\"\n"),
        ["db.toml:1:8: http is a table, not a value\n  help: write [http] and its keys below it"]
    );
}

#[test]
fn every_bad_value_is_reported_at_once_with_its_place() {
    let problems = Files::problems(
        "[lease]\nrole = \"replca\"\n[log]\nsegment-size = \"32 megs\"\nretention-age = 10\n[http]\nlisten = \
         \"localhost:1\"\n[data]\ndir = \"var/lib\"\n[mount]\nthreads = 999\n[node]\nname = \"a b\"\n",
    );
    let first: Vec<&str> = problems.iter().map(|problem| problem.lines().next().unwrap()).collect();
    assert_eq!(
        first,
        [
            "db.toml:2:8: lease.role must be \"primary\" or \"replica\", is \"replca\" (did you mean \"replica\"?)",
            "db.toml:4:16: log.segment-size must be a size such as \"512KiB\", \"64MiB\" or \"2GiB\", is \"32 megs\"",
            "db.toml:5:17: log.retention-age must be a duration such as \"100ms\", \"5s\", \"10m\" or \"24h\", is 10",
            "db.toml:7:10: http.listen must be an IP address and a port such as \"0.0.0.0:20202\", is \"localhost:1\"",
            "db.toml:9:7: data.dir must be an absolute path without \"..\", is \"var/lib\"",
            "db.toml:11:11: mount.threads must be a number from 0 to 256, is 999",
            "db.toml:13:8: node.name must be a host name (letters, digits, '-', '_' and '.'), is \"a b\"",
        ]
    );
    assert!(problems[0].ends_with("help: its default is \"primary\""));
}

#[test]
fn bad_toml_is_an_error_with_its_place() {
    let problems = Files::problems("[http]\nlisten = \n");
    assert!(problems[0].starts_with("db.toml:2:"), "{problems:?}");
}

#[test]
fn urls_are_http_host_and_port() {
    let url =
        |url: &str| Files::problems(&format!("lease.role = \"replica\"\nlease.primary-url = {url:?}\n"));
    for (bad, why) in [
        ("https://a:1", "[tls] is not set"),
        ("a:1", "http://"),
        ("http://a", "no port"),
        ("http://a:1/x", "nothing may follow"),
        ("http://u@a:1", "user names"),
        ("http://:1", "URL"),
        ("", "not a URL"),
    ] {
        let problems = url(bad);
        assert!(problems[0].contains(why), "{bad}: {problems:?}");
    }
}

#[test]
fn with_certificates_addresses_are_https() {
    let tls = "[tls]\ncertificate = \"/c\"\nca = \"/a\"\n";
    let config = Files::new(&[("db.toml", tls)]).load().unwrap();
    assert!(config.http.advertise_url.starts_with("https://"), "{}", config.http.advertise_url);
    let problems =
        Files::problems(&format!("lease = {{ role = \"replica\", primary-url = \"http://a:1\" }}\n{tls}"));
    assert!(problems[0].contains("lease.primary-url is http://a:1, but [tls] is set"), "{problems:?}");
}

#[test]
fn values_that_do_not_fit_together_are_errors() {
    for (text, expected) in [
        ("tls.certificate = \"/c\"", "db.toml:1:19: tls.certificate is set, but tls.ca is not"),
        ("tls.peer-name = \"n\"", "db.toml:1:17: tls.peer-name is set, but tls.certificate is not"),
        (
            "lease.role = \"replica\"",
            "db.toml:1:14: lease.role is \"replica\", but lease.primary-url is not set",
        ),
        ("lease.primary-url = \"http://a:1\"", "db.toml:1:21: lease.primary-url is set, but lease.role"),
        ("data.dir = \"/srv/litefs/db/data\"", "db.toml:1:12: data.dir /srv/litefs/db/data and mount.dir"),
        ("mount.dir = \"/var/lib/litefs/db/.\"", "db.toml:1:13: data.dir /var/lib/litefs/db and mount.dir"),
        ("mount.dir = \"/var\"", "db.toml:1:13: data.dir"),
        ("socket.path = \"/srv/litefs/db/s\"", "db.toml:1:15: socket.path /srv/litefs/db/s is below"),
        ("replication.timeout = \"1s\"", "db.toml:1:23: replication.timeout (1s) is not longer"),
        ("replication.heartbeat = \"9s\"", "db.toml:1:25: replication.timeout (5s) is not longer"),
        ("replication.reconnect-max = \"5ms\"", "db.toml:1:29: replication.reconnect-max"),
        ("log.retention-size = \"1MiB\"", "db.toml:1:22: log.retention-size (1MiB)"),
    ] {
        let problems = Files::problems(text);
        assert_eq!(problems.len(), 1, "{problems:?}");
        assert!(problems[0].starts_with(expected), "{}", problems[0]);
    }
    let long = format!("socket.path = \"/{}\"", "x".repeat(107));
    assert!(Files::problems(&long)[0].contains("longer than 107 bytes"));
    let own = "node.name = \"a\"\nlease.role = \"replica\"\nlease.primary-url = \"http://a:20202\"";
    assert!(Files::problems(own)[0].contains("this host's own"));
}

#[test]
fn the_cluster_names_the_file_and_the_directories() {
    let files = Files::new(&[("shop.toml", "mount.threads = 2\n"), ("db.toml", "mount.threads = 3\n")]);
    let mut source = files.source();
    source.cluster = Some("shop".into());
    let config = Config::load(&source).unwrap();
    assert_eq!((config.mount.threads, config.data.dir.as_path()), (2, Path::new("/var/lib/litefs/shop")));
    source.cluster = Some("../shop".into());
    assert!(Config::load(&source).unwrap_err().to_string().contains("must be letters"));
}

#[test]
fn a_file_for_another_cluster_than_asked_for_is_an_error() {
    let files = Files::new(&[("any.toml", "cluster = \"shop\"\n")]);
    let mut source = files.source();
    source.file = Some(files.0.path().join("any.toml"));
    assert_eq!(Config::load(&source).unwrap().mount.dir, Path::new("/srv/litefs/shop"));
    source.cluster = Some("db".into());
    let problems = Config::load(&source).unwrap_err();
    assert!(
        problems
            .to_string()
            .contains("any.toml:1:11: cluster is \"shop\", but the command line asks for \"db\"")
    );
}

#[test]
fn a_file_that_was_asked_for_has_to_exist() {
    let files = Files::new(&[]);
    let mut source = files.source();
    source.file = Some(files.0.path().join("gone.toml"));
    let error = Config::load(&source).unwrap_err().to_string();
    assert!(error.contains("gone.toml") && error.contains("No such file"), "{error}");
}

#[test]
fn bad_options_are_errors_that_quote_the_option() {
    let mut source = Files::new(&[]).source();
    source.set = vec!["mount.thread=1".into(), "x".into(), "mount.threads=many".into()];
    let problems = Config::load(&source).unwrap_err().problems;
    let text: Vec<String> = problems.iter().map(ToString::to_string).collect();
    assert!(text[0].contains("--set mount.thread=1: unknown key") && text[0].contains("mount.threads?"));
    assert!(text[1].contains("--set x: no '=' in it"));
    assert!(text[2].contains("mount.threads must be a number from 0 to 256, is \"many\""));
}
