//! Whatever happens to real hosts and to Consul, while a client on every host appends to a list and reads it: nothing
//! acknowledged is lost, nobody writes in a term that has ended, and all hosts have the same list in the end.

use fleet::{Fleet, Host, wait_for};
use list_append::{History, ListClient};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// Where the commits wait for another host, and where they do not.
const LIST: &str = "/srv/litefs/db/list.db";
const SIDE: &str = "/srv/litefs/db/side.db";

/// The TTL is the default.
const CONFIG: &str = "\
[http]
listen = \"0.0.0.0:20202\"
[lease]
type = \"consul\"
[consul]
address = \"http://host-d:8500\"
[sync]
acks = 1
members = [\"host-a\", \"host-b\", \"host-c\"]
[[sync-rule]]
databases = [\"side.db\"]
acks = 0
";

/// Keeps what it knows when it is stopped.
const CONSUL: &str = "\
[Service]
ExecStart=/opt/consul agent -server -bootstrap-expect=1 -data-dir=/var/lib/consul -bind=10.77.0.4 -client=0.0.0.0 \
    -hcl='performance { raft_multiplier = 1 }'
";

/// The agent's clocks can be moved while it runs.
const CLOCKS: &str = "\
[Service]
Environment=LD_PRELOAD=/opt/clocks.so CLOCKS=/opt/clocks
";

const YEAR: i64 = 365 * 86_400;

fn consul() -> PathBuf {
    let installed =
        || concat!(env!("CARGO_MANIFEST_DIR"), "/../../target/tools/consul/usr/bin/consul").into();
    std::env::var_os("LITEFS_CONSUL").map_or_else(installed, PathBuf::from)
}

/// Three hosts that choose a primary, one with Consul, and the clients.
struct Site {
    clients: Vec<Option<ListClient>>,
    scratch: PathBuf,
    started: usize,
    history: History,
    fleet: Fleet,
}

impl Site {
    fn new() -> Site {
        let fleet = Fleet::new(4);
        let consul_host = &fleet[3];
        consul_host
            .push("/opt/consul", std::fs::read(consul()).expect("`cargo xtask setup` installs Consul"));
        consul_host.push("/etc/systemd/system/consul.service", CONSUL);
        consul_host.run("chmod +x /opt/consul && systemctl daemon-reload && systemctl start consul");
        let client = std::fs::read(list_append::program()).expect("it was built");
        for host in &fleet.hosts()[..3] {
            host.install_litefs();
            host.push("/etc/litefs/db.toml", CONFIG);
            host.push("/opt/append_client", &client);
            host.run("chmod +x /opt/append_client && systemctl enable -q --now litefs@db");
        }
        let scratch = Path::new(env!("CARGO_TARGET_TMPDIR")).join("fleet-faults");
        std::fs::create_dir_all(&scratch).expect("cargo's directory is writable");
        let clients = [(); 3].map(|()| None).into();
        let mut site = Site { clients, scratch, started: 0, history: History::default(), fleet };
        let primary = site.wait_whole();
        site.host(primary).run(&format!("sqlite3 {LIST} '{}'", list_append::CREATE));
        site.host(primary).run(&format!("sqlite3 {SIDE} '{}'", list_append::CREATE));
        for number in 0..3 {
            site.host(number).wait_for(&format!("test -f {LIST} && test -f {SIDE}"));
            site.start_client(number);
        }
        site
    }

    fn host(&self, number: usize) -> &Host {
        &self.fleet[number]
    }

    fn consul(&self) -> &Host {
        &self.fleet[3]
    }

    /// Each client has a name of its own, also one that comes after a boot.
    fn start_client(&mut self, number: usize) {
        let name = format!("{}-{}", self.host(number).name(), self.started);
        let command = self.host(number).command(&format!("exec /opt/append_client {LIST} {name}"));
        self.clients[number] = Some(ListClient::start(command, &name, &self.scratch));
        self.started += 1;
    }

    fn acknowledged(&self) -> usize {
        self.clients.iter().flatten().map(ListClient::acknowledged).sum()
    }

    fn wait_appends(&self, count: usize, what: &str) {
        let before = self.acknowledged();
        wait_for(&format!("appends succeed {what}"), || {
            (self.acknowledged() >= before + count).then_some(())
        });
    }

    fn role(&self, number: usize) -> Option<Value> {
        let outcome =
            self.host(number).try_run("litefs status --json").ok().filter(fleet::Outcome::success)?;
        serde_json::from_str::<Value>(&outcome.stdout).ok().map(|mut status| status["role"].take())
    }

    fn epoch(&self, number: usize) -> u64 {
        self.role(number).and_then(|role| role["epoch"].as_u64()).expect("the agent tells its epoch")
    }

    fn is_primary(&self, number: usize) -> bool {
        self.role(number).is_some_and(|role| role["name"] == "primary")
    }

    /// Waits until there is a primary that all others follow, and appends succeed. Returns its number.
    #[track_caller]
    fn wait_whole(&self) -> usize {
        let primary = fleet::wait_for("there is a primary that all others follow", || {
            let roles = (0..3).map(|number| self.role(number)).collect::<Option<Vec<_>>>()?;
            let primary = roles.iter().position(|role| role["name"] == "primary")?;
            let name = self.host(primary).name();
            let follows =
                |role: &Value| role["upstream"]["hostname"] == name && role["upstream"]["connected"] == true;
            roles
                .iter()
                .enumerate()
                .all(|(number, role)| number == primary || follows(role))
                .then_some(primary)
        });
        if self.clients.iter().any(Option::is_some) {
            self.wait_appends(5, "when the fleet is whole");
        }
        primary
    }

    /// Waits until another host than this one leads.
    fn wait_other_leads(&self, old: usize) -> usize {
        wait_for("another host leads", || (0..3).find(|number| *number != old && self.is_primary(*number)))
    }

    /// A commit that does not wait for other hosts, and that ends soon, if the agent does not stand still.
    fn begin_commit(&self, number: usize) -> Child {
        let insert =
            format!("exec sqlite3 -cmd '.timeout 1' {SIDE} \"INSERT INTO t(value) VALUES ('side')\"");
        let mut command = self.host(number).command(&insert);
        command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("nsenter runs")
    }

    fn commits(&self, number: usize) -> bool {
        self.begin_commit(number).wait().expect("it is our child").success()
    }

    fn signal(&self, number: usize, signal: &str) {
        self.host(number).run(&format!("systemctl kill --kill-who=main -s {signal} litefs@db"));
    }

    /// Moves the clocks of an agent, in seconds.
    fn move_clocks(&self, number: usize, realtime: i64, boottime: i64) {
        let nanoseconds = [realtime, boottime].map(|seconds| (seconds * 1_000_000_000).to_ne_bytes());
        let bytes: String = nanoseconds.concat().iter().map(|byte| format!("\\x{byte:02x}")).collect();
        self.host(number).run(&format!("printf '{bytes}' | dd of=/opt/clocks conv=notrunc status=none"));
    }
}

/// The primary alone on one side, and all others with Consul on the other one.
fn cut_the_primary_off(site: &mut Site, primary: usize) {
    site.host(primary).cut();
    site.wait_other_leads(primary);
    assert!(!site.is_primary(primary), "two primaries");
    assert!(!site.commits(primary), "a commit on the side that has lost");
    site.host(primary).heal();
}

/// The primary and a replica reach Consul and the third host, but not each other.
fn set_two_hosts_apart(site: &mut Site, primary: usize) {
    let replica = (primary + 1) % 3;
    let epoch = site.epoch(primary);
    [primary, replica].iter().for_each(|number| site.host(*number).set_apart(true));
    site.wait_appends(50, "while two hosts are apart");
    assert!(!site.is_primary(replica), "two primaries");
    [primary, replica].iter().for_each(|number| site.host(*number).set_apart(false));
    assert_eq!(site.wait_whole(), primary);
    assert_eq!(site.epoch(primary), epoch, "a new term, while the primary was well");
}

/// The agent stands still for longer than its lease. What waits for it is the first thing that it sees afterwards.
fn stop_the_agent(site: &mut Site, primary: usize) {
    site.signal(primary, "STOP");
    let mut waiting = site.begin_commit(primary);
    site.wait_other_leads(primary);
    assert_eq!(waiting.try_wait().expect("it is our child"), None, "a commit without an agent");
    site.signal(primary, "CONT");
    assert!(!waiting.wait().expect("it is our child").success(), "a commit in a term that has ended");
}

fn kill_the_agent(site: &mut Site, primary: usize) {
    let show = "systemctl show --value -p MainPID litefs@db";
    let pid = site.host(primary).run(show);
    site.signal(primary, "KILL");
    site.host(primary).wait_for(&format!("systemctl is-active litefs@db && test $({show}) != {pid}"));
}

fn pull_the_plug(site: &mut Site, primary: usize) {
    let client = site.clients[primary].take().expect("each host has one");
    site.host(primary).power_off();
    client.end_dead(&mut site.history);
    site.wait_other_leads(primary);
    site.wait_appends(5, "without the host that is off");
    assert_eq!(site.host(primary).boot(), "running");
    site.start_client(primary);
}

/// Nobody leads without Consul, and readers do not notice.
fn wait_fenced(site: &Site, primary: usize) {
    wait_for("the primary takes no more commits", || (!site.commits(primary)).then_some(()));
    for number in 0..3 {
        assert!(number == primary || !site.commits(number), "a replica takes commits");
        site.host(number).run(&format!("test $(sqlite3 {LIST} 'SELECT count(*) FROM t') -gt 0"));
    }
}

fn stop_consul(site: &mut Site, primary: usize) {
    site.consul().run("systemctl stop consul");
    site.wait_appends(5, "as long as the lease lasts");
    wait_fenced(site, primary);
    site.consul().run("systemctl start consul");
}

fn let_consul_hang(site: &mut Site, primary: usize) {
    site.consul().run("systemctl kill -s STOP consul");
    site.wait_appends(5, "as long as the lease lasts");
    wait_fenced(site, primary);
    site.consul().run("systemctl kill -s CONT consul");
}

/// The time of all hosts is set, to different years: no term ends by that.
fn set_the_time(site: &mut Site, primary: usize) {
    let epoch = site.epoch(primary);
    for times in [[YEAR, -YEAR, 10 * YEAR], [-YEAR, YEAR, 0], [0, 0, 0]] {
        for (number, time) in times.into_iter().enumerate() {
            site.move_clocks(number, time, 0);
        }
        site.wait_appends(50, "after the time was set");
    }
    assert_eq!(site.wait_whole(), primary);
    assert_eq!(site.epoch(primary), epoch, "a new term, while the primary was well");
}

/// The host sleeps for an hour. For all others no time has passed; it knows by its own clock that the lease is over.
fn let_the_primary_sleep(site: &mut Site, primary: usize) {
    // It cannot have renewed the lease before it takes up the commit.
    site.consul().run("systemctl kill -s STOP consul");
    site.signal(primary, "STOP");
    let waiting = site.begin_commit(primary);
    site.move_clocks(primary, 0, 3600);
    site.signal(primary, "CONT");
    let ended = waiting.wait_with_output().expect("it is our child");
    assert!(!ended.status.success(), "a commit in a term that has ended");
    site.consul().run("systemctl kill -s CONT consul");
}

#[test]
fn whatever_happens_to_hosts_no_acknowledged_append_is_lost_and_all_hosts_have_one_list() {
    let mut site = Site::new();
    type Fault = fn(&mut Site, usize);
    let faults: [(&str, Fault); 7] = [
        ("the primary is cut off", cut_the_primary_off),
        ("two hosts are apart", set_two_hosts_apart),
        ("the agent stands still", stop_the_agent),
        ("the agent is killed", kill_the_agent),
        ("the plug is pulled", pull_the_plug),
        ("Consul is stopped", stop_consul),
        ("Consul hangs", let_consul_hang),
    ];
    let clocks: [(&str, Fault); 2] =
        [("the time is set", set_the_time), ("the primary sleeps", let_the_primary_sleep)];
    let begun = std::time::Instant::now();
    let run = |site: &mut Site, (name, fault): (&str, Fault)| {
        let primary = site.wait_whole();
        eprintln!("{:?}: {name} ({})", begun.elapsed(), site.host(primary).name());
        fault(site, primary);
        site.wait_whole();
    };
    for fault in faults {
        run(&mut site, fault);
    }
    // From here on the agents see other clocks than the hosts: real ones cannot be moved for one host of a machine.
    let library = site.scratch.join("clocks.so");
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/../clients/clocks.c");
    let made = Command::new("cc").args(["-O1", "-shared", "-fPIC", source, "-o"]).arg(&library).status();
    assert!(made.is_ok_and(|status| status.success()), "cannot compile {source}");
    for number in 0..3 {
        let host = site.host(number);
        host.push("/opt/clocks.so", std::fs::read(&library).expect("it was made"));
        host.push("/opt/clocks", [0; 16]);
        host.push("/etc/systemd/system/litefs@.service.d/clocks.conf", CLOCKS);
        host.run("systemctl daemon-reload && systemctl restart litefs@db");
        site.wait_whole();
    }
    for fault in clocks {
        run(&mut site, fault);
    }

    let Site { clients, mut history, fleet, .. } = site;
    clients.into_iter().flatten().for_each(|client| client.end(&mut history));
    for database in ["list.db", "side.db"] {
        let positions = || {
            let position = |host: &Host| host.run(&format!("cat /srv/litefs/db/{database}-pos"));
            let all: Vec<String> = fleet.hosts()[..3].iter().map(position).collect();
            all.iter().all(|other| *other == all[0]).then_some(())
        };
        wait_for("all hosts have the same position", positions);
        let sums: Vec<String> = fleet.hosts()[..3]
            .iter()
            .map(|host| {
                host.run(&format!(
                    "litefs export {database} /tmp/{database} && sqlite3 /tmp/{database} 'PRAGMA integrity_check' | \
                     grep -qx ok && sha256sum < /tmp/{database}"
                ))
            })
            .collect();
        assert!(sums.iter().all(|other| *other == sums[0]), "{database} differs: {sums:?}");
    }
    let list = list_append::entries(&fleet[0].run(&format!("sqlite3 {LIST} '{}'", list_append::READ)));
    let summary = history.check(&list);
    eprintln!("{:?}: {} entries: {summary:?}", begun.elapsed(), list.len());
    assert!(summary.acknowledged > 0, "{summary:?}");
}
