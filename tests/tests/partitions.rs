//! Networks that are cut, hosts and Consul that stop, while clients on every host append to a list and read it: nothing
//! acknowledged is lost, and all hosts have the same list in the end.
//!
//! `LITEFS_FAULTS=200` has more go wrong, `LITEFS_SEED` other things (with `LITEFS_TEST_HANGS_AFTER=1500`, in seconds).

use fastrand::Rng;
use list_append::{History, ListClient};
use litefs_tests::*;
use nix::sys::signal::Signal;
use std::process::Command;
use std::time::{Duration, Instant};

const NAMES: [&str; 3] = ["a", "b", "c"];

/// Three candidates, each with a cable to Consul's bridge, whose commits need one more of them.
struct Site {
    hosts: Vec<Host>,
    network: Network,
    consul: Consul,
    fleet: Fleet,
}

impl Site {
    fn new(settings: &[&str]) -> Site {
        let mut network = Network::new();
        let (consul, address) = Consul::start_for(network.hub());
        let fleet = Fleet::new();
        let scratch = fleet.scratch();
        let hosts: Vec<Host> = NAMES.iter().map(|name| fleet.host(name, Role::Candidate(&address))).collect();
        for host in &hosts {
            network.plug(host, &scratch);
            host.set("replication.heartbeat=200ms").set("replication.timeout=1s");
            for setting in settings {
                host.set(setting);
            }
            host.start();
        }
        let site = Site { hosts, network, consul, fleet };
        site.wait_whole();
        let primary = site.primary().expect("there is one");
        site.hosts[primary].sql("app.db", list_append::CREATE);
        for host in &site.hosts {
            site.hosts[primary].wait_position_equal(host, "app.db");
        }
        site
    }

    fn primary(&self) -> Option<usize> {
        self.hosts.iter().position(Host::is_primary)
    }

    /// One primary, and all others follow it.
    fn wait_whole(&self) {
        let whole = || {
            let primary = &self.hosts[self.primary()?];
            let mut others = self.hosts.iter().filter(|host| host.name() != primary.name());
            others.all(|host| host.follows(primary)).then_some(())
        };
        wait_for("there is a primary that all others follow", PATIENCE, whole);
    }
}

#[test]
fn a_primary_that_is_cut_off_is_fenced_and_the_others_go_on() {
    let site = Site::new(&[]);
    let old = site.primary().expect("there is one");
    let a = &site.hosts[old];
    a.sql("app.db", "INSERT INTO t(value) VALUES ('before')");
    for host in &site.hosts {
        a.wait_position_equal(host, "app.db");
    }
    site.network.cut(old, true);
    // Its side: alone, and with writes refused before anybody else takes them.
    let new = wait_for("another one leads", PATIENCE, || {
        let leads: Vec<usize> = (0..3).filter(|i| site.hosts[*i].is_primary()).collect();
        assert!(leads.len() < 2, "two primaries: {leads:?}");
        leads.into_iter().find(|i| *i != old)
    });
    assert!(a.try_sql("app.db", "INSERT INTO t(value) VALUES ('too late')").is_err());
    assert_eq!(a.sql("app.db", "SELECT count(*) FROM t"), "1", "readers notice nothing");
    // The other side.
    let b = &site.hosts[new];
    b.sql("app.db", "INSERT INTO t(value) VALUES ('after')");
    site.network.cut(old, false);
    site.wait_whole();
    assert_equal(b, a, "app.db");
    assert_eq!(a.sql("app.db", "SELECT group_concat(value) FROM t"), "before,after");
}

#[test]
fn a_replica_that_is_cut_off_never_leads() {
    let site = Site::new(&[]);
    let primary = site.primary().expect("there is one");
    let (a, number) = (&site.hosts[primary], (primary + 1) % 3);
    let epoch = a.epoch();
    site.network.cut(number, true);
    let cut = &site.hosts[number];
    // Longer than a TTL, in which it saw no renewal.
    cut.wait_for("it has lost its upstream", || !cut.follows(a));
    let until = Instant::now() + Duration::from_secs(4);
    let mut value = 0;
    wait_for("two terms pass", PATIENCE, || {
        value += 1;
        a.sql("app.db", &format!("INSERT INTO t(value) VALUES ('{value}')"));
        assert!(!cut.is_primary());
        (Instant::now() > until).then_some(())
    });
    site.network.cut(number, false);
    site.wait_whole();
    assert_eq!((a.is_primary(), a.epoch()), (true, epoch));
    assert_equal(a, cut, "app.db");
}

/// What goes wrong, for a while.
#[derive(Debug, Clone, Copy)]
enum Fault {
    Cut(usize),
    Apart(usize, usize),
    Stop(usize),
    Kill(usize),
    ConsulHangs,
    Handoff(usize, usize),
}

impl Site {
    fn break_it(&self, fault: Fault) {
        match fault {
            Fault::Cut(i) => self.network.cut(i, true),
            Fault::Apart(i, j) => [i, j].iter().for_each(|i| self.network.set_apart(*i, true)),
            Fault::Stop(i) => self.hosts[i].signal(Signal::SIGSTOP),
            Fault::Kill(i) => drop(self.hosts[i].kill()),
            Fault::ConsulHangs => self.consul.freeze(),
            // It may be refused, when others have not caught up.
            Fault::Handoff(i, j) => {
                drop(try_run(&mut self.hosts[i].litefs(&["handoff", "--to", NAMES[j]])));
            }
        }
    }

    fn mend(&self, fault: Fault) {
        match fault {
            Fault::Cut(i) => self.network.cut(i, false),
            Fault::Apart(i, j) => [i, j].iter().for_each(|i| self.network.set_apart(*i, false)),
            Fault::Stop(i) => self.hosts[i].signal(Signal::SIGCONT),
            Fault::Kill(i) => drop(self.hosts[i].start()),
            Fault::ConsulHangs => self.consul.thaw(),
            Fault::Handoff(..) => {}
        }
    }
}

#[test]
fn whatever_goes_wrong_no_acknowledged_append_is_lost_and_all_hosts_have_one_list() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let (faults, seed) = (number("LITEFS_FAULTS").unwrap_or(8), number("LITEFS_SEED").unwrap_or(1));
    let site = Site::new(&["sync.acks=1", "sync.members=a,b,c"]);
    let scratch = site.fleet.scratch();
    let start = |host: &Host| {
        let mut command = Command::new(list_append::program());
        command.arg(host.path("app.db")).arg(host.name());
        ListClient::start(command, host.name(), &scratch)
    };
    let clients: Vec<ListClient> = site.hosts.iter().map(start).collect();
    let acknowledged = || clients.iter().map(ListClient::acknowledged).sum::<usize>();
    let mut random = Rng::with_seed(seed);
    for round in 0..faults {
        // Half of them at the primary.
        let primary = site.primary().expect("the site is whole");
        let other = (primary + 1 + random.usize(..2)) % 3;
        let victim = if random.u64(..2) == 0 { primary } else { other };
        // The first ones are one of each kind.
        let fault = match if round < 6 { round } else { random.u64(..6) } {
            0 => Fault::Cut(if round < 6 { primary } else { victim }),
            1 => Fault::Apart(primary, other),
            2 => Fault::Stop(if round < 6 { primary } else { victim }),
            3 => Fault::Kill(victim),
            4 => Fault::ConsulHangs,
            _ => Fault::Handoff(primary, other),
        };
        let lasts = Duration::from_millis(100 + random.u64(..4000));
        eprintln!("{round}: {fault:?} for {lasts:?}, {} acknowledged", acknowledged());
        site.break_it(fault);
        std::thread::sleep(lasts);
        site.mend(fault);
        site.wait_whole();
        let before = acknowledged();
        wait_for("appends succeed again", PATIENCE, || (acknowledged() > before).then_some(()));
    }
    let mut history = History::default();
    clients.into_iter().for_each(|client| client.end(&mut history));
    let primary = &site.hosts[site.primary().expect("the site is whole")];
    for host in site.hosts.iter().filter(|host| host.name() != primary.name()) {
        assert_equal(primary, host, "app.db");
    }
    let list = list_append::entries(&primary.sql("app.db", list_append::READ));
    let summary = history.check(&list);
    eprintln!("{faults} faults, {} entries, last epoch {}: {summary:?}", list.len(), primary.epoch());
    assert!(summary.acknowledged > 0);
}
