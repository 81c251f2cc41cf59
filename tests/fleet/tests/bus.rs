//! The installed agent on the host's own bus: polkit, units that hooks reload, journal messages with explanations.

use fleet::{Fleet, Host};

const NAME: &str = "io.litefs.LiteFS1.db";
const MANAGER: &str = "io.litefs.LiteFS1.db /io/litefs/LiteFS1 io.litefs.LiteFS1.Manager";
const SITE: &str = "io.litefs.LiteFS1.db /io/litefs/LiteFS1/databases/site_2edb io.litefs.LiteFS1.Database";

/// Each reload writes what it was told and what it sees to `/run/reloads`.
const WEB: &str = "\
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/sh -c 'test ! -e /run/broken && echo started >> /run/reloads'
EnvironmentFile=-/run/litefs/db/hooks/web.service.env
ExecReload=/bin/sh -c 'echo $LITEFS_DATABASE $LITEFS_ROLE $(sqlite3 $LITEFS_PATH \"SELECT max(x) FROM t\") >> /run/reloads'
";

/// A template that gets the database as its instance.
const REFRESH: &str = "\
[Service]
Type=oneshot
ExecStart=/bin/sh -c 'echo %I >> /run/refreshed'
";

const HOOKS: &str = "\
[[on-change]]
databases = \"site.db\"
unit = \"web.service\"

[[on-change]]
databases = \"**\"
unit = \"refresh@.service\"
verb = \"start\"
debounce = \"50ms\"

[[on-change]]
databases = \"sub/*\"
command = [\"/bin/sh\", \"-c\", \"echo $LITEFS_DATABASE $(sqlite3 $LITEFS_PATH .tables) > /run/commanded\"]
";

fn as_operator(host: &Host, call: &str) -> fleet::Outcome {
    host.try_run(&format!("setpriv --reuid=nobody --regid=nogroup --clear-groups {call}"))
        .expect("the host is on")
}

#[test]
fn units_are_reloaded_when_a_database_changes_and_polkit_decides() {
    let fleet = Fleet::new(2);
    let (a, b) = (&fleet[0], &fleet[1]);
    for host in fleet.hosts() {
        host.install_litefs();
    }
    b.push("/etc/systemd/system/web.service", WEB);
    b.push("/etc/systemd/system/refresh@.service", REFRESH);
    b.run("systemctl daemon-reload && mkdir -p /etc/litefs/db.toml.d");
    b.push("/etc/litefs/db.toml.d/hooks.toml", HOOKS);
    a.start_litefs(None);
    b.start_litefs(Some(a));

    // Hooks of the replica: the unit is started by the first change and reloaded by the next ones.
    a.run("sqlite3 /srv/litefs/db/site.db 'CREATE TABLE t(x); INSERT INTO t VALUES (1)'");
    b.wait_for("grep -q started /run/reloads");
    a.run("sqlite3 /srv/litefs/db/site.db 'INSERT INTO t VALUES (7)'");
    b.wait_for("grep -q 'site.db replica 7' /run/reloads");
    a.run("mkdir -p /srv/litefs/db/sub && sqlite3 /srv/litefs/db/sub/x-1.db 'CREATE TABLE t(x)'");
    b.wait_for("grep -q '^sub/x-1.db$' /run/refreshed");
    // A command lives in the agent's sandbox, and can read the database.
    b.wait_for("test \"$(cat /run/commanded)\" = 'sub/x-1.db t'");
    b.run("litefs wait --caught-up --timeout 30s && test \"$(systemctl is-active web.service)\" = active");

    // A unit that fails is reported under its id, and reloaded when it works again.
    b.run("touch /run/broken && systemctl stop web.service");
    a.run("sqlite3 /srv/litefs/db/site.db 'INSERT INTO t VALUES (8)'");
    b.wait_for(
        "journalctl -u litefs@db MESSAGE_ID=fb2a8ecb3cd64ed69db43252a34bae9d | grep 'the hook failed'",
    );
    b.run("rm /run/broken");
    a.run("sqlite3 /srv/litefs/db/site.db 'INSERT INTO t VALUES (9)'");
    b.wait_for("test $(grep -c started /run/reloads) = 2");

    // Everybody may look.
    for (host, role) in [(a, "primary"), (b, "replica")] {
        let said = as_operator(host, &format!("busctl get-property {MANAGER} Role"));
        assert_eq!(said.stdout.trim(), format!("s \"{role}\""), "{said:?}");
    }
    b.run(&format!("busctl tree {NAME} | grep site_2edb"));

    // polkit says no, until a rule says yes.
    let denied = as_operator(a, &format!("busctl call {SITE} Verify"));
    assert!(!denied.success() && denied.stderr.contains("Access denied"), "{denied:?}");
    a.push(
        "/etc/polkit-1/rules.d/50-litefs.rules",
        "polkit.addRule(function(action, subject) {\n\
         if (action.id == 'io.litefs.LiteFS1.verify' && subject.user == 'nobody') return polkit.Result.YES;\n});\n",
    );
    a.run("chmod 644 /etc/polkit-1/rules.d/50-litefs.rules && systemctl restart polkit");
    let allowed = as_operator(a, &format!("busctl call {SITE} Verify"));
    assert!(allowed.success(), "{allowed:?}");
    let denied = as_operator(a, &format!("busctl call {MANAGER} Reload"));
    assert!(!denied.success(), "{denied:?}");

    // A reload that finds mistakes fails, and is explained in the journal.
    a.run("echo 'nonsense = 1' >> /etc/litefs/db.toml");
    let reload = a.try_run("systemctl reload litefs@db").expect("the host is on");
    assert!(!reload.success(), "{reload:?}");
    a.run("systemctl is-active litefs@db");
    let explained = a.run("journalctl -x -u litefs@db MESSAGE_ID=2e7c72dc445f4cfcb160c4d532a172aa");
    assert!(explained.contains("LiteFS: the configuration was not taken over"), "{explained}");
    assert!(explained.contains("unknown key http.nonsense"), "{explained}");
    let role = a.run("journalctl -x -u litefs@db MESSAGE_ID=97599f13c5304e66b906fde5f7c54bf5");
    assert!(role.contains("LiteFS: this host is now primary"), "{role}");
    a.run("sed -i /nonsense/d /etc/litefs/db.toml && systemctl reload litefs@db");
}
