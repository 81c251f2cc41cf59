//! Two hosts with systemd, as an operator sets them up: `apt install litefs`, `systemctl enable --now litefs@db`.

use super::{CREATE, INSERT, Interrupt, SELECT, heading};
use anyhow::{Context, Result, bail};
use fleet::{Fleet, Host};
use std::io::IsTerminal;
use std::time::{Duration, Instant};

const DATABASE: &str = "/srv/litefs/db/demo.db";
const PRIMARY: &str = "[http]\nlisten = \"0.0.0.0:20202\"\n";
const REPLICA: &str = "[lease]\nrole = \"replica\"\nprimary-url = \"http://host-a:20202\"\n";

/// How long a transaction may take to arrive. A working replica needs milliseconds.
const PATIENCE: Duration = Duration::from_secs(30);

/// Boots the hosts, if namespaces are allowed here.
pub fn boot() -> Result<Fleet> {
    let fleet = Fleet::try_new(2)?;
    println!("{} and {} run, each with a systemd of its own", fleet[0].name(), fleet[1].name());
    Ok(fleet)
}

/// Shows the main job on them.
pub fn run(fleet: &Fleet) -> Result<()> {
    // From here on Ctrl-C ends the demo in order, so that everything is taken down again.
    let stop = Interrupt::new()?;
    let (a, b) = (&fleet[0], &fleet[1]);

    heading("build the packages and an apt repository");
    let repository = fleet::repository(1)?;
    println!("{}", repository.canonicalize()?.display());
    for host in [a, b] {
        host.offer_packages(1);
    }

    heading("install and start the agent on both hosts");
    for (host, configuration) in [(a, PRIMARY), (b, REPLICA)] {
        host.push("/etc/litefs/db.toml", configuration);
        show(host, "apt-get install -y -qq litefs >/dev/null")?;
        show(host, "cat /etc/litefs/db.toml")?;
        show(host, "systemctl enable --now --quiet litefs@db")?;
        stop.pause(Duration::ZERO)?;
    }

    heading("write on the primary with sqlite3");
    show(a, &format!("sqlite3 {DATABASE} \"{CREATE}\""))?;
    show(a, &format!("sqlite3 {DATABASE} \"{INSERT}\""))?;
    let rows = output(a, &format!("sqlite3 {DATABASE} \"{SELECT}\""))?;
    let position = output(a, &format!("cat {DATABASE}-pos"))?;

    heading("read on the replica");
    let deadline = Instant::now() + PATIENCE;
    while b.try_run(&format!("cat {DATABASE}-pos"))?.stdout != position {
        if Instant::now() > deadline {
            bail!("demo.db did not reach {} on {}:\n{}", position.trim(), b.name(), b.journal());
        }
        stop.pause(Duration::from_millis(20))?;
    }
    if show(b, &format!("sqlite3 {DATABASE} \"{SELECT}\""))? != rows {
        bail!("the replica shows other rows than the primary");
    }

    heading("equal positions");
    for host in [a, b] {
        show(host, "litefs status")?;
    }
    show(b, "busctl get-property io.litefs.LiteFS1.db /io/litefs/LiteFS1 io.litefs.LiteFS1.Manager Role")?;

    heading("a replica refuses writes");
    let write = format!("sqlite3 {DATABASE} \"DELETE FROM greeting;\"");
    println!("{}# {write}", b.name());
    let refused = b.try_run(&write)?;
    print!("{}", refused.stderr);
    if refused.success() {
        bail!("the replica took a write");
    }

    println!("\nboth hosts have demo.db at {}", position.trim());
    if std::io::stdin().is_terminal() {
        try_next(a, b);
        stop.wait_for_enter()?;
    } else {
        println!("run this on a terminal to try more; README.md says how to set up two hosts");
    }
    Ok(())
}

fn try_next(a: &Host, b: &Host) {
    heading("try next, in another terminal");
    for host in [a, b] {
        println!("{}", host.shell());
    }
    println!(
        "  sqlite3 {DATABASE}\n  litefs status\n  systemctl status litefs@db\n  journalctl -u litefs@db"
    );
    println!("  systemctl kill --signal=KILL --kill-who=main litefs@db\n  busctl tree io.litefs.LiteFS1.db");
    println!("press Enter to end the demo and remove its hosts");
}

/// Runs a command on a host, which has to succeed, and shows both.
fn show(host: &Host, command: &str) -> Result<String> {
    println!("{}# {command}", host.name());
    let text = output(host, command)?;
    print!("{text}");
    Ok(text)
}

fn output(host: &Host, command: &str) -> Result<String> {
    let outcome = host.try_run(command).with_context(|| format!("cannot run {command:?}"))?;
    if !outcome.success() {
        bail!("{}: {command}\n{}{}", host.name(), outcome.stdout, outcome.stderr);
    }
    Ok(outcome.stdout)
}
